"""Which loggers write what where: the master's, and uvicorn's in a worker.

As text they have uvicorn's look, as JSON all have one schema (`json_lines`).  With `--log-config` the file decides, for
the master as for the workers.
"""

from __future__ import annotations

import json
import logging
import logging.config
import os
from typing import Any

import click

from . import toml
from .access import LOGGER, AccessFormatter
from .core.excluded import Excluded
from .errors import SettingsError
from .json_lines import JsonFormatter
from .log_files import Descriptors, LineHandler
from .settings import Settings

#: uvicorn's extra level.
TRACE = 5

#: The logger of the access log's records where they are not uvicorn's.
_OURS = "clusterserve.access"

_COLOURS = {
    TRACE: "blue",
    logging.DEBUG: "cyan",
    logging.INFO: "green",
    logging.WARNING: "yellow",
    logging.ERROR: "red",
    logging.CRITICAL: "bright_red",
}


class Formatter(logging.Formatter):
    """`INFO:     message`, coloured on a terminal."""

    def __init__(self, use_colors: bool) -> None:
        super().__init__("%(message)s")
        self._use_colors = use_colors

    def format(self, record: logging.LogRecord) -> str:
        name = record.levelname
        shown = click.style(name, fg=_COLOURS.get(record.levelno)) if self._use_colors else name
        return f"{shown}:{' ' * (9 - len(name))}{super().format(record)}"


def configure(settings: Settings, places: Descriptors = Descriptors()) -> None:  # noqa: B008 - a tuple
    """Set up the master's logging for a program of ours (`run`); an embedding program keeps its own."""
    _prepare(settings)
    logger = logging.getLogger("clusterserve")
    if not logger.hasHandlers():
        logger.addHandler(_handler(settings, places.error))
        logger.propagate = False
    if settings.log_level is not None:
        logger.setLevel(_level(settings.log_level))
    elif logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


def configure_worker(settings: Settings, places: Descriptors) -> None:
    """Set up uvicorn's logging in a worker, or in the template of workers; uvicorn itself is to set levels only."""
    _prepare(settings)
    access = logging.getLogger(LOGGER)
    if settings.log_config is None:
        errors = _handler(settings, places.error)
        for name in ("uvicorn", "clusterserve"):
            logging.getLogger(name).handlers[:] = [errors]
            logging.getLogger(name).setLevel(logging.INFO)
            logging.getLogger(name).propagate = False
        logging.getLogger("uvicorn.error").setLevel(logging.INFO)
        access.handlers[:] = [_access_handler(settings, places.access)]
        access.setLevel(logging.INFO)
        access.propagate = False
        if settings.log_format == "json" and logging.lastResort is not None:
            # What the application logs without having said where and how.
            logging.lastResort.setFormatter(JsonFormatter())
    if settings.access_log_exclude:
        access.addFilter(_Exclusion(Excluded(settings.access_log_exclude)))
    if settings.own_access_log:
        # uvicorn's protocols ask whether its logger has a handler: it will have none, and they make no records in vain.
        ours = logging.getLogger(_OURS)
        ours.setLevel(_level(settings.log_level) if settings.log_level is not None else access.getEffectiveLevel())
        ours.parent, ours.propagate, ours.handlers[:] = access.parent, access.propagate, access.handlers


def access_logger(settings: Settings) -> logging.Logger | None:
    """The logger for records of ours, if uvicorn's do not do and there is somebody to read ours."""
    ours = logging.getLogger(_OURS)
    return ours if settings.own_access_log and ours.isEnabledFor(logging.INFO) and ours.hasHandlers() else None


def answer_logger(settings: Settings, places: Descriptors) -> logging.Logger | None:
    """Where the answers of the master itself are logged: where the workers' are; None if nobody wants them.

    What a program's workers log is the program's business.
    """
    if not settings.access_log or settings.exec:
        return None
    if settings.log_config is not None:
        logger = logging.getLogger(LOGGER)
    else:
        # Not of the process, which may be a program of somebody else's.
        logger = logging.Logger(LOGGER, _level(settings.log_level or "info"))  # noqa: LOG001
        logger.addHandler(_access_handler(settings, places.access))
    return logger if logger.isEnabledFor(logging.INFO) and logger.hasHandlers() else None


def _level(name: str) -> int:
    return TRACE if name == "trace" else int(getattr(logging, name.upper()))


def _prepare(settings: Settings) -> None:
    logging.addLevelName(TRACE, "TRACE")
    if settings.log_config is not None:
        _load(settings.log_config)


def _handler(settings: Settings, fd: int) -> logging.Handler:
    handler = LineHandler(fd)
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else Formatter(_coloured(settings, fd)))
    return handler


def _access_handler(settings: Settings, fd: int) -> logging.Handler:
    handler = LineHandler(fd)
    if settings.log_format == "json":
        handler.setFormatter(JsonFormatter())
    elif not settings.own_access_log:
        handler.setFormatter(AccessFormatter(_coloured(settings, fd)))
    return handler


def _coloured(settings: Settings, fd: int) -> bool:
    if settings.use_colors is not None:
        return settings.use_colors
    # https://no-color.org: set, and not empty.
    return os.isatty(fd) and not os.environ.get("NO_COLOR")


class _Exclusion(logging.Filter):
    """For uvicorn's own records of the access log."""

    def __init__(self, excluded: Excluded) -> None:
        super().__init__()
        self._excluded = excluded

    def filter(self, record: logging.LogRecord) -> bool:
        arguments: Any = record.args
        _, _, target, _, status = arguments
        return not self._excluded.of_target(target, status)


def _load(path: str) -> None:
    """As uvicorn reads it: .json and .yaml (and .toml) for dictConfig, everything else for fileConfig.

    A file made for uvicorn may silence every logger it does not name; ours would not be heard from then.
    """
    try:
        if path.endswith((".json", ".toml")):
            with open(path, encoding="utf-8") as file:
                logging.config.dictConfig(json.load(file) if path.endswith(".json") else toml.parse(file.read()))
        elif path.endswith((".yaml", ".yml")):
            try:
                import yaml
            except ImportError:
                raise SettingsError(f"log_config {path!r} is YAML: install the PyYAML package to read it") from None
            with open(path, encoding="utf-8") as file:
                logging.config.dictConfig(yaml.safe_load(file))
        else:
            logging.config.fileConfig(path, disable_existing_loggers=False)
    except SettingsError:
        raise
    except Exception as exc:  # the file names classes and holds expressions: anything may come of it
        reason = " ".join(str(exc).split()) or type(exc).__name__
        raise SettingsError(f"log_config {path!r} cannot be used: {reason}") from exc
    for name, logger in logging.Logger.manager.loggerDict.items():
        if name.partition(".")[0] == "clusterserve" and isinstance(logger, logging.Logger):
            logger.disabled = False
