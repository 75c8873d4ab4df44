"""The log for machines (`--log-format json`): a JSON object a line, with the same keys whoever writes it.

Of our own, and not python-json-logger's: what that would do for us is `json.dumps`, and the keys are the point.  Which
there are is told in docs/logging.md.
"""

from __future__ import annotations

import json
import logging
import os
from datetime import datetime, timezone
from typing import Any, Final

from .access import AccessRecord, request_id
from .core.atoms import Who
from .current import current_worker

#: What every record has, of which the schema says its own; anything else was given as `extra`.
_USUAL: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


def _this_process() -> Who:
    worker = current_worker()
    return Who(None, None, os.getpid()) if worker is None else Who(worker.id, worker.slot, worker.pid)


class JsonFormatter(logging.Formatter):
    """For the handlers of process `who`; without it, as in a file for `--log-config`, of the one that calls."""

    def __init__(self, who: Who | None = None) -> None:
        super().__init__()
        self._who = who or _this_process()

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="microseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "worker": self._who.worker,
            "slot": self._who.slot,
            "pid": self._who.pid,
            "request_id": request_id.get(),
        }
        if isinstance(record, AccessRecord):
            line.update(record.fields())
        else:
            line.update((key, value) for key, value in vars(record).items() if key not in _USUAL and key not in line)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        return json.dumps(line, default=str, ensure_ascii=False)
