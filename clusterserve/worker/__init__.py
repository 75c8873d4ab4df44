"""The worker's shell: an event loop whose servers listen through the master."""
