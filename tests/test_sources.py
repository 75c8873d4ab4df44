"""Where settings are written: the file above all, and what follows from where something was written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clusterserve import cli, cpus
from clusterserve.errors import SettingsError
from clusterserve.options import ONCE, SPECS
from clusterserve.peers import NOT_TAKEN
from clusterserve.report import report
from clusterserve.settings import Settings
from clusterserve.sources import Given, Layer, gather, settings_of, unread
from clusterserve.toml import BadTomlError, parse

COUNT = "must be a whole number of at least 1, or 'auto'"
POLICY = "must be one of rr, least, hash, none, or MODULE:ATTRIBUTE"
EXCLUDE = "exclude each other; several addresses are several --bind"


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """An empty directory and an environment with nothing of ours; afterwards all is as it was."""
    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith("CLUSTERSERVE_") or name in ("WEB_CONCURRENCY", "PORT", "FORWARDED_ALLOW_IPS"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(cpus, "survey", lambda: cpus.Cpus(6, "6 usable processors"))
    monkeypatch.chdir(tmp_path)
    yield monkeypatch
    os.environ.clear()
    os.environ.update(before)


def layer(*argv: str) -> Layer:
    return gather(cli.parse(argv), cli.parse)


def settings(*argv: str) -> Settings:
    return settings_of(layer(*argv))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The message of a start that is refused: one line, and exit code 2."""

    def refuse(*argv: str) -> str:
        code = cli.run(argv)
        out, err = capsys.readouterr()
        assert (code, out) == (2, "")
        assert len(err.splitlines()) == 1
        return err.removeprefix("clusterserve: error: ").removesuffix("\n")

    return refuse


Refused = Callable[..., str]


def write(text: str, name: str = "clusterserve.toml") -> None:
    Path(name).write_text(text)


# -- finding the file --------------------------------------------------------------------------------------------------


def test_the_file_in_this_directory_is_read() -> None:
    write('app = "a:b"\nworkers = 3\nbind = ":1"\n')
    found = settings()
    assert (found.app, found.workers, str(found.binds[0])) == ("a:b", 3, "0.0.0.0:1")
    assert found.workers_source == "clusterserve.toml: workers"


def test_the_projects_file_is_second() -> None:
    write('[tool.other]\n[tool.clusterserve]\napp = "a:b"\n', "pyproject.toml")
    assert settings().app == "a:b"
    write("workers = 2")
    assert "app" not in layer()


@pytest.mark.parametrize("text", ["[tool.other]\nworkers = 1\n", "this is = no [ TOML"])
def test_a_project_that_does_not_name_us_is_no_concern(text: str) -> None:
    write(text, "pyproject.toml")
    assert settings("a:b").workers == 6


def test_a_file_may_be_named() -> None:
    Path("etc").mkdir()
    write("workers = 2")
    write("workers = 3", "etc/web.toml")
    assert settings("a:b", "--config", "etc/web.toml").workers == 3
    assert settings("a:b", "-c", str(Path("etc/web.toml").absolute())).workers == 3
    write("[tool.clusterserve]\nworkers = 4", "etc/pyproject.toml")
    assert settings("a:b", "-cetc/pyproject.toml").workers == 4


def test_a_file_may_be_named_by_a_variable(place: pytest.MonkeyPatch) -> None:
    write("workers = 3", "web.toml")
    place.setenv("CLUSTERSERVE_CONFIG", "web.toml")
    assert settings("a:b").workers == 3


def test_an_empty_file_switches_the_others_off() -> None:
    write("workers = 3")
    assert settings("a:b", "--config", "/dev/null").workers == 6


# -- what is in it -----------------------------------------------------------------------------------------------------


