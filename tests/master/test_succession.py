"""The new master's side of an upgrade, by what it says to the old one."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest

from clusterserve.core.handover import MAX_MESSAGE, Hello, decode
from clusterserve.master.engine import Engine
from clusterserve.master.heritage import Heritage
from clusterserve.master.succession import Succession
from clusterserve.settings import Settings
from clusterserve.succession import Claim

from .rig import SkewedLoop


@pytest.mark.parametrize(
    ("options", "seconds"),
    [({}, 7.0), ({"preload": True}, 14.0), ({"reload": True}, 14.0), ({"exec": __file__}, 7.0)],
)
def test_the_old_one_waits_as_long_as_the_new_one_may_take(
    loop: SkewedLoop, options: dict[str, Any], seconds: float
) -> None:
    """A template has `--timeout-boot`, and then each worker has it again."""
    app = {} if "exec" in options else {"app": "app:app"}
    settings = Settings.create(**app, timeout_boot=7, **options)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        ours.settimeout(10)
        engine = Engine(settings, loop)
        heritage = Heritage(os.getppid(), [], "")
        succession = Succession(loop, Claim(theirs.detach(), os.getppid(), -1), heritage, engine, lambda: None)
        succession.start()
        assert decode(ours.recv(MAX_MESSAGE)) == Hello(seconds)
        succession.close()
        engine._close()
