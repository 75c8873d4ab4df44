"""The acceptance list, row by row: what Node's `cluster` does and where we do better, driven through the public API."""
