"""Through real processes: the command line, sockets and signals, seen from outside."""
