"""The zygote: a warm process with a single thread, which forks workers."""
