"""The master's shell, driven in-process with real sockets, real channels and, where it matters, real processes."""