def test_keys_are_options_without_dashes_or_the_settings_names() -> None:
    write(
        'max-requests = 5\ngraceful_timeout = 2.5\npythonpath = "/"\nheader = "X-A: b"\nws_per_message_deflate = false'
    )
    found = settings("a:b")
    assert (found.limit_max_requests, found.timeout_graceful_shutdown, found.app_dir) == (5, 2.5, "/")
    assert (found.headers, found.ws_per_message_deflate) == ((("X-A", "b"),), False)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("access_log = false", "access_log", False),
        ("use_colors = true", "use_colors", True),
        ("ws_ping_interval = 1", "ws_ping_interval", 1.0),
        ('workers_max_rss = "1G"', "workers_max_rss", 1 << 30),
        ('headers = ["X-A: b", "X-B: c"]', "headers", (("X-A", "b"), ("X-B", "c"))),
        ('[headers]\nX-A = "b"', "headers", (("X-A", "b"),)),
        ('policy = "least"', "policy", "least"),
        ('forwarded_allow_ips = ["10.0.0.1", "10.0.0.2"]', "forwarded_allow_ips", "10.0.0.1,10.0.0.2"),
    ],
)
def test_values_have_their_own_types(text: str, name: str, value: object) -> None:
    write(text)
    assert getattr(settings("a:b"), name) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wokers = 4", "there is no setting 'wokers'; did you mean 'workers'?"),
        ("gracful-timeout = 4", "there is no setting 'gracful-timeout'; did you mean 'graceful_timeout'?"),
        ("qqqq = 4", "there is no setting 'qqqq'"),
        ("version = true", "there is no setting 'version'; did you mean 'ssl_version'?"),
        ("workers = 0", f"workers=0: {COUNT}"),
        ("workers = true", f"workers=True: {COUNT}"),
        ("workers = [1]", f"workers=[1]: {COUNT}"),
        ("workers = 1979-05-27", f"workers=1979-05-27: {COUNT}"),
        ("access_log = 1", "access_log=1: must be true or false"),
        ("bind = 8000", "bind=8000: must be a text or a Bind"),
        ('bind = ":x"', "bind=:x: the port must be a whole number from 0 to 65535"),
        ('policy = "lest"', f"policy=lest: {POLICY}; did you mean 'least'?"),
        ('uds = "x"\nport = 1', f"uds and clusterserve.toml: port {EXCLUDE}"),
        ("env_file = 1\nenv-file = 2", "env_file and env-file are two names of one setting"),
        ("spew = true", f"spew is set, but {NOT_TAKEN['--spew']}"),
        ('chdir = "nowhere"', "chdir=nowhere: there is no such directory"),
        ('env_file = "nowhere"', "env_file=nowhere: there is no such file"),
        ('env = ["A"]', "env=A: a variable is NAME=VALUE"),
        ("[env]\nA = 1", "env=A=1: a variable is NAME=VALUE"),
    ],
)  # fmt: skip
def test_a_bad_file_costs_one_line(text: str, message: str, refused: Refused) -> None:
    write(text)
    assert refused("a:b") == f"clusterserve.toml: {message}"


def test_a_file_that_is_no_toml(refused: Refused) -> None:
    write("workers 4")
    # The words are those of the library, and not the same in all of its versions.
    with pytest.raises(BadTomlError, match=r"after a key .*at line 1, column 9") as said:
        parse("workers 4")
    assert refused("a:b") == f"clusterserve.toml is not TOML: {said.value}"


def test_a_bad_project_that_names_us(refused: Refused) -> None:
    write("[tool.clusterserve\n", "pyproject.toml")
    assert refused("a:b").startswith("pyproject.toml is not TOML: ")
    write("[tool]\nclusterserve = 1\n", "pyproject.toml")
    assert refused("a:b") == "pyproject.toml: tool.clusterserve must be a table"


