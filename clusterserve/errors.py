"""What can go wrong, one class per party at fault.

Every message is one sentence for a person: what was wrong, where, and what to do.  `exit_code` is what the command
line ends with when the error reaches it (docs/settings.md, "Exit codes").
"""

from __future__ import annotations


class ClusterError(Exception):
    """Something that ends a cluster, or keeps it from starting.  Base of all errors this package raises."""

    exit_code = 1

    #: Whether the log has it already, where everybody looks.
    told = False


class SettingsError(ClusterError, ValueError):
    """A setting is wrong: the fault of whoever wrote the command line, the environment or the call."""

    exit_code = 2


class BindError(ClusterError, OSError):
    """An address cannot be listened on.  `errno` is the kernel's, `address` is as the user wrote it."""

    def __init__(self, errno: int, message: str, address: str) -> None:
        super().__init__(errno, message)
        self.address = address
        self._message = message

    def __str__(self) -> str:
        return self._message


class BootError(ClusterError):
    """No worker ever came to listen.  `traceback` is the worker's own text, empty when it left none."""

    exit_code = 3

    def __init__(self, message: str, traceback: str = "") -> None:
        super().__init__(message)
        self.traceback = traceback

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}\n{self.traceback.rstrip()}" if self.traceback else message


class DesertedError(BootError):
    """It did serve, but every worker has ended with a code that means not to restart it."""

    exit_code = 1


class ProtocolError(ClusterError):
    """The other end of a channel sent what it must not.  Costs that worker, nobody else."""


class ChannelClosed(ClusterError):  # noqa: N818 - an event, and its name in Node (ERR_IPC_CHANNEL_CLOSED)
    """A message, or a request, to a worker or a master that is gone or going."""


class PolicyError(ClusterError):
    """A scheduling policy chose a worker that cannot take the connection."""
