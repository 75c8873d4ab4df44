"""The master's log: its look, its level, and the files that decide instead."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clusterserve.access import MESSAGE
from clusterserve.errors import SettingsError
from clusterserve.log_files import Descriptors
from clusterserve.logs import TRACE, Formatter, access_logger, configure, configure_worker
from clusterserve.settings import Settings


@pytest.fixture(autouse=True)
def logger() -> Iterator[logging.Logger]:
    """The master's logger; afterwards all is as it was."""
    root, ours = logging.getLogger(), logging.getLogger("clusterserve")
    kept = [(each, each.handlers[:], each.level, each.propagate, each.disabled) for each in (root, ours)]
    others = set(logging.Logger.manager.loggerDict)
    ours.setLevel(logging.NOTSET)
    ours.propagate = True
    yield ours
    for each, handlers, level, propagate, disabled in kept:
        each.handlers[:] = handlers
        each.setLevel(level)
        each.propagate, each.disabled = propagate, disabled
    for name in set(logging.Logger.manager.loggerDict) - others:
        logging.getLogger(name).handlers.clear()


def settings(**values: object) -> Settings:
    return Settings.create(app="module:app", workers=1, **values)


def start(**values: object) -> None:
    """Set it up in a program that has no handlers yet: those of pytest are none of its own."""
    for name in (None, "clusterserve"):
        logging.getLogger(name).handlers.clear()
    configure(settings(**values))


def record(level: int, message: str = "hello") -> logging.LogRecord:
    return logging.LogRecord("clusterserve", level, "file.py", 1, message, None, None)


# ── the look ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("level", "line"),
    [
        (logging.DEBUG, "DEBUG:    hello"),
        (logging.INFO, "INFO:     hello"),
        (logging.WARNING, "WARNING:  hello"),
        (logging.ERROR, "ERROR:    hello"),
        (logging.CRITICAL, "CRITICAL: hello"),
    ],
)
def test_messages_stand_in_one_column(level: int, line: str) -> None:
    assert Formatter(use_colors=False).format(record(level)) == line


def test_colours() -> None:
    assert Formatter(use_colors=True).format(record(logging.INFO)) == "\x1b[32mINFO\x1b[0m:     hello"
    # A level of somebody else's has no colour, and no trouble.
    assert Formatter(use_colors=True).format(record(7)).endswith("hello")


def test_the_same_look_as_uvicorns() -> None:
    from uvicorn.logging import DefaultFormatter

    theirs = DefaultFormatter("%(levelprefix)s %(message)s", use_colors=False)
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
        assert Formatter(use_colors=False).format(record(level)) == theirs.format(record(level))


def test_a_traceback_follows_its_message() -> None:
    try:
        raise RuntimeError("trouble")
    except RuntimeError:
        with_trouble = logging.LogRecord("clusterserve", logging.ERROR, "f", 1, "it failed", None, sys.exc_info())
    lines = Formatter(use_colors=False).format(with_trouble).splitlines()
    assert lines[0] == "ERROR:    it failed"
    assert lines[-1] == "RuntimeError: trouble"


# ── without a file ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_to_stderr_from_info_on(logger: logging.Logger, capfd: pytest.CaptureFixture[str]) -> None:
    start()
    logger.debug("too little")
    logger.info("enough")
    logging.getLogger("clusterserve.dispatch").warning("from a part of it")
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "INFO:     enough\nWARNING:  from a part of it\n"


def test_only_once(logger: logging.Logger, capfd: pytest.CaptureFixture[str]) -> None:
    start()
    configure(settings())
    logger.info("hello")
    assert capfd.readouterr().err == "INFO:     hello\n"


@pytest.mark.parametrize(
    ("name", "level"),
    [("critical", 50), ("error", 40), ("warning", 30), ("info", 20), ("debug", 10), ("trace", TRACE), ("DEBUG", 10)],
)
def test_levels(logger: logging.Logger, name: str, level: int) -> None:
    start(log_level=name)
    assert logger.level == level
    assert logging.getLevelName(TRACE) == "TRACE"


@pytest.mark.parametrize(("use_colors", "coloured"), [(True, True), (False, False), (None, False)])
def test_colours_as_asked_and_else_for_a_terminal(
    logger: logging.Logger, capfd: pytest.CaptureFixture[str], use_colors: bool | None, coloured: bool
) -> None:
    start(use_colors=use_colors)
    logger.info("hello")
    assert ("\x1b[" in capfd.readouterr().err) is coloured


def test_handlers_of_the_programs_own_are_kept(logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    logger.handlers.clear()
    logging.getLogger().handlers[:] = [logging.StreamHandler(sys.stdout)]
    configure(settings())
    logger.info("hello")
    assert capsys.readouterr() == ("hello\n", "")


def test_a_level_of_the_programs_own_is_kept(logger: logging.Logger) -> None:
    logger.setLevel(logging.ERROR)
    configure(settings())
    assert logger.level == logging.ERROR


# ── with a file ─────────────────────────────────────────────────────────────────────────────────────────────────────

DICT = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"plain": {"format": "mine %(levelname)s %(message)s"}},
    "handlers": {"out": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout", "formatter": "plain"}},
    "loggers": {"clusterserve": {"handlers": ["out"], "level": "WARNING", "propagate": False}},
}

