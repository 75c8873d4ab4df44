"""Command lines of uvicorn and gunicorn, option by option: each works, or says what to use instead."""

from __future__ import annotations

from pathlib import Path

import pytest
from uvicorn.main import main as uvicorn_command

from clusterserve import cli
from clusterserve.errors import SettingsError
from clusterserve.options import OURS, SPECS
from clusterserve.peers import NOT_TAKEN
from clusterserve.settings import Settings
from clusterserve.sources import gather, settings_of

TAKEN = {flag for spec in SPECS for flag in spec.flags}

#: uvicorn 0.54's, with a value that is no default; None: it takes none.
UVICORN = {
    "--host": "::1", "--port": "8001", "--uds": "/x", "--fd": "3", "--reload": None, "--reload-dir": ".",
    "--reload-include": "*.txt", "--reload-exclude": "*.pyc", "--reload-delay": "1.5", "--workers": "3",
    "--loop": "uvloop", "--http": "h11", "--http2": None, "--ws": "wsproto", "--ws-max-size": "99",
    "--ws-max-queue": "9", "--ws-ping-interval": "9.5", "--ws-ping-timeout": "9.5",
    "--ws-per-message-deflate": "False", "--lifespan": "off", "--interface": "asgi3", "--env-file": "FILE",
    "--log-config": "FILE", "--log-level": "debug", "--access-log": None, "--no-access-log": None, "--use-colors": None,
    "--no-use-colors": None, "--proxy-headers": None, "--no-proxy-headers": None, "--server-header": None,
    "--no-server-header": None, "--date-header": None, "--no-date-header": None, "--forwarded-allow-ips": "*",
    "--root-path": "/api", "--limit-concurrency": "100", "--backlog": "64", "--limit-max-requests": "1000",
    "--limit-max-requests-jitter": "50", "--timeout-keep-alive": "9", "--timeout-graceful-shutdown": "9",
    "--timeout-worker-healthcheck": "9", "--ssl-keyfile": "KEY", "--ssl-certfile": "BOTH",
    "--ssl-keyfile-password": "x", "--ssl-version": "5", "--ssl-cert-reqs": "1", "--ssl-ca-certs": "BOTH",
    "--ssl-ciphers": "ECDHE+AESGCM", "--header": "A:b", "--version": None, "--app-dir": "/", "--factory": None,
    "--h11-max-incomplete-event-size": "9999", "--reset-contextvars": None, "--help": None,
}  # fmt: skip

#: gunicorn 27's, likewise.
GUNICORN = {
    "-h": None, "--help": None, "-v": None, "--version": None, "-c": "FILE", "--config": "FILE", "-b": ":8001",
    "--bind": "unix:/x", "--backlog": "64", "-w": "3", "--workers": "3",
    "-k": "uvicorn.workers.UvicornWorker", "--worker-class": "uvicorn_worker.UvicornWorker", "--threads": "4",
    "--worker-connections": "1000", "--max-requests": "1000", "--max-requests-jitter": "50", "-t": "9",
    "--timeout": "9", "--graceful-timeout": "9", "--keep-alive": "9", "--limit-request-line": "4000",
    "--limit-request-fields": "99", "--limit-request-field_size": "8000", "--reload": None, "--reload-engine": "auto",
    "--reload-extra-file": "FILE", "--spew": None, "--check-config": None, "--print-config": None, "--preload": None,
    "--no-sendfile": None, "--reuse-port": None, "--chdir": "/", "-D": None, "--daemon": None, "-e": "A=b",
    "--env": "A=b", "-p": "/x", "--pid": "/x", "--worker-tmp-dir": "/dev/shm", "-u": "0", "--user": "root", "-g": "0",
    "--group": "root", "-m": "007", "--umask": "007", "--initgroups": None, "--forwarded-allow-ips": "*",
    "--access-logfile": "-", "--disable-redirect-access-to-syslog": None, "--access-logformat": '%(h)s "%(r)s" %(D)d',
    "--error-logfile": "-", "--log-file": "-", "--log-level": "debug", "--capture-output": None, "--logger-class": "x",
    "--log-config": "FILE", "--log-config-json": "FILE", "--log-syslog-to": "x", "--log-syslog": None,
    "--log-syslog-prefix": "x", "--log-syslog-facility": "x", "-R": None, "--enable-stdio-inheritance": None,
    "--statsd-host": "x", "--dogstatsd-tags": "x", "--statsd-prefix": "x", "--enable-backlog-metric": None, "-n": "x",
    "--name": "x", "--pythonpath": "/", "--paste": "FILE", "--proxy-protocol": None, "--proxy-allow-from": "*",
    "--protocol": "uwsgi", "--uwsgi-allow-from": "*", "--keyfile": "KEY", "--certfile": "BOTH", "--ssl-version": "x",
    "--cert-reqs": "1", "--ca-certs": "BOTH", "--suppress-ragged-eofs": None, "--do-handshake-on-connect": None,
    "--ciphers": "ECDHE+AESGCM", "--http-protocols": "h2", "--http2-cleartext": "x",
    "--http2-max-concurrent-streams": "9",
    "--http2-initial-window-size": "9", "--http2-max-frame-size": "9", "--http2-max-header-list-size": "9",
    "--paste-global": "x", "--permit-obsolete-folding": None, "--strip-header-spaces": None,
    "--permit-unconventional-http-method": None, "--permit-unconventional-http-version": None,
    "--casefold-http-method": None, "--forwarder-headers": "x", "--header-map": "drop", "--asgi-loop": "uvloop",
    "--asgi-lifespan": "off", "--asgi-disconnect-grace-period": "9", "--websocket-max-message-size": "9",
    "--http-parser": "x", "--root-path": "/api", "--dirty-app": "x", "--dirty-workers": "9", "--dirty-timeout": "9",
    "--dirty-threads": "9", "--dirty-graceful-timeout": "9", "--control-socket": "x", "--control-socket-mode": "9",
    "--no-control-socket": None,
}  # fmt: skip

