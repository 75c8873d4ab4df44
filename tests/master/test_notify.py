"""What systemd is told when things happen at the same time: READY=1 only while it is true."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from clusterserve.core.events import BecameReady, Scaled, StartedReload, StartedShutdown, Stopped
from clusterserve.errors import BootError, ClusterError
from clusterserve.master.changes import Changes
from clusterserve.master.notify import Notifier
from clusterserve.settings import Settings

from .rig import SkewedLoop

SETTINGS = Settings.create(app="a:b", workers=2, bind="127.0.0.1:0")
REFUSED = ClusterError("c.toml: there is no setting 'wokers'")


class Systemd:
    """Both ends of NOTIFY_SOCKET."""

    def __init__(self, path: Path, loop: SkewedLoop) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._loop = loop
        self.teller = Notifier(str(path), 0.0, loop)
        self.teller.starting(SETTINGS)
        assert self.told() == ["MAINPID", "Starting 2 workers of a:b"]

    def told(self) -> list[str]:
        """Since the last call: names, and texts of STATUS, of each message."""
        found: list[str] = []
        self._socket.setblocking(False)
        while True:
            try:
                lines = self._socket.recv(65536).decode().split("\n")
            except BlockingIOError:
                return found
            for name, _, value in (line.partition("=") for line in lines):
                found.append(value if name == "STATUS" else name)

    def reload(self, error: ClusterError | None) -> None:
        """One that comes to this end."""
        changes = Changes(self._loop)
        changes.begin().add_done_callback(self.teller.on_reloaded)
        changes.over(error)

    def close(self) -> None:
        self.teller.close()
        self._socket.close()


@pytest.fixture
def systemd(tmp_path: Path, loop: SkewedLoop) -> Iterator[Systemd]:
    systemd = Systemd(tmp_path / "notify", loop)
    yield systemd
    systemd.close()


def test_a_reload_that_is_refused_while_it_starts(systemd: Systemd) -> None:
    systemd.teller.on_refused(REFUSED)
    said = f"The last reload was refused, nothing was done: {REFUSED}"
    assert systemd.told() == [said, said]
    systemd.teller.on_event(BecameReady())
    assert systemd.told() == ["READY", "Serving with 2 workers"]
    systemd.teller.on_refused(REFUSED)
    assert systemd.told() == ["RELOADING", "MONOTONIC_USEC", said, "READY", said]


def test_a_reload_while_it_starts(systemd: Systemd, loop: SkewedLoop) -> None:
    systemd.teller.on_event(Scaled(3, 2))
    systemd.teller.on_event(StartedReload())
    assert systemd.told() == ["Starting 3 workers", "Replacing the workers"]
    systemd.teller.on_event(BecameReady())
    systemd.reload(None)
    loop.turn()
    assert systemd.told() == ["READY", "Serving with 3 workers"] * 2


def test_a_reload_while_it_starts_in_vain(systemd: Systemd, loop: SkewedLoop) -> None:
    systemd.teller.on_event(StartedReload())
    systemd.reload(BootError("workers die again and again", ""))
    loop.turn()
    assert systemd.told() == ["Replacing the workers", "The last reload failed: workers die again and again"]
    # It is heard a turn after the end.
    systemd.reload(ClusterError("the cluster has stopped"))
    systemd.teller.on_event(Stopped())
    loop.turn()
    systemd.teller.failed(BootError("the application could not be loaded", ""))
    assert systemd.told() == ["STOPPING", "the application could not be loaded"]


def test_an_upgrade_that_fails_while_it_starts(systemd: Systemd) -> None:
    systemd.teller.ready("The last upgrade failed")
    assert systemd.told() == ["The last upgrade failed"]


def test_a_stop_in_the_midst_of_a_reload(systemd: Systemd, loop: SkewedLoop) -> None:
    systemd.teller.on_event(BecameReady())
    systemd.teller.on_event(StartedReload())
    systemd.teller.on_event(StartedShutdown())
    assert systemd.told()[-2:] == ["STOPPING", "Serving what was accepted, then stopping"]
    systemd.teller.on_refused(REFUSED)
    systemd.reload(ClusterError("the cluster has stopped"))
    loop.turn()
    assert systemd.told() == []


def test_a_new_master_is_ready_when_it_takes_over(systemd: Systemd) -> None:
    systemd.teller.silent = True
    systemd.teller.on_event(BecameReady())
    assert systemd.told() == []
    systemd.teller.take_over(SETTINGS)
    assert systemd.told() == ["READY", "MAINPID", "Serving with 2 workers"]
    systemd.teller.on_event(StartedReload())
    assert systemd.told() == ["RELOADING", "MONOTONIC_USEC", "Replacing the workers"]
