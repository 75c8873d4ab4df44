"""The master's log: the `clusterserve` loggers, in the look of uvicorn's.

With `--log-config` the file decides, for the master as for the workers.
"""

from __future__ import annotations

import json
import logging
import logging.config
import sys

import click

from .errors import SettingsError
from .settings import Settings

#: uvicorn's extra level.
TRACE = 5

_COLOURS = {
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


def configure(settings: Settings) -> None:
    """Set up the master's logging for a program of ours (`run`); an embedding program keeps its own."""
    logging.addLevelName(TRACE, "TRACE")
    if settings.log_config is not None:
        _load(settings.log_config)
    logger = logging.getLogger("clusterserve")
    if not logger.hasHandlers():
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(Formatter(sys.stderr.isatty() if settings.use_colors is None else settings.use_colors))
        logger.addHandler(handler)
        logger.propagate = False
    if settings.log_level is not None:
        logger.setLevel(TRACE if settings.log_level == "trace" else settings.log_level.upper())
    elif logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


def _load(path: str) -> None:
    """As uvicorn reads it: .json and .yaml for dictConfig, everything else for fileConfig.

    A file made for uvicorn may silence every logger it does not name; ours would not be heard from then.
    """
    try:
        if path.endswith(".json"):
            with open(path, encoding="utf-8") as file:
                logging.config.dictConfig(json.load(file))
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
