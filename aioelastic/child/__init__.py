"""What runs inside a started process: synchronous, and without asyncio (50 ms of start-up) until a user's
function needs it; the standard library, and cloudpickle where it is installed.

`kernel`: what is had of the kernel. `wire`: messages. `worker`: a function, from its first instruction to its last.
`zygote`: the warm process that forks workers. `guardian`: the process that starts and outlives them. In: messages of a
supervisor. Out: processes, values, errors. Never here: what a failure means to a group. This door imports nothing.
"""
