"""The command line: one line and exit code 2 for whatever is wrong, and which source wins where they differ.

`run_settings` is replaced by a function that keeps what it was given; what it does has its own tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import uvicorn

import clusterserve
from clusterserve import cli, cpus
from clusterserve.checks import MAX_SECONDS
from clusterserve.errors import BindError, BootError, ClusterError, SettingsError
from clusterserve.options import SPECS
from clusterserve.peers import NOT_TAKEN
from clusterserve.settings import Settings
from clusterserve.surroundings import Reading
from tests.helpers.certificates import Authority


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No variable of ours from outside, and none that an env file set is left behind."""
    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith("CLUSTERSERVE_") or name in ("WEB_CONCURRENCY", "PORT", "FORWARDED_ALLOW_IPS"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(cpus, "survey", lambda: cpus.Cpus(6, "6 usable processors"))
    yield monkeypatch
    os.environ.clear()
    os.environ.update(before)


class Master:
    """Stands in for clusterserve.master.run."""

    def __init__(self) -> None:
        self.result: Callable[[], int] = lambda: 0
        self.settings: Settings | None = None
        self.reread: Callable[[], Reading] | None = None

    def run_settings(self, settings: Settings, *, exits: bool, reread: Callable[[], Reading]) -> int:
        assert exits
        self.reread = reread
        self.settings = settings
        return self.result()


@pytest.fixture(autouse=True)
def master(environment: pytest.MonkeyPatch) -> Master:
    master = Master()
    module = ModuleType("clusterserve.master.run")
    module.run_settings = master.run_settings  # type: ignore[attr-defined]
    environment.setitem(sys.modules, "clusterserve.master.run", module)
    return master


@pytest.fixture
def parsed(master: Master, capsys: pytest.CaptureFixture[str]) -> Callable[..., Settings]:
    def parse(*argv: str) -> Settings:
        master.settings = None
        code = cli.run(argv)
        assert (code, *capsys.readouterr()) == (0, "", "")
        assert master.settings is not None
        return master.settings

    return parse


@pytest.fixture
def refused(master: Master, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The message of a command line that is refused: one line, nothing on stdout, nothing started, exit code 2."""

    def refuse(*argv: str) -> str:
        master.settings = None
        code = cli.run(argv)
        out, err = capsys.readouterr()
        assert (code, out, master.settings) == (2, "", None)
        assert err.startswith("clusterserve: error: ")
        assert err.endswith("\n")
        assert len(err.splitlines()) == 1
        assert "\x1b" not in err
        return err.removeprefix("clusterserve: error: ").removesuffix("\n")

    return refuse


Parsed = Callable[..., Settings]
Refused = Callable[..., str]


# -- commands and APP --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv", [["a:b"], ["run", "a:b"], ["--port", "8000", "a:b"], ["run", "--factory", "a:b"], ["--", "a:b"]]
)
def test_run_is_implied(argv: list[str], parsed: Parsed) -> None:
    assert parsed(*argv).app == "a:b"


@pytest.mark.parametrize("word", ["ctl", "top"])
@pytest.mark.parametrize("rest", [[], ["a:b"], ["--unknown", "x"], ["--help"]])
def test_reserved_commands(word: str, rest: list[str], refused: Refused) -> None:
    assert refused(word, *rest) == f"'{word}' is reserved and not available in this version"


def test_a_reserved_command_behind_an_option(refused: Refused) -> None:
    assert refused("--workers", "2", "top") == "'top' is reserved and not available in this version"
    assert refused("--workers", "2", "exec", "x.py") == "'exec' comes before its options"


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("myapp", "'myapp:app'"),
        ("myapp.py", "'myapp:app'"),
        ("./src/myapp.py", "'src.myapp:app'"),
        ("mysite.asgi", "'mysite.asgi:application'"),
        ("help", "'--help'"),
        ("runn", "'run'"),
        ("confg", "'config'"),
    ],
)
def test_any_other_word_gets_a_suggestion(word: str, hint: str, refused: Refused) -> None:
    assert refused(word) == f"no such command {word!r}; did you mean {hint}?"
    assert refused("--port", "0", word, "--factory") == f"no such command {word!r}; did you mean {hint}?"


def test_a_word_without_a_letter_gets_none(refused: Refused) -> None:
    assert refused("..") == "no such command '..'"


def test_behind_run_a_word_is_an_app(refused: Refused) -> None:
    assert refused("run", "myapp") == "APP=myapp: an app is MODULE:ATTRIBUTE; did you mean 'myapp:app'?"
    assert refused("run", "run").startswith("APP=run: ")


@pytest.mark.parametrize("argv", [[], ["run"], ["--workers", "2"], [""], ["run", " "]])
def test_no_app(argv: list[str], refused: Refused) -> None:
    assert refused(*argv) == "no APP given; say what to serve, as in: clusterserve myapp:app"


def test_two_apps(refused: Refused) -> None:
    assert refused("a:b", "c:d") == "one APP only, and 'c:d' is a second"


def test_an_app_from_the_environment(parsed: Parsed, refused: Refused, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("CLUSTERSERVE_APP", "a:b")
    assert parsed().app == "a:b"
    assert parsed("c:d").app == "c:d"
    environment.setenv("CLUSTERSERVE_APP", "a")
    assert refused() == "CLUSTERSERVE_APP=a: an app is MODULE:ATTRIBUTE; did you mean 'a:app'?"


# -- options -----------------------------------------------------------------------------------------------------------


def test_without_options_the_defaults_hold(parsed: Parsed) -> None:
    assert parsed("a:b") == Settings.create(app="a:b", app_dir=".")


def test_every_option_reaches_its_setting(parsed: Parsed, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    authority = Authority(tmp_path)
    pair = authority.issue("a", password="x")
    options = {
        "--app-dir": (str(tmp_path), "app_dir", str(tmp_path)),
        "--factory": (None, "factory", True),
        "--interface": ("wsgi", "interface", "wsgi"),
        "--threads": ("3", "threads", 3),
        "--env-file": (str(file), "env_file", str(file)),
        "--backlog": ("100", "backlog", 100),
        "--workers": ("3", "workers", 3),
        "--policy": ("least", "policy", "least"),
        "--dispatch": ("connection", "dispatch", "connection"),
        "--max-pending": ("5", "max_pending", 5),
        "--limit-concurrency": ("9", "limit_concurrency", 9),
        "--worker-connections": ("7", "worker_connections", 7),
        "--reuse-port": (None, "reuse_port", True),
        "--max-restarts": ("3", "max_restarts", 3),
        "--on-worker-exit-code": ("7,3", "on_worker_exit_code", (3, 7)),
        "--hooks": ("package.hooks", "hooks", "package.hooks"),
        "--timeout-boot": ("9", "timeout_boot", 9.0),
        "--timeout-graceful-shutdown": ("1.5", "timeout_graceful_shutdown", 1.5),
        "--shutdown-delay": ("2.5", "shutdown_delay", 2.5),
        "--restart-backoff": ("0.2", "restart_backoff", 0.2),
        "--restart-backoff-max": ("3", "restart_backoff_max", 3.0),
        "--reload-surge": ("2", "reload_surge", 2),
        "--timeout": ("20", "timeout", 20.0),
        "--limit-max-requests": ("1000", "limit_max_requests", 1000),
        "--limit-max-requests-jitter": ("50", "limit_max_requests_jitter", 50),
        "--workers-lifetime": ("3600", "workers_lifetime", 3600.0),
        "--workers-lifetime-jitter": ("60.5", "workers_lifetime_jitter", 60.5),
        "--workers-max-rss": ("1.5G", "workers_max_rss", 3 << 29),
        "--rss-sample-interval": ("10", "rss_sample_interval", 10.0),
        "--rss-samples": ("3", "rss_samples", 3),
        "--reload": (None, "reload", True),
        "--reload-dir": (str(tmp_path), "reload_dirs", (str(tmp_path),)),
        "--reload-include": ("*.html", "reload_includes", ("*.html",)),
        "--reload-exclude": ("*_.py", "reload_excludes", ("*_.py",)),
        "--reload-delay": ("0.5", "reload_delay", 0.5),
        "--reload-extra-file": ("site.conf", "reload_extra_files", ("site.conf",)),
        "--debug-port": ("5000", "debug_port", "127.0.0.1:5000"),
        "--debug-wait": (None, "debug_wait", True),
        "--profile": (str(tmp_path / "made"), "profile", str(tmp_path / "made")),
        "--loop": ("asyncio", "loop", "asyncio"),
        "--http": ("zttp", "http", "zttp"),
        "--http2": (None, "http2", True),
        "--timeout-keep-alive": ("7", "timeout_keep_alive", 7),
        "--timeout-queue": ("2.5", "timeout_queue", 2.5),
        "--timeout-request-header": ("0", "timeout_request_header", 0.0),
        "--timeout-request": ("12.5", "timeout_request", 12.5),
        "--timeout-request-body": ("2.5", "timeout_request_body", 2.5),
        "--limit-request-line": ("100", "limit_request_line", 100),
        "--limit-request-fields": ("5", "limit_request_fields", 5),
        "--limit-request-field-size": ("0", "limit_request_field_size", 0),
        "--root-path": ("/api", "root_path", "/api"),
        "--no-server-header": (None, "server_header", False),
        "--no-date-header": (None, "date_header", False),
        "--h11-max-incomplete-event-size": ("99", "h11_max_incomplete_event_size", 99),
        "--lifespan": ("off", "lifespan", "off"),
        "--reset-contextvars": (None, "reset_contextvars", True),
        "--ws": ("wsproto", "ws", "wsproto"),
        "--ws-max-size": ("1", "ws_max_size", 1),
        "--ws-max-queue": ("2", "ws_max_queue", 2),
        "--ws-ping-interval": ("3", "ws_ping_interval", 3.0),
        "--ws-ping-timeout": ("4", "ws_ping_timeout", 4.0),
        "--ws-per-message-deflate": ("false", "ws_per_message_deflate", False),
        "--ssl-certfile": (str(pair.certificate), "ssl_certfile", str(pair.certificate)),
        "--ssl-keyfile": (str(pair.key), "ssl_keyfile", str(pair.key)),
        "--ssl-keyfile-password": ("x", "ssl_keyfile_password", "x"),
        "--ssl-ca-certs": (str(authority.file), "ssl_ca_certs", str(authority.file)),
        "--ssl-cert-reqs": ("2", "ssl_cert_reqs", 2),
        "--ssl-ciphers": ("ECDHE+AESGCM", "ssl_ciphers", "ECDHE+AESGCM"),
        "--ssl-version": ("5", "ssl_version", 5),
        "--no-ssl-reload": (None, "ssl_reload", False),
        "--no-proxy-headers": (None, "proxy_headers", False),
        "--forwarded-allow-ips": ("*", "forwarded_allow_ips", "*"),
        "--proxy-protocol": ("v2", "proxy_protocol", "v2"),
        "--proxy-allow-from": ("10.0.0.0/8", "proxy_allow_from", "10.0.0.0/8"),
        "--log-level": ("trace", "log_level", "trace"),
        "--log-config": (str(file), "log_config", str(file)),
        "--no-access-log": (None, "access_log", False),
        "--access-logformat": ("%(h)s %(L)s", "access_logformat", "%(h)s %(L)s"),
        "--access-log-exclude": ("/health*", "access_log_exclude", ("/health*",)),
        "--no-use-colors": (None, "use_colors", False),
        "--uds-permissions": ("660", "uds_permissions", 0o660),
        "--min-uptime": ("2", "min_uptime", 2.0),
        "--user": ("0", "uid", 0),
        "--group": ("root", "gid", 0),
        "--umask": ("027", "umask", 0o027),
        "--pid": ("/x", "pid", "/x"),
        "--name": ("shop", "name", "shop"),
        "--capture-output": (None, "capture_output", True),
    }
    elsewhere = {"--bind", "--host", "--port", "--uds", "--fd", "--header", "--version", "--help"} | {
        # Of the command line alone: tests/test_sources.py, tests/test_peers.py.
        *("--config", "--check-config", "--print-config", "--chdir", "--env"),
        *("--worker-class", "--initgroups"),
        # Not beside --log-config: tests/test_logs.py.
        *("--log-format", "--access-logfile", "--error-logfile"),
        # It excludes others: below.
        "--preload",
    }
    assert {flag.replace("--no-", "--") for flag in options} == {spec.name for spec in SPECS} - elsewhere

    argv = [text for flag, (value, _, _) in options.items() for text in (flag, value) if text is not None]
    settings = parsed("a:b", *argv)
    assert {name: getattr(settings, name) for _, name, _ in options.values()} == {
        name: value for _, name, value in options.values()
    }


def test_preload(parsed: Parsed) -> None:
    assert parsed("a:b").preload is False
    assert parsed("a:b", "--preload").preload is True


def test_the_positive_half_of_a_pair(parsed: Parsed) -> None:
    assert parsed("a:b").use_colors is None
    assert parsed("a:b", "--use-colors").use_colors is True
    assert parsed("a:b", "--no-access-log", "--access-log").access_log is True


@pytest.mark.parametrize(
    ("alias", "name", "value"),
    [
        ("-w=2", None, None),
        ("-w2", "workers", 2),
        ("--graceful-timeout=3", "timeout_graceful_shutdown", 3.0),
        ("--keep-alive=3", "timeout_keep_alive", 3),
        ("-t5", "timeout", 5.0),
        ("--timeout-worker-healthcheck=5", "timeout", 5.0),
        ("--max-requests=7", "limit_max_requests", 7),
        ("--max-requests-jitter=7", "limit_max_requests_jitter", 7),
        ("--pythonpath=/", "app_dir", "/"),
    ],
)
def test_gunicorns_spellings(alias: str, name: str | None, value: object, parsed: Parsed, refused: Refused) -> None:
    if name is None:
        assert refused("a:b", alias) == "--workers =2: must be a whole number of at least 1, or 'auto'"
    else:
        assert getattr(parsed("a:b", alias), name) == value


def test_headers_are_repeatable(parsed: Parsed) -> None:
    assert parsed("a:b", "--header", "X-A: 1", "--header", "X-B:2:3").headers == (("X-A", "1"), ("X-B", "2:3"))


@pytest.mark.parametrize(
    ("argv", "texts"),
    [
        (["-b", ":1", "--bind", "unix:/x y"], ["0.0.0.0:1", "unix:/x y"]),
        (["--host", "::1", "--port", "0"], ["[::1]:0"]),
        (["--uds", "/x"], ["unix:/x"]),
        (["--fd", "3"], ["fd://3"]),
    ],
)
def test_addresses(argv: list[str], texts: list[str], parsed: Parsed) -> None:
    assert [str(bind) for bind in parsed("a:b", *argv).binds] == texts


EXCLUDE = "exclude each other; several addresses are several --bind"


@pytest.mark.parametrize(
    ("argv", "pair"),
    [
        (["--host", "h", "-b", ":1"], "--bind and --host"),
        (["--uds", "x", "--fd", "3"], "--uds and --fd"),
        (["--port", "1", "--fd", "3"], "--fd and --port"),
        (["--uds", "x", "--port", "1", "--host", "h"], "--uds and --host"),
    ],
)
def test_addresses_that_exclude_each_other(argv: list[str], pair: str, refused: Refused) -> None:
    assert refused("a:b", *argv) == f"{pair} {EXCLUDE}"


COUNT = "must be a whole number of at least 1, or 'auto'"
SIZE = "must be an amount of memory, as in 512M or 1.5G; a bare number counts MiB"
POLICY = "must be one of rr, least, hash, none, or MODULE:ATTRIBUTE"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--workers", "0"], f"--workers 0: {COUNT}"),
        (["--workers", "-1"], f"--workers -1: {COUNT}"),
        (["-w", "x"], f"--workers x: {COUNT}"),
        (["-w", ""], f"--workers '': {COUNT}"),
        (["-w", "\n\x1b[2J"], f"--workers '\\n\\x1b[2J': {COUNT}"),
        (["--port", "99999"], "--port 99999: must be a whole number from 0 to 65535"),
        (["--port", "http"], "--port http: must be a whole number from 0 to 65535"),
        (["--bind", "h:99999"], "--bind h:99999: the port must be a whole number from 0 to 65535"),
        (["-b", ":1", "-b", ":1"], "--bind 0.0.0.0:1: is given twice"),
        (["--fd", "-1"], "--fd -1: must be a whole number of at least 0"),
        (["--uds", ""], "--uds '': needs the path of a socket, or '@' and a name"),
        (["--policy", "lest"], f"--policy lest: {POLICY}; did you mean 'least'?"),
        (["--policy", "robin"], f"--policy robin: {POLICY}"),
        (
            ["--policy", "none", "--dispatch", "request"],
            "--dispatch request: needs a policy: under 'none' workers keep what they accept",
        ),
        (["--dispatch", "autos"], "--dispatch autos: must be one of auto, connection, request; did you mean 'auto'?"),
        (["--interface", "wsgi2"], "--interface wsgi2: must be one of auto, asgi3, asgi2, wsgi; did you mean 'wsgi'?"),
        (["--threads", "0"], "--threads 0: must be a whole number of at least 1"),
        (["--log-level", "Loud"], "--log-level Loud: must be one of critical, error, warning, info, debug, trace"),
        (["--log-config", "no such"], "--log-config 'no such': there is no such file"),
        (["--env-file", "no-such"], "--env-file no-such: there is no such file"),
        (["--app-dir", "no-such"], "--app-dir no-such: there is no such directory"),
        (
            ["--pythonpath", "a,b"],
            "--app-dir a,b: there is no such directory; it is one alone, others stand in $PYTHONPATH",
        ),
        (["--header", "X"], "--header X: a header is 'Name:Value'"),
        (["--ws-per-message-deflate", "2"], "--ws-per-message-deflate 2: must be true or false"),
        (["--restart-backoff", "20"], "--restart-backoff 20.0: must not be above --restart-backoff-max, which is 15"),
        (["--workers-max-rss", "lots"], f"--workers-max-rss lots: {SIZE}"),
        (["-m", "18"], '--umask 18: must be an octal number from 0 to 777, as in "660" or 0o660'),
        (["--user", "no-such-user"], "--user no-such-user: there is no such user"),
        (["-g", "no-such-group"], "--group no-such-group: there is no such group"),
        (["-t", "-1"], f"--timeout -1: must be a number of seconds from 0 to {MAX_SECONDS}"),
        (["--reload-dir", ".", "--reload-dir", "x"], "--reload-dir x: there is no such directory"),
        (["--http2"], "--http2: needs the HTTP implementation that has it, which is zttp"),
        (
            ["--keyfile", __file__],
            f"--ssl-keyfile {__file__}: needs --ssl-certfile: without a certificate there is no TLS",
        ),
        (["-b", "a:1,b:2"], "--bind a:1,b:2: several addresses are several --bind, or a list"),
        (["--reload-surge", "0"], "--reload-surge 0: must be a whole number of at least 1"),
        (["--restart-backoff-max", ".01"], "restart_backoff=0.1: must not be above restart_backoff_max, which is 0.01"),
        (["--port"], "option '--port' requires an argument"),
        (["--factory=1"], "option '--factory' does not take a value"),
        (["--polcy", "rr"], "no such option --polcy; did you mean '--policy'?"),
        (["--grace-timeout", "3"], "no such option --grace-timeout; did you mean '--graceful-timeout'?"),
        (["--relod"], "no such option --relod; did you mean '--reload'?"),
        (["--qqq"], "no such option --qqq"),
        (["-x"], "no such option -x"),
    ],
)
def test_a_bad_option_is_named_with_its_value(argv: list[str], message: str, refused: Refused) -> None:
    assert refused("a:b", *argv) == message


@pytest.mark.parametrize(
    ("app", "message"),
    [
        ("./shop.py:app", "APP=./shop.py:app: a module has a name, and no path: did you mean 'shop:app'?"),
        ("web/shop:app", "APP=web/shop:app: a module has a name, and no path: did you mean 'web.shop:app'?"),
        (
            "/srv/shop.py:a",
            "APP=/srv/shop.py:a: a module has a name, and no path: did you mean 'shop:a' with --app-dir /srv?",
        ),
        ("shop.py:app", "APP=shop.py:app: a module has a name, and no path: did you mean 'shop:app'?"),
        ("a:make('b')", "APP=a:make('b'): a factory is called without arguments, as in MODULE:FACTORY()"),
        ("../shop.py", "no such command '../shop.py'; did you mean 'shop:app' with --app-dir ..?"),
    ],
)
def test_an_application_is_no_file(
    app: str, message: str, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shop.py").touch()
    monkeypatch.chdir(tmp_path)
    assert refused(app) == message


def test_a_command_of_other_programs_is_not_taken_for_an_application(refused: Refused) -> None:
    assert refused("serve", "a:b") == "no such command 'serve'; did you mean 'clusterserve a:b'?"


@pytest.mark.parametrize("flag", sorted(NOT_TAKEN))
def test_options_of_others_and_of_later_versions_are_never_ignored(flag: str, refused: Refused) -> None:
    assert refused("a:b", flag, "1") == NOT_TAKEN[flag]
    assert NOT_TAKEN[flag].startswith(flag)


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_complete_and_grouped(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([flag]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("Usage: clusterserve [run|config] MODULE:ATTRIBUTE [OPTIONS]\n")
    titles = [line for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    expected = [
        "Configuration",
        "Application",
        "Binding",
        "Cluster",
        "Workers' health",
        "Development",
        "Debugging",
        "HTTP",
        "WebSocket",
        "TLS",
        "Proxies",
        "Logging",
        "Process",
        "Other",
    ]
    assert titles == [f"{title}:" for title in expected]
    words = out.replace(",", " ").split()
    assert [flag for spec in SPECS for flag in spec.flags if flag not in words] == []
    assert "--no-access-log" in words
    assert "[default: 2048]" in out
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("flag", ["--version", "-v"])
def test_version_names_ours_and_uvicorns(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([flag]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"Running clusterserve {clusterserve.__version__} with uvicorn {uvicorn.__version__}, ")
    assert (out.count("\n"), err) == (1, "")


# -- the environment ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "setting", "value"),
    [
        ("WORKERS", "3", "workers", 3),
        ("WORKERS", "auto", "workers", 6),
        ("POLICY", "least", "policy", "least"),
        ("SCHED_POLICY", "none", "policy", "none"),
        ("FACTORY", "1", "factory", True),
        ("FACTORY", "false", "factory", False),
        ("ACCESS_LOG", "0", "access_log", False),
        ("USE_COLORS", "yes", "use_colors", True),
        ("WS_PER_MESSAGE_DEFLATE", "off", "ws_per_message_deflate", False),
        ("TIMEOUT_GRACEFUL_SHUTDOWN", "2", "timeout_graceful_shutdown", 2.0),
        ("GRACEFUL_TIMEOUT", "2", "timeout_graceful_shutdown", 2.0),
        ("KEEP_ALIVE", "2", "timeout_keep_alive", 2),
        ("ROOT_PATH", "/api", "root_path", "/api"),
        ("HEADER", "X-A: b c", "headers", (("X-A", "b c"),)),
        ("HEADER", "X-A: b\nX-B: c\n", "headers", (("X-A", "b"), ("X-B", "c"))),
        ("LOG_LEVEL", "debug", "log_level", "debug"),
        ("FORWARDED_ALLOW_IPS", "*", "forwarded_allow_ips", "*"),
    ],
)
def test_every_option_is_a_variable(
    name: str, text: str, setting: str, value: object, parsed: Parsed, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv(f"CLUSTERSERVE_{name}", text)
    assert getattr(parsed("a:b"), setting) == value


def test_blank_variables_are_as_good_as_none(parsed: Parsed, environment: pytest.MonkeyPatch) -> None:
    expected = parsed("a:b")
    variables = [name for spec in SPECS for name in spec.variables]
    outside = ["WEB_CONCURRENCY", "PORT", "FORWARDED_ALLOW_IPS", "CLUSTERSERVE_SCHED_POLICY", "CLUSTERSERVE_CMD_ARGS"]
    for blank in ("", " ", "\n"):
        for name in [*variables, *outside, "CLUSTERSERVE_APP", "CLUSTERSERVE_RELOAD"]:
            environment.setenv(name, blank)
        assert parsed("a:b") == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"CLUSTERSERVE_WORKERS": "0"}, f"CLUSTERSERVE_WORKERS=0: {COUNT}"),
        ({"WEB_CONCURRENCY": "x"}, f"WEB_CONCURRENCY='x': {COUNT}"),
        # What Kubernetes sets for a service of our name.
        (
            {"CLUSTERSERVE_PORT_80_TCP": "tcp://10.0.0.1:80", "CLUSTERSERVE_SERVICE_HOST": "10.0.0.1", "PORT": "x"},
            "PORT='x': must be a whole number from 0 to 65535",
        ),
        ({"PORT": "x"}, "PORT='x': must be a whole number from 0 to 65535"),
        # What Kubernetes sets for a service of our name.
        (
            {"CLUSTERSERVE_PORT": "tcp://10.0.0.1:80"},
            "CLUSTERSERVE_PORT=tcp://10.0.0.1:80: must be a whole number from 0 to 65535",
        ),
        ({"CLUSTERSERVE_BIND": ":1 :x"}, "CLUSTERSERVE_BIND=:x: the port must be a whole number from 0 to 65535"),
        ({"CLUSTERSERVE_FACTORY": "maybe"}, "CLUSTERSERVE_FACTORY=maybe: must be true or false"),
        ({"CLUSTERSERVE_POLICY": "lest"}, f"CLUSTERSERVE_POLICY=lest: {POLICY}; did you mean 'least'?"),
        (
            {"CLUSTERSERVE_POLICY": "rr", "CLUSTERSERVE_SCHED_POLICY": "none"},
            "CLUSTERSERVE_POLICY=rr and CLUSTERSERVE_SCHED_POLICY=none contradict each other: unset one of them",
        ),
        (
            {"CLUSTERSERVE_UDS": "/x", "CLUSTERSERVE_HOST": "h"},
            f"CLUSTERSERVE_UDS and CLUSTERSERVE_HOST {EXCLUDE}",
        ),
        ({"CLUSTERSERVE_ENV_FILE": "no-such"}, "CLUSTERSERVE_ENV_FILE=no-such: there is no such file"),
        ({"CLUSTERSERVE_SPEW": "1"}, f"CLUSTERSERVE_SPEW is set, but {NOT_TAKEN['--spew']}"),
        (
            {"CLUSTERSERVE_WOKERS": "4"},
            "CLUSTERSERVE_WOKERS is set, but there is no such option; did you mean 'CLUSTERSERVE_WORKERS'?",
        ),
        ({"CLUSTERSERVE_CMD_ARGS": "-w 0"}, f"CLUSTERSERVE_CMD_ARGS --workers 0: {COUNT}"),
        ({"CLUSTERSERVE_CMD_ARGS": "--x"}, "in CLUSTERSERVE_CMD_ARGS: no such option --x"),
        ({"CLUSTERSERVE_CMD_ARGS": "--uds '"}, "in CLUSTERSERVE_CMD_ARGS: No closing quotation"),
        (
            {"CLUSTERSERVE_CMD_ARGS": "--version"},
            "in CLUSTERSERVE_CMD_ARGS: --check-config, --print-config, --version and --help belong on the command line",
        ),
        (
            {"CLUSTERSERVE_CMD_ARGS": "--fd 3 --uds x"},
            f"CLUSTERSERVE_CMD_ARGS --uds and CLUSTERSERVE_CMD_ARGS --fd {EXCLUDE}",
        ),
    ],
)
def test_a_bad_variable_is_named(
    variables: dict[str, str], message: str, refused: Refused, environment: pytest.MonkeyPatch
) -> None:
    for name, text in variables.items():
        environment.setenv(name, text)
    assert refused("a:b") == message


def test_a_variable_that_is_outranked_does_no_harm(parsed: Parsed, environment: pytest.MonkeyPatch) -> None:
    for name in ("CLUSTERSERVE_WORKERS", "CLUSTERSERVE_POLICY", "CLUSTERSERVE_PORT", "WEB_CONCURRENCY", "PORT"):
        environment.setenv(name, "nonsense")
    settings = parsed("a:b", "-w", "1", "--policy", "hash", "--port", "1")
    assert (settings.workers, settings.policy, str(settings.binds[0])) == (1, "hash", "127.0.0.1:1")


def test_the_order_of_the_sources(parsed: Parsed, environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment.chdir(tmp_path)
    found = [parsed("a:b").workers]
    environment.setenv("WEB_CONCURRENCY", "1")
    found.append(parsed("a:b").workers)
    (tmp_path / "clusterserve.toml").write_text("workers = 2\n")
    found.append(parsed("a:b").workers)
    environment.setenv("CLUSTERSERVE_WORKERS", "3")
    found.append(parsed("a:b").workers)
    environment.setenv("CLUSTERSERVE_CMD_ARGS", "--workers 4")
    found.append(parsed("a:b").workers)
    found.append(parsed("a:b", "--workers", "5").workers)
    found.append(parsed("a:b", "--workers", "auto").workers)
    assert found == [6, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("argv", "variables", "source"),
    [
        (["-w", "2"], {}, "--workers"),
        ([], {"CLUSTERSERVE_WORKERS": "2"}, "CLUSTERSERVE_WORKERS"),
        ([], {"CLUSTERSERVE_CMD_ARGS": "-w 2"}, "CLUSTERSERVE_CMD_ARGS --workers"),
        ([], {"WEB_CONCURRENCY": "2"}, "WEB_CONCURRENCY"),
        ([], {}, "6 usable processors"),
        (["-w", "auto"], {"WEB_CONCURRENCY": "2"}, "6 usable processors"),
    ],
)
def test_where_the_worker_count_is_from(
    argv: list[str], variables: dict[str, str], source: str, parsed: Parsed, environment: pytest.MonkeyPatch
) -> None:
    for name, text in variables.items():
        environment.setenv(name, text)
    assert parsed("a:b", *argv).workers_source == source


@pytest.mark.parametrize(
    ("argv", "variables", "texts"),
    [
        ([], {"CLUSTERSERVE_BIND": ":1 unix:/x"}, ["0.0.0.0:1", "unix:/x"]),
        (["--port", "1"], {"CLUSTERSERVE_BIND": ":2"}, ["127.0.0.1:1"]),
        (["--bind", ":1"], {"CLUSTERSERVE_BIND": ":2"}, ["0.0.0.0:1"]),
        (["--bind", ":1"], {"CLUSTERSERVE_PORT": "2", "CLUSTERSERVE_UDS": "x"}, ["0.0.0.0:1"]),
        (["--fd", "3"], {"CLUSTERSERVE_HOST": "h", "PORT": "2"}, ["fd://3"]),
        (["--port", "1"], {"CLUSTERSERVE_HOST": "h"}, ["h:1"]),
        (["--host", "h"], {"CLUSTERSERVE_PORT": "1"}, ["h:1"]),
        (["--host", "h"], {"CLUSTERSERVE_PORT": "1", "CLUSTERSERVE_HOST": "g"}, ["h:1"]),
        (["--host", "h"], {"PORT": "1"}, ["h:1"]),
        ([], {"CLUSTERSERVE_HOST": "h", "PORT": "1"}, ["h:1"]),
        ([], {"PORT": "1"}, ["0.0.0.0:1"]),
        ([], {"CLUSTERSERVE_UDS": "/x", "PORT": "1"}, ["unix:/x"]),
        ([], {"CLUSTERSERVE_CMD_ARGS": "--uds /x", "CLUSTERSERVE_PORT": "1"}, ["unix:/x"]),
        (["--host", "h"], {"CLUSTERSERVE_CMD_ARGS": "--port 5", "CLUSTERSERVE_PORT": "1"}, ["h:5"]),
        (["-b", ":1"], {"CLUSTERSERVE_CMD_ARGS": "-b :2"}, ["0.0.0.0:1"]),
    ],
)
def test_an_address_that_ranks_higher_replaces_the_others(
    argv: list[str], variables: dict[str, str], texts: list[str], parsed: Parsed, environment: pytest.MonkeyPatch
) -> None:
    for name, text in variables.items():
        environment.setenv(name, text)
    assert [str(bind) for bind in parsed("a:b", *argv).binds] == texts


def test_cmd_args_may_name_the_app_and_quote(parsed: Parsed, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("CLUSTERSERVE_CMD_ARGS", "a:b --header 'X-A: b c' --factory")
    settings = parsed()
    assert (settings.app, settings.headers, settings.factory) == ("a:b", (("X-A", "b c"),), True)


# -- the env file ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["option", "variable", "cmd_args"])
def test_the_env_file_sets_what_is_not_set(
    way: str, parsed: Parsed, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "app.env"
    file.write_text("APP_SECRET=from the file\nHOME=/changed\nWEB_CONCURRENCY=3\nCLUSTERSERVE_POLICY=least\n")
    environment.setenv("HOME", "/real")
    argv = []
    if way == "option":
        argv = ["--env-file", str(file)]
    elif way == "variable":
        environment.setenv("CLUSTERSERVE_ENV_FILE", str(file))
    else:
        environment.setenv("CLUSTERSERVE_CMD_ARGS", f"--env-file '{file}'")
    settings = parsed("a:b", *argv)
    # The workers are children: they inherit what is set here.
    assert os.environ["APP_SECRET"] == "from the file"
    assert os.environ["HOME"] == "/real"
    assert (settings.workers, settings.policy, settings.env_file) == (3, "least", str(file))


def test_an_option_wins_over_the_env_file(parsed: Parsed, tmp_path: Path) -> None:
    file = tmp_path / "app.env"
    file.write_text("CLUSTERSERVE_WORKERS=3\nCLUSTERSERVE_CMD_ARGS=--backlog 5\n")
    settings = parsed("a:b", "--env-file", str(file), "-w", "1")
    assert (settings.workers, settings.backlog) == (1, 5)


def test_an_env_file_that_is_no_text(refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "app.env"
    file.write_bytes(b"A=\xff\xfe\n")
    assert refused("a:b", "--env-file", str(file)).startswith(f"--env-file {file}: cannot be read: ")
    assert refused("a:b", "--env-file", str(tmp_path)) == f"--env-file {tmp_path}: there is no such file"


# -- what comes of it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 3, 130])
def test_main_exits_with_what_the_cluster_returns(code: int, master: Master, environment: pytest.MonkeyPatch) -> None:
    master.result = lambda: code
    environment.setattr(sys, "argv", ["clusterserve", "a:b"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ClusterError("went wrong"), 1, "went wrong"),
        (BindError(98, "cannot listen on :1: address in use", ":1"), 1, "cannot listen on :1: address in use"),
        (SettingsError("no such policy"), 2, "no such policy"),
        (BootError("cannot import a", "Traceback:\n  boom\n"), 3, "cannot import a\nTraceback:\n  boom"),
    ],
)
def test_an_error_of_the_cluster_is_told_once_and_gives_the_code(
    error: ClusterError, code: int, text: str, master: Master, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise error

    master.result = fail
    assert cli.run(["a:b"]) == code
    assert capsys.readouterr() == ("", f"clusterserve: error: {text}\n")


def test_an_interrupt_before_the_master_listens_to_signals(master: Master, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> int:
        raise KeyboardInterrupt

    master.result = interrupt
    assert cli.run(["a:b"]) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_platforms_get_one_sentence(platform: str) -> None:
    with pytest.raises(ClusterError, match=f"^clusterserve runs on Linux only, and this is {platform}$") as caught:
        cli.check_platform(platform)
    assert caught.value.exit_code == 1


def test_the_platform_is_checked_before_anything_starts(
    master: Master, environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment.setattr(cli.sys, "platform", "darwin")
    assert cli.run(["a:b"]) == 1
    assert capsys.readouterr().err == "clusterserve: error: clusterserve runs on Linux only, and this is darwin\n"
    assert master.settings is None


# -- as a program ------------------------------------------------------------------------------------------------------


def program(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=60, check=False)


def test_python_m_clusterserve_is_the_same() -> None:
    done = program("-m", "clusterserve", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, cli.version() + "\n", "")
    done = program("-m", "clusterserve", "top")
    line = "clusterserve: error: 'top' is reserved and not available in this version\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


def test_an_argument_that_is_not_utf_8_is_refused_in_one_line() -> None:
    argv = [sys.executable.encode(), b"-m", b"clusterserve", b"a:b", b"-w", b"\xff"]
    done = subprocess.run(argv, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert done.stderr.startswith(b"clusterserve: error: --workers '\\udcff': must be")


def test_start_up_stays_light() -> None:
    heavy = "{'uvicorn', 'asyncio', 'dotenv', 'difflib', 'logging', 'socket', 'ipaddress'}"
    # Not what was there before: coverage, when it watches, needs some of these itself.
    source = "import sys; before = set(sys.modules); import clusterserve.cli; "
    done = program("-c", f"{source}print(sorted({heavy} & (set(sys.modules) - before)))")
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_what_is_read_again_is_what_a_start_would_read(
    parsed: Parsed, master: Master, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment.chdir(tmp_path)
    (tmp_path / "site").mkdir()
    file = tmp_path / "site" / "clusterserve.toml"
    file.write_text("workers = 2\n")
    assert parsed("a:b", "--chdir", "site").workers == 2

    def again() -> int:
        assert master.reread is not None
        read = master.reread()
        read.before.close()
        return read.settings.workers

    file.write_text("workers = 3\n")
    # A relative directory is relative to where the command was typed, each time.
    assert again() == 3
    file.write_text("workers = 0\n")
    with pytest.raises(SettingsError):
        again()
    assert Path.cwd() == tmp_path / "site"
    # A release that was removed, and put there anew.
    shutil.rmtree(tmp_path / "site")
    with pytest.raises(SettingsError, match="there is no such directory"):
        again()
    (tmp_path / "site").mkdir()
    file.write_text("workers = 4\n")
    assert again() == 4
    assert Path.cwd() == tmp_path / "site"


def test_what_was_read_again_can_be_undone(
    parsed: Parsed, master: Master, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment.chdir(tmp_path)
    environment.setattr(os, "environ", os.environ.copy())
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
    file = tmp_path / "clusterserve.toml"
    file.write_text('env = ["A=1"]\nchdir = "one"\n')
    parsed("a:b")
    assert master.reread is not None
    descriptors = os.listdir("/proc/self/fd")
    file.write_text('env = ["B=2"]\nchdir = "two"\n')
    first = master.reread().before
    file.write_text('env = ["A=3", "B=3"]\nchdir = "three"\n')
    second = master.reread().before
    assert (Path.cwd().name, os.environ["A"], os.environ["B"]) == ("three", "3", "3")
    second.close()
    # The name of where it was means nothing any more.
    (tmp_path / "one").rename(tmp_path / "uno")
    first.restore()
    assert (Path.cwd().name, os.environ["A"], os.environ.get("B")) == ("uno", "1", None)
    assert os.listdir("/proc/self/fd") == descriptors


def test_a_directory_that_was_removed(refused: Refused, environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    environment.chdir(tmp_path / "site")
    (tmp_path / "site").rmdir()
    assert refused("a:b") == "the working directory has been removed; start in one that exists"


# -- exec --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "program", "args"),
    [
        (["pyproject.toml"], "pyproject.toml", ()),
        (["-w", "3", "--log-level=debug", "pyproject.toml", "-w", "7"], "pyproject.toml", ("-w", "7")),
        (["-w3", "--no-use-colors", "pyproject.toml", "--", "x"], "pyproject.toml", ("--", "x")),
        (["--policy", "least", "-m", "package.tool", "-m", "x"], "-m package.tool", ("-m", "x")),
        (["--", "pyproject.toml", "x"], "pyproject.toml", ("x",)),
    ],
)
def test_exec(argv: list[str], program: str, args: tuple[str, ...], parsed: Parsed) -> None:
    settings = parsed("exec", *argv)
    assert (settings.exec, settings.args, settings.app, settings.binds) == (program, args, "", ())
    assert not settings.borrows


def test_exec_overlooks_what_variables_say_for_applications(parsed: Parsed, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("CLUSTERSERVE_APP", "a:b")
    environment.setenv("CLUSTERSERVE_BIND", ":1")
    environment.setenv("CLUSTERSERVE_WORKERS", "3")
    settings = parsed("exec", "pyproject.toml")
    assert (settings.app, settings.binds, settings.workers) == ("", (), 3)


def test_exec_has_a_help_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["exec", "--help"]) == 0
    help = capsys.readouterr().out
    assert help.startswith("Usage: clusterserve exec [OPTIONS] {SCRIPT | -m MODULE} [ARGUMENTS]")
    assert "--policy" in help
    assert "--bind" not in help


def test_a_ctrl_c_before_anybody_listens_is_no_traceback() -> None:
    """While modules are imported, and while files are read."""
    for moment in ("clusterserve.cli", "clusterserve.sources"):
        program = f"""
            import sys
            class Interrupt:
                def find_spec(self, name, path=None, target=None):
                    if name == {moment!r}:
                        raise KeyboardInterrupt
            sys.meta_path.insert(0, Interrupt())
            from clusterserve.__main__ import main
            main()
        """
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")
