"""Messages between a supervisor and the processes that it has started: datagrams, requests, pickles, arrays."""