YAML = """
version: 1
disable_existing_loggers: false
formatters: {plain: {format: "mine %(levelname)s %(message)s"}}
handlers: {out: {class: logging.StreamHandler, stream: ext://sys.stdout, formatter: plain}}
loggers: {clusterserve: {handlers: [out], level: WARNING, propagate: false}}
"""

TOML = """
version = 1
disable_existing_loggers = false
[formatters.plain]
format = "mine %(levelname)s %(message)s"
[handlers.out]
class = "logging.StreamHandler"
stream = "ext://sys.stdout"
formatter = "plain"
[loggers.clusterserve]
handlers = ["out"]
level = "WARNING"
propagate = false
"""

INI = """
[loggers]
keys=root,clusterserve
[handlers]
keys=out
[formatters]
keys=plain
[logger_root]
handlers=
[logger_clusterserve]
qualname=clusterserve
handlers=out
level=WARNING
propagate=0
[handler_out]
class=StreamHandler
args=(sys.stdout,)
formatter=plain
[formatter_plain]
format=mine %(levelname)s %(message)s
"""


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("log.json", json.dumps(DICT)),
        ("log.toml", TOML),
        ("log.yaml", YAML),
        ("log.yml", YAML),
        ("log.ini", INI),
        ("log.conf", INI),
    ],
)
def test_a_file_decides(
    logger: logging.Logger, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, content: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    start(log_config=str(path))
    logger.info("too little")
    logger.warning("hello")
    assert capsys.readouterr() == ("mine WARNING hello\n", "")


def test_a_level_on_the_command_line_wins(logger: logging.Logger, tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    path.write_text(json.dumps(DICT))
    start(log_config=str(path), log_level="debug")
    assert logger.level == logging.DEBUG


def test_a_file_that_does_not_speak_of_us(
    logger: logging.Logger, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # One made for uvicorn: it is the workers' then, and ours look as always.
    path = tmp_path / "log.json"
    path.write_text(json.dumps({"version": 1, "loggers": {"uvicorn": {"level": "INFO"}}}))
    start(log_config=str(path))
    assert not logger.disabled
    logger.info("hello")
    assert capfd.readouterr().err == "INFO:     hello\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("log.json", "{"),
        ("log.json", "[1, 2]"),
        ("log.json", '{"version": 7}'),
        ("log.json", '{"version": 1, "handlers": {"out": {"class": "no.such.Handler"}}}'),
        ("log.yaml", "a: [1"),
        ("log.yaml", ""),
        ("log.yaml", "\x00"),
        ("log.toml", "version = "),
        ("log.toml", "version = 7"),
        ("log.ini", "no section"),
        ("log.ini", ""),
        ("log.ini", "[loggers]\nkeys=root\n"),
        ("log.ini", INI.replace("(sys.stdout,)", "(no_such_name,)")),
        ("log.ini", INI.replace("(sys.stdout,)", "(1 +")),
        ("log.ini", INI.replace("(sys.stdout,)", "(1 / 0,)")),
        ("log.ini", INI.replace("class=StreamHandler", "class=no.such.Handler")),
        ("log.ini", INI.replace("level=WARNING", "level=LOUD")),
        ("log.json", b"\xff\xfe\x00"),
        ("log.ini", b"\xff\xfe\x00"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, name: str, content: str | bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SettingsError) as caught:
        start(log_config=str(path))
    assert str(caught.value).startswith(f"log_config {str(path)!r} cannot be used: ")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_gone_by_now(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    path.touch()
    checked = settings(log_config=str(path))
    path.unlink()
    with pytest.raises(SettingsError, match=r"log\.json"):
        configure(checked)


def test_yaml_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.yaml"
    path.write_text(YAML)
    # What an import finds there means "not installed".
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(SettingsError, match="install the PyYAML package"):
        start(log_config=str(path))


# ── terminals, machines, workers ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def terminal() -> Iterator[int]:
    ours, theirs = os.openpty()
    yield theirs
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize(("no_color", "coloured"), [(None, True), ("", True), ("1", False)])
def test_colours_on_a_terminal_unless_somebody_minds(
    logger: logging.Logger, terminal: int, monkeypatch: pytest.MonkeyPatch, no_color: str | None, coloured: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    logger.handlers.clear()
    logging.getLogger().handlers.clear()
    configure(settings(), Descriptors(1, terminal))
    (handler,) = logger.handlers
    assert ("\x1b[" in handler.format(record(logging.INFO))) is coloured


def test_the_masters_log_for_machines(logger: logging.Logger, capfd: pytest.CaptureFixture[str]) -> None:
    start(log_format="json", use_colors=True)
    logger.info("hello")
    line = json.loads(capfd.readouterr().err)
    assert (line["message"], line["worker"], line["slot"], line["pid"]) == ("hello", None, None, os.getpid())


@pytest.mark.parametrize(("name", "value"), [("log_format", "json"), ("access_logfile", "x"), ("error_logfile", "x")])
def test_a_file_decides_alone(tmp_path: Path, name: str, value: str) -> None:
    path = tmp_path / "log.json"
    path.write_text(json.dumps(DICT))
    with pytest.raises(SettingsError, match=f"{name}='{value}': log_config decides"):
        settings(log_config=str(path), **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("access_logformat", "%(h", "cannot be filled in"),
        ("access_logformat", "%s", "written %%"),
        ("access_logformat", 7, "must be a text"),
        ("access_log_exclude", 7, "must be a text, or a list of texts"),
        ("access_log_exclude", [7], "must be a text"),
        ("access_logfile", "", "must be the path of a file, or -"),
        ("error_logfile", "/", "this is a directory"),
        ("log_format", "xml", "must be one of text, json"),
    ],
)
def test_values_that_cannot_be(name: str, value: object, reason: str) -> None:
    with pytest.raises(SettingsError, match=reason):
        settings(**{name: value})


def test_an_empty_template_is_none() -> None:
    assert settings(access_logformat="").access_logformat is None
    assert settings(access_log_exclude="/x").access_log_exclude == ("/x",)


UVICORNS = ("uvicorn", "uvicorn.error", "uvicorn.access", "clusterserve.access")


@pytest.fixture
def worker() -> Iterator[None]:
    """uvicorn's loggers, and what everybody's last word is; afterwards all is as it was."""
    loggers = [logging.getLogger(name) for name in UVICORNS]
    kept = [(each, each.handlers[:], each.filters[:], each.level, each.propagate, each.parent) for each in loggers]
    formatter = logging.lastResort.formatter if logging.lastResort is not None else None
    for each in loggers:
        each.handlers.clear()
    yield
    for each, handlers, filters, level, propagate, parent in kept:
        each.handlers[:], each.filters[:], each.propagate, each.parent = handlers, filters, propagate, parent
        each.setLevel(level)
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(formatter)


def configured(settings: Settings) -> logging.Logger | None:
    configure_worker(settings, Descriptors())
    return access_logger(settings)


@pytest.mark.usefixtures("worker")
class TestAWorker:
    def test_by_default_uvicorn_writes_its_own_lines(self, capfd: pytest.CaptureFixture[str]) -> None:
        assert configured(settings()) is None
        logging.getLogger("uvicorn.access").info(MESSAGE, "h:1", "GET", "/", "1.1", 200)
        logging.getLogger("uvicorn.error").warning("hello")
        logging.getLogger("clusterserve").info("from a part of it")
        assert capfd.readouterr() == (
            'INFO:     h:1 - "GET / HTTP/1.1" 200 OK\n', "WARNING:  hello\nINFO:     from a part of it\n",
        )  # fmt: skip

    @pytest.mark.parametrize("values", [{"log_format": "json"}, {"access_logformat": "%(h)s"}])
    def test_where_more_is_wanted_it_is_ours(self, values: dict[str, object]) -> None:
        ours = configured(settings(**values))
        assert ours is not None
        assert ours.handlers == logging.getLogger("uvicorn.access").handlers
        assert configured(settings(access_log=False, **values)) is None
        assert configured(settings(log_level="warning", **values)) is None

    def test_whoever_has_said_nothing_about_logging(self, capsys: pytest.CaptureFixture[str]) -> None:
        configured(settings(log_format="json"))
        lonely = logging.Logger("lonely")  # noqa: LOG001 - without the handlers of pytest above it
        lonely.warning("hello")
        assert json.loads(capsys.readouterr().err)["message"] == "hello"

    def test_what_is_excluded(self, capfd: pytest.CaptureFixture[str]) -> None:
        configured(settings(access_log_exclude=["/h*"]))
        for target, status in (("/h?x", 200), ("/h", 500), ("/", 200)):
            logging.getLogger("uvicorn.access").info(MESSAGE, "c", "GET", target, "1.1", status)
        assert capfd.readouterr().out == (
            'INFO:     c - "GET /h HTTP/1.1" 500 Internal Server Error\nINFO:     c - "GET / HTTP/1.1" 200 OK\n'
        )

    def test_a_file_has_the_handlers(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "log.json"
        path.write_text(json.dumps({**DICT, "loggers": {"uvicorn": DICT["loggers"]["clusterserve"]}}))  # type: ignore[index]
        # As the file has it: uvicorn's loggers are silent below a warning.
        assert configured(settings(log_config=str(path), access_logformat="x")) is None
        ours = configured(settings(log_config=str(path), access_logformat="x", log_level="info"))
        assert ours is not None
        ours.info("hello")
        assert capsys.readouterr().out == "mine INFO hello\n"