PYTHON = "a Python file is not read; write its settings to a clusterserve.toml (docs/settings.md)"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.toml", "--config nowhere.toml: cannot be read: no such file or directory"),
        (".", "--config .: cannot be read: is a directory"),
        ("latin.toml", "--config latin.toml: cannot be read: it is not utf-8"),
        ("gunicorn.conf.py", f"--config gunicorn.conf.py: {PYTHON}"),
        ("python:package.conf", f"--config python:package.conf: {PYTHON}"),
    ],
)
def test_a_file_that_cannot_be_used(name: str, message: str, refused: Refused) -> None:
    Path("latin.toml").write_bytes(b"app = '\xe9'")
    assert refused("a:b", "--config", name) == message


# -- directory and variables -------------------------------------------------------------------------------------------


def test_the_directory_is_changed_first(tmp_path: Path) -> None:
    Path("site").mkdir()
    write("workers = 2", "site/clusterserve.toml")
    write("workers = 3", "outside.toml")
    assert settings("a:b", "--chdir", "site").workers == 2
    assert Path.cwd() == tmp_path / "site"
    os.chdir(tmp_path)
    # As it was typed: in the directory where it was.
    assert settings("a:b", "--chdir", "site", "--config", "outside.toml").workers == 3


def test_a_file_may_change_the_directory(tmp_path: Path) -> None:
    Path("site").mkdir()
    write('chdir = "site"\nenv_file = "site.env"\n')
    write("WEB_CONCURRENCY=4\n", "site/site.env")
    assert settings("a:b").workers == 4
    assert Path.cwd() == tmp_path / "site"


def test_an_env_file_named_in_the_file_may_say_what_variables_say() -> None:
    write('env_file = "web.env"\nbacklog = 7\n')
    write("CLUSTERSERVE_WORKERS=3\nCLUSTERSERVE_BACKLOG=8\n", "web.env")
    found = settings("a:b")
    assert (found.workers, found.backlog) == (3, 8)


def test_variables_for_the_application(place: pytest.MonkeyPatch) -> None:
    place.setenv("A", "old")
    settings("a:b", "-e", "A=new", "--env", "B=x=y")
    assert (os.environ["A"], os.environ["B"]) == ("new", "x=y")
    write('[env]\nC = "from the file"\n')
    settings("a:b")
    assert os.environ["C"] == "from the file"


@pytest.mark.parametrize("text", ["A", "=b", ""])
def test_a_variable_needs_a_name_and_a_value(text: str, refused: Refused) -> None:
    assert refused("a:b", "-e", text).endswith(": a variable is NAME=VALUE")


def test_a_policy_in_the_file_ranks_below_both_variables(place: pytest.MonkeyPatch) -> None:
    write('policy = "hash"')
    assert settings("a:b").policy == "hash"
    place.setenv("CLUSTERSERVE_SCHED_POLICY", "least")
    assert settings("a:b").policy == "least"


def test_an_address_in_the_file_gives_way_as_a_whole(place: pytest.MonkeyPatch) -> None:
    write('host = "h"\nport = 1\n')
    assert [str(bind) for bind in settings("a:b").binds] == ["h:1"]
    assert [str(bind) for bind in settings("a:b", "--port", "2").binds] == ["h:2"]
    assert [str(bind) for bind in settings("a:b", "--uds", "/x").binds] == ["unix:/x"]
    place.setenv("PORT", "5")
    assert [str(bind) for bind in settings("a:b").binds] == ["h:1"]


def test_every_setting_can_be_written_in_the_file() -> None:
    """The report of the defaults, with a key that is not set left out, is such a file."""
    expected = settings("a:b")
    write(report(layer("a:b")))
    assert settings() == Settings(**{**vars(expected), "workers_source": "clusterserve.toml: workers"})


# -- the report --------------------------------------------------------------------------------------------------------


