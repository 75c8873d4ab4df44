"""The two sockets between the master and a worker, both ends: framing, descriptors, back-pressure."""
