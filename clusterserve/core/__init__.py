"""Decisions without I/O.

Nothing in this package imports os, socket, asyncio, signal, time or logging: time is an argument, descriptors are
opaque numbers, and every step returns what the shell (`clusterserve.master`, `clusterserve.worker`) must do.
`tests/test_imports.py` enforces it.
"""
