"""What this worker does at this moment: its threads, told from C on SIGPWR, and the tasks of its event loop.

A thread's stack must be told by a worker that holds its loop, or the interpreter itself.  So faulthandler writes them
from the signal's handler, to a file in memory that the master has too; and so it does when a worker crashes.  Tasks are
told by the loop that runs them, when the master asks for them with a message: a loop that stands has none that could be
looked at safely.
"""

from __future__ import annotations

import asyncio
import faulthandler
import fcntl
import gc
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any, Final

#: A text of tasks ends here (characters): it travels in one message.
_MOST: Final = 100_000

#: So many names of tasks that stand at the same place.
_NAMES: Final = 3


def answer_signal() -> int:
    """Have SIGPWR write the stacks of all threads to a new memfd, and return that.  It must stay open."""
    fd = os.memfd_create("clusterserve-stacks")
    # The master empties it.
    fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
    faulthandler.register(signal.SIGPWR, file=fd, all_threads=True)
    return fd


def thread_names() -> dict[str, str]:
    """The names of threads, by what faulthandler calls them."""
    return {f"{thread.ident:016x}": thread.name for thread in threading.enumerate() if thread.ident is not None}


def running_loops() -> list[asyncio.AbstractEventLoop]:
    """The event loops of this process that run, in whatever thread: a program may have some that we know nothing of."""
    found = [each for each in gc.get_objects() if issubclass(type(each), asyncio.AbstractEventLoop)]
    return [loop for loop in found if loop.is_running()]


def tasks(loops: Iterable[asyncio.AbstractEventLoop]) -> str:
    """Where the tasks of these loops stand, most recent call first; one entry for all that stand at the same place."""
    places: dict[str, list[str]] = {}
    for loop in loops:
        for task in asyncio.all_tasks(loop):
            places.setdefault("\n".join(_stack(task)), []).append(f"{task.get_name():.60}")
    entries = []
    for place, names in sorted(places.items(), key=lambda item: -len(item[1])):
        more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
        entries.append(f"Task {', '.join(sorted(names)[:_NAMES])}{more} (most recent call first):\n{place}")
    text = "\n".join(entries)
    return text if len(text) <= _MOST else text[:_MOST].rpartition("\n")[0] + "\n  ... and more than can be told here"


def _stack(task: asyncio.Task[Any]) -> list[str]:
    """The calls of a task that waits: what it awaits, what that awaits …, the innermost first."""
    calls = list(_calls(task.get_coro()))
    return calls[::-1] or [f"  {task.get_coro()!r:.200}"]


def _calls(awaited: Any) -> Iterator[str]:
    while awaited is not None:
        # A coroutine, a generator (types.coroutine), an asynchronous generator; what C has made shows no frame.
        for kind, inner in (("cr", "await"), ("gi", "yieldfrom"), ("ag", "await")):
            frame = getattr(awaited, f"{kind}_frame", None)
            if frame is not None:
                code = frame.f_code
                yield f'  File "{code.co_filename}", line {frame.f_lineno} in {code.co_name}'
                awaited = getattr(awaited, f"{kind}_{inner}")
                break
        else:
            return
