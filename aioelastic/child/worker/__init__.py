"""One function in its process: context, run, exceptions, and how the process ends."""