def test_the_report_saved_as_a_file_gives_the_same_settings(place: pytest.MonkeyPatch) -> None:
    argv = [
        *("a:make()", "-b", ":1", "-b", "unix:/x y", "--header", 'X-A: "b\\', "-w", "3", "--workers-max-rss", "900K"),
        *("--policy", "hash", "--no-access-log", "--root-path", "/é\u2028", "--ws-ping-timeout", ".5", "--use-colors"),
        *(
            "-m",
            "027",
            "--uds-permissions",
            "0660",
            "-p",
            "x.pid",
            "-g",
            "0",
            "-e",
            "A=b c=d",
            "--log-level",
            "debug",
            "--h11-max-incomplete-event-size",
            "99",
        ),
    ]
    expected = settings(*argv)
    text = report(layer(*argv))
    write(text)
    del os.environ["A"]
    found = settings()
    assert found == Settings(**{**vars(expected), "workers_source": "clusterserve.toml: workers"})
    assert os.environ["A"] == "b c=d"


def origins(*argv: str) -> dict[str, str]:
    found = {}
    for line in report(layer(*argv)).splitlines():
        setting, mark, origin = line.rpartition("  # ")
        if mark:
            found[setting.partition(" =")[0].removeprefix("# ")] = origin
    return found


def test_every_setting_is_reported_with_its_origin(place: pytest.MonkeyPatch) -> None:
    write("max_pending = 5\n")
    for name, text in {
        "CLUSTERSERVE_BACKLOG": "9",
        "CLUSTERSERVE_CMD_ARGS": "--loop asyncio",
        "FORWARDED_ALLOW_IPS": "*",
        "CLUSTERSERVE_SCHED_POLICY": "least",
        "PORT": "7",
    }.items():
        place.setenv(name, text)
    found = origins("a:b", "--http", "h11")
    expected = {
        "app": "APP",
        "http": "--http",
        "loop": "CLUSTERSERVE_CMD_ARGS --loop",
        "backlog": "CLUSTERSERVE_BACKLOG",
        "max_pending": "clusterserve.toml: max_pending",
        "forwarded_allow_ips": "FORWARDED_ALLOW_IPS",
        "policy": "CLUSTERSERVE_SCHED_POLICY",
        "bind": "PORT",
        "workers": "6 usable processors",
        "ws": "default",
    }
    assert {name: found[name] for name in expected} == expected
    assert origins("a:b", "--host", "h", "--port", "1")["bind"] == "--host, --port"


def test_what_an_option_means_besides_is_from_there() -> None:
    found = origins("a:b", "-k", "sync", "--factory")
    assert (found["interface"], found["threads"], found["app"]) == (
        "--worker-class",
        "--worker-class",
        "APP, --factory",
    )
    assert origins("a:b", "-k", "sync", "--threads", "3")["threads"] == "--threads"


def test_the_report_leaves_nothing_out() -> None:
    text = report(layer())
    courtesies = {"worker_class", "access_logfile", "error_logfile", "initgroups"}
    ours = {"config", "chdir", "env", "factory", "host", "port", "uds", "fd"} | courtesies | ONCE
    missing = [spec.setting for spec in SPECS if spec.setting not in ours and f"{spec.setting} " not in text]
    assert missing == []


