"""The master's shell: sockets, processes, signals and one event loop that do what `clusterserve.core` decides."""
