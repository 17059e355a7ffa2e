"""What a started process has of the kernel: processes, forks, marks, places, and reads within bounds."""