@pytest.mark.parametrize(
    "argv", [["config"], ["--print-config"], ["config", "a:b", "-w", "2"], ["a:b", "--print-config"]]
)
def test_the_report_is_printed_and_nothing_started(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(argv) == 0
    out, err = capsys.readouterr()
    assert "workers = " in out
    assert err == ""


@pytest.mark.parametrize("argv", [["config"], ["os:environ", "--check-config"]])
def test_who_only_looks_makes_no_directory(argv: list[str], tmp_path: Path) -> None:
    cli.run([*argv, "--profile", str(tmp_path / "profiles")])
    assert list(tmp_path.iterdir()) == []
    settings_of({"app": Given("a:b", ""), "profile": Given(str(tmp_path / "profiles"), "--profile")})
    assert [path.name for path in tmp_path.iterdir()] == ["profiles"]


def test_a_report_of_what_is_wrong_is_refused(refused: Refused) -> None:
    assert refused("config", "-w", "0") == f"--workers 0: {COUNT}"


# -- what is not heeded ------------------------------------------------------------------------------------------------


def test_watching_what_is_not_watched_is_not_ignored_in_silence() -> None:
    argv = ("a:b", "--reload-include", "*.html", "--reload-dir", ".")
    assert unread(layer(*argv)) == "--reload-dir, --reload-include: without --reload no files are watched"
    assert unread(layer(*argv, "--reload")) == ""
    # A file is for every start, also for those of the next day in production.
    write("reload_delay = 1\n")
    assert unread(layer("a:b")) == ""


# -- gunicorn's own file -----------------------------------------------------------------------------------------------


def test_gunicorns_own_file_is_not_ignored_in_silence(tmp_path: Path) -> None:
    assert unread(layer("a:b")) == ""
    write("workers = 3", "gunicorn.conf.py")
    said = "gunicorn.conf.py is not read; write its settings to a clusterserve.toml (docs/settings.md)"
    assert unread(layer("a:b")) == said
    assert unread(layer("a:b", "-c", "/dev/null")) == ""
    write("[tool.clusterserve]\nworkers = 2\n", "pyproject.toml")
    assert unread(layer("a:b")) == ""
    Path("pyproject.toml").unlink()
    write("")
    assert unread(layer("a:b")) == ""


def test_variables_of_others_are_not_ignored_in_silence(place: pytest.MonkeyPatch) -> None:
    place.setenv("UVICORN_PORT", "81")
    place.setenv("UVICORN_RELOAD_DIRS", "x")
    place.setenv("UVICORN_OF_OUR_OWN", "x")
    said = "UVICORN_PORT, UVICORN_RELOAD_DIRS: not read; variables begin with CLUSTERSERVE_ here"
    assert unread(layer("a:b")) == said
    # Who has said the same to us has moved already.
    assert unread(layer("a:b", "-b", ":82", "--reload", "--reload-dir", ".")) == ""
    place.setenv("GUNICORN_CMD_ARGS", "-w 3")
    assert unread(layer("a:b")) == "GUNICORN_CMD_ARGS is not read; CLUSTERSERVE_CMD_ARGS is"
    place.setenv("CLUSTERSERVE_CMD_ARGS", "-w 3 -b :82 --reload-dir .")
    place.setenv("CLUSTERSERVE_RELOAD", "1")
    assert unread(layer("a:b")) == ""


def test_a_variable_for_no_is_not_ignored_in_silence(place: pytest.MonkeyPatch, refused: Refused) -> None:
    place.setenv("CLUSTERSERVE_NO_ACCESS_LOG", "1")
    said = "CLUSTERSERVE_NO_ACCESS_LOG is set, but there is no such option; say CLUSTERSERVE_ACCESS_LOG=0"
    assert refused("a:b") == said


@pytest.mark.parametrize("table", ["clusterserve", "tool"])
def test_a_table_in_our_own_file(table: str, refused: Refused) -> None:
    write(f"[{table}]\nworkers = 2\n")
    said = f"clusterserve.toml: settings stand at the top of this file, and not in a table {table!r}"
    assert refused("a:b") == said


def test_a_file_may_have_the_names_of_gunicorns(tmp_path: Path) -> None:
    (tmp_path / "LOG").touch()
    write(
        'wsgi_app = "a:b"\naccesslog = "x"\nerrorlog = "y"\nkeepalive = 9\nloglevel = "debug"\npidfile = "p"\n'
        'preload_app = true\nproc_name = "n"\nproxy_allow_ips = "*"\nraw_env = ["C=d"]\n'
    )
    found = settings()
    assert (found.app, found.access_logfile, found.error_logfile, found.log_level) == ("a:b", "x", "y", "debug")
    assert (found.timeout_keep_alive, found.pid, found.preload, found.name) == (9, "p", True, "n")
    assert found.proxy_allow_from == "*"
    assert layer()["env"].value == ["C=d"]
    write('logconfig = "LOG"\nlog_config = "LOG"\n')
    with pytest.raises(SettingsError, match="are two names of one setting"):
        layer()
