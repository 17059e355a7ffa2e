"""Processes as /proc and control groups show them: whose they are, what they hold, and those that are left over.

In: pids, marks, paths of control groups. Out: what is there now, and left-overs held by pidfds. It reads; signals go
only to what is held and proven to be left over; control groups are made, ended and removed here. Never here: starting a
process, or a decision to end one.
"""
