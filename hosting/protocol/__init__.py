"""The wire without I/O: frames in → requests, replies → frames out. No sockets, no clock of its own."""
