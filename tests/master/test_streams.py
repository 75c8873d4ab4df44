"""What a worker's descriptors are, and what of them the program holds."""

from __future__ import annotations

import contextlib
import os
import socket

import pytest

from clusterserve.launch import Launch
from clusterserve.master.streams import Streams

from .rig import no_more_descriptors


def test_without_any_wish_everything_is_the_masters() -> None:
    with contextlib.closing(Streams(Launch())) as streams:
        assert streams.standard == {"stdin": None, "stdout": None, "stderr": None}
        assert streams.extra == {}
        assert streams.stdio() == ()
        assert [streams.file(number) for number in range(3)] == [None, None, None]


def test_silent_gives_the_program_the_other_ends() -> None:
    with contextlib.closing(Streams(Launch(silent=True))) as streams:
        os.write(streams.standard["stdout"], b"out")
        os.write(streams.standard["stderr"], b"err")
        stdin, stdout, stderr = (streams.file(number) for number in range(3))
        assert stdin is not None
        assert stdout is not None
        assert stderr is not None
        # The same file however often it is asked for.
        assert streams.stdio() == (stdin, stdout, stderr)
        stdin.write(b"in")
        stdin.close()
        assert os.read(streams.standard["stdin"], 10) == b"in"
        streams.close()
        with stdout, stderr:
            assert (stdout.read(), stderr.read()) == (b"out", b"err")


def test_extra_pipes_go_both_ways_and_stay_out_of_each_others_way() -> None:
    launch = Launch(stdio=("inherit", "ignore", 2, "ipc", "pipe", "ignore", 1))
    with contextlib.closing(Streams(launch)) as streams:
        assert streams.standard["stdin"] is None
        assert os.fstat(streams.standard["stdout"]).st_rdev == os.stat(os.devnull).st_rdev
        assert os.path.samestat(os.fstat(streams.standard["stderr"]), os.fstat(2))
        assert list(streams.extra) == [4, 5, 6]
        assert min(streams.extra.values()) > 6
        *nothing, ours = streams.stdio()
        assert nothing == [None] * 4
        theirs = socket.socket(fileno=os.dup(streams.extra[4]))
        with ours, theirs:
            ours.sendall(b"there")
            theirs.sendall(b"back")
            assert (theirs.recv(10), ours.recv(10)) == (b"there", b"back")


def test_a_descriptor_that_is_not_open() -> None:
    free = os.dup(0)
    os.close(free)
    with pytest.raises(OSError, match="Bad file descriptor"):
        Streams(Launch(stdio=("pipe", "pipe", free, "ipc", "pipe")))


def test_no_descriptors_left() -> None:
    with no_more_descriptors(), pytest.raises(OSError, match="Too many open files"):
        Streams(Launch(silent=True))


def test_what_nobody_asks_for_is_closed_with_it() -> None:
    streams = Streams(Launch(silent=True))
    streams.close()
    # The fixture of this directory counts descriptors.
    del streams
