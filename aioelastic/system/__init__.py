"""Small things of the machine and of waiting: descriptors, helper threads, deadlines, names of shared memory, forks.

In: a descriptor, a job, a deadline. Out: the same, held so that nothing of it is lost, whatever interrupts it. Never
here: a process, a worker, a group. This door imports nothing: each file says what it is for.
"""
