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
from .current import current_worker

#: What every record has, of which the schema says its own; anything else was given as `extra`.
_USUAL: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class JsonFormatter(logging.Formatter):
    """Tells what process it is in, which may be a fork of the one that it was made in."""

    def format(self, record: logging.LogRecord) -> str:
        worker = current_worker()
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="microseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "worker": None if worker is None else worker.id,
            "slot": None if worker is None else worker.slot,
            "pid": os.getpid(),
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