#: What is on without them, and what is taken for the sake of the command line alone.
NOTHING_NEW = {
    *("--access-log", "--proxy-headers", "--server-header", "--date-header", "-k", "--worker-class"),
    *("--access-logfile", "--error-logfile", "--log-file", "--initgroups"),
}


#: With its key.
CERTIFICATE = Path(__file__).parent / "worker" / "certificate.pem"

#: What some settings mean nothing without.
OTHERS = {
    **dict.fromkeys(
        ("ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers"), ("--certfile", "BOTH")
    ),
    "http2": ("--http", "zttp"),
}


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    for name in ("KEY", "BOTH"):
        (tmp_path / name).write_bytes(CERTIFICATE.read_bytes())
    monkeypatch.setenv("A", "")


def settings(*argv: str) -> Settings:
    return settings_of(gather(cli.parse(argv), cli.parse))


def taken(flag: str) -> bool:
    return flag in TAKEN or (flag.replace("--no-", "--", 1) in TAKEN and flag not in NOT_TAKEN)


def test_the_table_has_every_option_of_uvicorn() -> None:
    theirs = {flag for param in uvicorn_command.params for flag in (*param.opts, *param.secondary_opts)}
    assert {flag for flag in theirs if flag.startswith("-")} <= UVICORN.keys()


@pytest.mark.parametrize("flag", sorted(UVICORN.keys() | GUNICORN.keys()))
def test_an_option_works_or_says_what_to_use(flag: str) -> None:
    argv = [flag] if (value := {**GUNICORN, **UVICORN}[flag]) is None else [flag, value]
    if not taken(flag):
        with pytest.raises(SettingsError) as caught:
            cli.parse(["a:b", *argv])
        message = str(caught.value)
        assert message == NOT_TAKEN[flag]
        # More than no: what to use, or that nothing is missed.
        assert any(mark in message for mark in (": ", ", leave it out", " is called ")), message
        return
    line = cli.parse(["a:b", *argv])
    (setting,) = line.keys() - {"app"}
    if setting in OURS:
        return
    others = ["a:b", *OTHERS.get(setting, ())]
    assert (settings(*others, *argv) == settings(*others)) is (flag in NOTHING_NEW), setting


def test_nothing_is_both_taken_and_refused() -> None:
    assert not TAKEN & NOT_TAKEN.keys()


@pytest.mark.parametrize("param", [param for param in uvicorn_command.params if param.default is not None], ids=str)
def test_uvicorns_own_default_is_a_good_value(param: object) -> None:
    """Who writes down what holds anyway, must not be refused for it."""
    flag, default = param.opts[0], param.default  # type: ignore[attr-defined]
    if isinstance(default, str | int | float) and not isinstance(default, bool) and taken(flag) and default != "":
        assert settings("a:b", flag, str(default)).app == "a:b"


def test_a_line_for_gunicorn_as_its_documents_have_it(tmp_path: Path) -> None:
    argv = (
        "-k uvicorn.workers.UvicornWorker -w 4 -b 0.0.0.0:80 -b unix:/run/x.sock --access-logfile - --error-logfile - "
        "--log-level info -t 120 --graceful-timeout 20 --keep-alive 75 --max-requests 1000 --max-requests-jitter 50 "
        f"--forwarded-allow-ips * --chdir {tmp_path} --pythonpath . -e A=b example:create()"
    )
    found = settings(*argv.split())
    assert (found.app, found.factory, found.workers, found.timeout) == ("example:create", True, 4, 120.0)
    assert [str(bind) for bind in found.binds] == ["0.0.0.0:80", "unix:/run/x.sock"]


def test_a_line_for_uvicorn_as_its_documents_have_it() -> None:
    argv = (
        "main:app --host 0.0.0.0 --port 80 --workers 4 --proxy-headers --log-level warning --no-access-log --http h11"
    )
    assert str(settings(*argv.split()).binds[0]) == "0.0.0.0:80"


@pytest.mark.parametrize(
    ("worker_class", "reason"),
    [
        ("uvicorn.workers.UvicornH11Worker", "write --http h11 --loop asyncio instead"),
        ("gevent", "has no counterpart: write gthread for a WSGI application, and leave it out for one of ASGI"),
    ],
)
def test_other_kinds_of_workers(worker_class: str, reason: str) -> None:
    with pytest.raises(SettingsError) as caught:
        settings("a:b", "-k", worker_class)
    assert str(caught.value) == f"--worker-class {worker_class}: {reason}"


@pytest.mark.parametrize(
    ("argv", "threads"),
    [
        (["-k", "sync"], 1),
        (["-k", "gthread"], 1),
        (["-k", "gthread", "--threads", "4"], 4),
        (["-k", "gunicorn.workers.gthread.ThreadWorker"], 1),
    ],
)
def test_gunicorns_workers_for_wsgi(argv: list[str], threads: int) -> None:
    found = settings("a:b", *argv)
    assert (found.interface, found.threads) == ("wsgi", threads)


def test_who_says_nothing_of_workers_says_nothing_of_the_interface() -> None:
    found = settings("a:b")
    assert (found.interface, found.threads) == ("auto", 10)
    assert settings("a:b", "-k", "sync", "--interface", "asgi2").interface == "asgi2"
