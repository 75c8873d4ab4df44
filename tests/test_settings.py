"""`Settings.create`: what it takes, what it refuses and in which words, and what the environment decides."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import os
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st

from clusterserve import cpus, settings
from clusterserve.binds import Bind
from clusterserve.checks import MAX_SECONDS
from clusterserve.errors import SettingsError
from clusterserve.launch import LAUNCH_NAMES
from clusterserve.settings import Settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("CLUSTERSERVE_") or name in ("WEB_CONCURRENCY", "PORT", "FORWARDED_ALLOW_IPS"):
            monkeypatch.delenv(name)


def create(**values: object) -> Settings:
    return Settings.create(**{"app": "a:b", **values})


def refused(**values: object) -> str:
    """The message, which is one line whatever was given."""
    with pytest.raises(SettingsError) as caught:
        create(**values)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


# -- the defaults ------------------------------------------------------------------------------------------------------


def test_create_with_an_app_alone_gives_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "survey", lambda: cpus.Cpus(3, "3 usable processors"))
    expected = Settings(app="a:b", workers=3, workers_source="3 usable processors", forwarded_allow_ips="127.0.0.1,::1")
    assert create() == expected


def test_what_is_passed_through_has_uvicorns_default() -> None:
    ours = {field.name: field.default for field in dataclasses.fields(Settings)}
    theirs = inspect.signature(uvicorn.Config).parameters
    # None: uvicorn's logging, unless a file is named; None: no headers; an unlimited drain hangs on event streams.
    # No limit of requests is None for uvicorn, 0 for gunicorn and here; no patterns are None for uvicorn.
    apart = {"app", "workers", "log_config", "headers", "timeout_graceful_shutdown", "limit_max_requests"}
    apart |= {"reload_dirs", "reload_includes", "reload_excludes"}
    shared = ours.keys() & theirs.keys() - apart
    assert len(shared) > 20
    assert {name: ours[name] for name in shared} == {name: theirs[name].default for name in shared}


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        create().workers = 2  # type: ignore[misc]


# -- the application ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("app", ["a:b", "pkg.module:attr.inner", "a-b:c"])
def test_an_import_string_is_kept(app: str) -> None:
    assert create(app=app).app == app
    assert create(app=app).factory is False


def test_gunicorns_call_brackets_mean_a_factory() -> None:
    made = create(app="a:make()")
    assert (made.app, made.factory) == ("a:make", True)
    assert create(app="a:make", factory=True).factory is True


@pytest.mark.parametrize(
    ("app", "hint"), [("app", "app"), ("pkg/app.py", "pkg.app"), ("./app.py", "app"), ("", "module")]
)
def test_an_app_without_a_colon_gets_a_suggestion(app: str, hint: str) -> None:
    assert refused(app=app) == f"app={app!r}: an app is MODULE:ATTRIBUTE; did you mean '{hint}:app'?"


def test_an_app_of_no_package() -> None:
    assert refused(app=".x:app") == "app='.x:app': a module is named in full, and does not begin with a dot"


@pytest.mark.parametrize("app", [":", "a:", ":b", "a:b:c", "a b:c", "a:b c", "a:()", "a:b\n"])
def test_an_app_that_cannot_be_imported_by_its_looks(app: str) -> None:
    assert "an app is MODULE:ATTRIBUTE, or MODULE:FACTORY()" in refused(app=app)


@pytest.mark.parametrize("app", [print, lambda: None, object(), b"a:b", 3])
def test_an_app_that_is_an_object_is_refused_with_what_to_pass(app: object) -> None:
    assert f'pass an import string like "module:app", not an object of type {type(app).__name__}' in refused(app=app)


def test_no_app() -> None:
    with pytest.raises(SettingsError, match="pass an import string"):
        Settings.create()


# -- addresses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ({}, ["127.0.0.1:8000"]),
        ({"bind": "[::1]:0"}, ["[::1]:0"]),
        ({"bind": Bind.parse("unix:/x")}, ["unix:/x"]),
        ({"bind": [":1", Bind("fd", fd=3)]}, ["0.0.0.0:1", "fd://3"]),
        ({"bind": iter((":1", ":2"))}, ["0.0.0.0:1", "0.0.0.0:2"]),
        ({"host": "::1"}, ["[::1]:8000"]),
        ({"host": "h", "port": 1}, ["h:1"]),
        ({"host": ""}, ["0.0.0.0:8000"]),
        ({"port": 0}, ["127.0.0.1:0"]),
        ({"port": "81"}, ["127.0.0.1:81"]),
        ({"uds": "/x"}, ["unix:/x"]),
        ({"fd": 3}, ["fd://3"]),
        ({"fd": "4"}, ["fd://4"]),
        ({"bind": None, "host": None, "port": None, "uds": None, "fd": 5}, ["fd://5"]),
    ],
)
def test_the_ways_to_say_where(values: dict[str, object], texts: list[str]) -> None:
    assert [str(bind) for bind in create(**values).binds] == texts


@pytest.mark.parametrize(
    ("values", "pair"),
    [
        ({"bind": ":1", "host": "h"}, "bind and host"),
        ({"bind": ":1", "port": 1}, "bind and port"),
        ({"bind": ":1", "uds": "x"}, "bind and uds"),
        ({"bind": ":1", "fd": 0}, "bind and fd"),
        ({"uds": "x", "fd": 3}, "uds and fd"),
        ({"uds": "x", "host": "h", "port": 1}, "uds and host"),
        ({"fd": 3, "port": 1}, "fd and port"),
    ],
)
def test_two_ways_at_once_contradict_each_other(values: dict[str, object], pair: str) -> None:
    assert refused(**values).startswith(f"{pair} exclude each other")


@pytest.mark.parametrize(
    ("values", "start"),
    [
        ({"bind": "x:y"}, "bind='x:y': the port must be"),
        ({"bind": ["a:1", "::1"]}, "bind='::1': an IPv6 address goes in brackets"),
        ({"bind": []}, "bind=[]: must be at least one address"),
        ({"port": 65536}, "port=65536: must be a whole number from 0 to 65535"),
        ({"port": -1}, "port=-1: must be"),
        ({"port": "x"}, "port='x': must be"),
        ({"port": True}, "port=True: must be"),
        ({"host": "a b"}, "host='a b': not the name"),
        ({"host": 5}, "host=5: must be a text"),
        ({"uds": ""}, "uds='': needs the path"),
        ({"fd": -1}, "fd=-1: must be a whole number of at least 0"),
    ],
)
def test_a_bad_address_is_named(values: dict[str, object], start: str) -> None:
    assert refused(**values).startswith(start)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, "0.0.0.0:5000"),
        ({"host": "h"}, "h:5000"),
        ({"port": 1}, "127.0.0.1:1"),
        ({"bind": "h"}, "h:8000"),
        ({"uds": "/x"}, "unix:/x"),
        ({"fd": 3}, "fd://3"),
    ],
)
def test_the_variable_port_is_a_default_and_opens_all_hosts(
    values: dict[str, object], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PORT", " 5000 ")
    assert [str(bind) for bind in create(**values).binds] == [text]


@pytest.mark.parametrize("blank", ["", "  "])
def test_blank_variables_are_as_good_as_none(blank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = create()
    names = ("PORT", "WEB_CONCURRENCY", "FORWARDED_ALLOW_IPS", "CLUSTERSERVE_POLICY", "CLUSTERSERVE_SCHED_POLICY")
    for name in names:
        monkeypatch.setenv(name, blank)
    assert create() == expected


def test_a_bad_variable_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "http")
    assert refused() == "PORT='http': must be a whole number from 0 to 65535"
    assert create(port=1).binds


# -- workers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "variable", "workers", "source"),
    [
        (None, None, 6, "6 usable processors"),
        ("auto", None, 6, "6 usable processors"),
        ("auto", "2", 6, "6 usable processors"),
        (None, "auto", 6, "6 usable processors"),
        (None, "2", 2, "WEB_CONCURRENCY"),
        (None, " 2 ", 2, "WEB_CONCURRENCY"),
        (4, "2", 4, "workers"),
        (4, "nonsense", 4, "workers"),
        ("4", None, 4, "workers"),
        (1, None, 1, "workers"),
    ],
)
def test_the_worker_count_and_why(
    value: object, variable: str | None, workers: int, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpus, "survey", lambda: cpus.Cpus(6, "6 usable processors"))
    if variable is not None:
        monkeypatch.setenv("WEB_CONCURRENCY", variable)
    made = create(workers=value)
    assert (made.workers, made.workers_source) == (workers, source)


def test_the_caller_may_say_where_the_count_is_from() -> None:
    assert create(workers=2, workers_source="--workers").workers_source == "--workers"


@pytest.mark.parametrize("value", [0, -1, "x", "0", "", 1.0, 1.5, True, [], "1_000", "1" * 5000])
def test_what_is_no_worker_count(value: object) -> None:
    assert refused(workers=value) == f"workers={value!r}: must be a whole number of at least 1, or 'auto'"


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5"])
def test_a_bad_web_concurrency_is_named(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEB_CONCURRENCY", value)
    assert refused() == f"WEB_CONCURRENCY={value!r}: must be a whole number of at least 1, or 'auto'"


# -- policy and dispatch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "ours", "nodes", "policy"),
    [
        (None, "", "", "rr"),
        (None, "least", "", "least"),
        (None, "", "none", "none"),
        (None, "hash", "hash", "hash"),
        ("rr", "least", "none", "rr"),
        ("rr", "nonsense", "", "rr"),
        ("my.package:Policy", "", "", "my.package:Policy"),
    ],
)
def test_the_policy(value: str | None, ours: str, nodes: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTERSERVE_POLICY", ours)
    monkeypatch.setenv("CLUSTERSERVE_SCHED_POLICY", nodes)
    assert create(policy=value).policy == policy


def test_two_variables_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTERSERVE_POLICY", "rr")
    monkeypatch.setenv("CLUSTERSERVE_SCHED_POLICY", "none")
    message = "CLUSTERSERVE_POLICY=rr and CLUSTERSERVE_SCHED_POLICY=none contradict each other: unset one of them"
    assert refused() == message


ALLOWED = "must be one of rr, least, hash, none, or MODULE:ATTRIBUTE"


@pytest.mark.parametrize(
    ("value", "near"),
    [
        ("lest", "; did you mean 'least'?"),
        ("non", "; did you mean 'none'?"),
        ("zzz", ""),
        ("", ""),
        (3, ""),
        ("a:", ""),
    ],
)
def test_an_unknown_policy_names_the_near_match(value: object, near: str) -> None:
    assert refused(policy=value) == f"policy={value!r}: {ALLOWED}{near}"


@pytest.mark.parametrize("name", ["CLUSTERSERVE_POLICY", "CLUSTERSERVE_SCHED_POLICY"])
def test_an_unknown_policy_in_a_variable_names_the_variable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "hsh")
    assert refused() == f"{name}='hsh': {ALLOWED}; did you mean 'hash'?"


def test_a_dispatch_that_is_none() -> None:
    allowed = "must be one of auto, connection, request"
    assert refused(dispatch="conection") == f"dispatch='conection': {allowed}; did you mean 'connection'?"


@pytest.mark.parametrize(
    ("policy", "dispatch", "borrows"),
    [("rr", "auto", True), ("hash", "request", True), ("least", "connection", False), ("none", "auto", False)],
)
def test_who_gives_connections_back(policy: str, dispatch: str, borrows: bool) -> None:
    assert create(policy=policy, dispatch=dispatch).borrows is borrows


def test_under_none_requests_cannot_be_given_back() -> None:
    reason = "dispatch='request': needs a policy: under 'none' workers keep what they accept"
    assert refused(policy="none", dispatch="request") == reason


# -- everything else ---------------------------------------------------------------------------------------------------


def test_an_unknown_setting_names_the_near_match() -> None:
    assert refused(wrkers=2) == "there is no setting 'wrkers'; did you mean 'workers'?"
    assert refused(binds=()) == "there is no setting 'binds'; did you mean 'bind'?"
    assert refused(qqq=1) == "there is no setting 'qqq'"


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("backlog", "5", 5),
        ("backlog", 0, 0),
        ("max_pending", 1, 1),
        ("hooks", None, None),
        ("hooks", "package.module", "package.module"),
        ("timeout_keep_alive", "+7", 7),
        ("timeout_graceful_shutdown", 0, 0.0),
        ("timeout_graceful_shutdown", "2.5", 2.5),
        ("timeout_boot", ".5", 0.5),
        ("timeout_boot", MAX_SECONDS, float(MAX_SECONDS)),
        ("restart_backoff", 1, 1.0),
        ("timeout", "0", 0.0),
        ("limit_max_requests", "0", 0),
        ("workers_lifetime", "1.5", 1.5),
        ("workers_max_rss", 0, 0),
        ("workers_max_rss", 512, 512 << 20),
        ("workers_max_rss", "512", 512 << 20),
        ("workers_max_rss", "512M", 512 << 20),
        ("workers_max_rss", "512 MiB", 512 << 20),
        ("workers_max_rss", "900k", 900 << 10),
        ("workers_max_rss", "1.5gb", 3 << 29),
        ("workers_max_rss", 0.5, 1 << 19),
        ("ws_ping_interval", None, None),
        ("ws_ping_timeout", "0", 0.0),
        ("factory", "YES", True),
        ("access_log", "off", False),
        ("ws_per_message_deflate", "false", False),
        ("use_colors", None, None),
        ("use_colors", "1", True),
        ("log_level", "DEBUG", "debug"),
        ("http", "my.http:Protocol", "my.http:Protocol"),
        ("ws", "websockets-sansio", "websockets-sansio"),
        ("h11_max_incomplete_event_size", 4096, 4096),
        ("forwarded_allow_ips", ["10.0.0.1", "::1"], "10.0.0.1,::1"),
        ("forwarded_allow_ips", "*", "*"),
        ("root_path", "/api", "/api"),
        ("headers", ["X-A: b ", ("X-B", "c:d"), ["X-C", ""]], (("X-A", "b"), ("X-B", "c:d"), ("X-C", ""))),
        ("headers", ["X-Latin: caf\xe9\tx"], (("X-Latin", "caf\xe9\tx"),)),
    ],
)
def test_a_value_is_kept_in_its_own_type(name: str, given: object, kept: object) -> None:
    value = getattr(create(**{name: given}), name)
    assert value == kept
    assert type(value) is type(kept)


@pytest.mark.parametrize(
    ("name", "given", "reason"),
    [
        ("backlog", -1, "must be a whole number of at least 0"),
        ("backlog", 2**31, "must be a whole number"),
        ("backlog", None, "must be a whole number"),
        ("max_pending", 0, "must be a whole number of at least 1"),
        ("limit_concurrency", 0, "must be a whole number of at least 1"),
        ("proxy_protocol", "v3", "must be one of off, v1, v2, auto"),
        ("proxy_allow_from", "localhost", "must be addresses and networks, separated by commas, or *"),
        ("worker_connections", -1, "must be a whole number of at least 0"),
        ("on_worker_exit_code", "3,x", "must be whole numbers from 0 to 255"),
        ("on_worker_exit_code", [256], "must be whole numbers from 0 to 255"),
        ("hooks", "package:module", "must be the name of a module, as in package.module"),
        ("hooks", "", "must be the name of a module"),
        ("hooks", ".relative", "must be the name of a module"),
        ("hooks", 3, "must be the name of a module"),
        ("timeout_keep_alive", 2.5, "must be a whole number"),
        ("timeout_graceful_shutdown", -1, "must be a number of seconds from 0 to 1000000"),
        ("timeout_graceful_shutdown", None, "must be a number of seconds"),
        ("timeout_graceful_shutdown", "soon", "must be a number of seconds"),
        ("timeout_graceful_shutdown", True, "must be a number of seconds"),
        ("timeout_graceful_shutdown", float("nan"), "must be a number of seconds"),
        ("timeout_graceful_shutdown", float("inf"), "must be a number of seconds"),
        ("timeout_graceful_shutdown", "inf", "must be a number of seconds"),
        ("timeout_graceful_shutdown", "1e3", "must be a number of seconds"),
        ("timeout_boot", 0, "must be a number of seconds above 0"),
        ("timeout_boot", MAX_SECONDS + 1, "must be a number of seconds above 0"),
        ("timeout_boot", 10**400, "must be a number of seconds above 0"),
        ("restart_backoff", 0, "must be a number of seconds above 0"),
        ("timeout", "soon", "must be a number of seconds from 0"),
        ("reload_surge", 0, "must be a whole number of at least 1"),
        ("rss_samples", 0, "must be a whole number of at least 1"),
        ("workers_max_rss", "512X", "must be an amount of memory, as in 512M"),
        ("workers_max_rss", -1, "must be an amount of memory, as in 512M"),
        ("workers_max_rss", True, "must be an amount of memory, as in 512M"),
        ("workers_max_rss", float("nan"), "must be an amount of memory, as in 512M"),
        ("workers_max_rss", None, "must be an amount of memory, as in 512M"),
        ("restart_backoff", 20, "must not be above restart_backoff_max, which is 15"),
        ("factory", "maybe", "must be true or false"),
        ("factory", 1, "must be true or false"),
        ("threads", 0, "must be a whole number of at least 1"),
        ("interface", "asgi", "must be one of auto, asgi3, asgi2, wsgi; did you mean 'asgi"),
        ("loop", "uvlop", "must be one of auto, asyncio, uvloop; did you mean 'uvloop'?"),
        ("loop", "zuvloop", "not available in this version"),
        ("http", "httptool", "must be one of auto, h11, httptools, zttp, or MODULE:ATTRIBUTE; did you mean"),
        ("ws", 3, "must be one of"),
        ("ws_max_size", 0, "must be a whole number of at least 1"),
        ("ws_ping_interval", -1, "must be a number of seconds"),
        ("lifespan", "yes", "must be one of auto, on, off"),
        ("log_level", "loud", "must be one of critical, error, warning, info, debug, trace"),
        ("log_level", 10, "must be one of critical"),
        ("log_config", "/no/such/file", "there is no such file"),
        ("log_config", {}, "must be a path"),
        ("log_config", "/", "there is no such file"),
        ("env_file", "a\0b", "there is no such file"),
        ("app_dir", "/no/such/dir", "there is no such directory"),
        ("root_path", 3, "must be a text"),
        ("root_path", "a\0", "holds a NUL byte"),
        ("forwarded_allow_ips", [1], "must be a text"),
        ("headers", "X-A: b", "must be a list of"),
        ("headers", 3, "must be a list of"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(name: str, given: object, reason: str) -> None:
    shown = repr(float(given)) if name == "restart_backoff" and given else repr(given)  # type: ignore[arg-type]
    # [1] is refused for the item in it.
    start = f"{name}=1" if given == [1] else f"{name}={shown}"
    assert refused(**{name: given}).startswith(f"{start}: {reason}")


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ("X-A", "a header is 'Name:Value'"),
        (("X-A",), "a header is"),
        (("X-A", 3), "a header is"),
        (3, "a header is"),
        (": b", "'' is not the name of a header"),
        ("X A: b", "'X A' is not the name of a header"),
        ("X-A: b\r\nSet-Cookie: c", "a header's value is one line of Latin-1 text"),
        ("X-A: b\n", "a header's value is"),
        ("X-A: \u20ac", "a header's value is"),
        ("X-A: \0", "a header's value is"),
    ],
)
def test_a_bad_header_is_quoted(item: object, reason: str) -> None:
    assert refused(headers=["X-Good: 1", item]).startswith(f"headers={item!r}: {reason}")


def test_paths_may_be_path_objects(tmp_path: Path) -> None:
    file = tmp_path / "log.ini"
    file.touch()
    made = create(log_config=file, env_file=file, app_dir=tmp_path)
    assert (made.log_config, made.env_file, made.app_dir) == (str(file), str(file), str(tmp_path))


def test_the_trusted_proxies_rank_as_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "10.1.1.1")
    assert create().forwarded_allow_ips == "10.1.1.1"
    assert create(forwarded_allow_ips="*").forwarded_allow_ips == "*"
    # Said on purpose, unlike a blank variable: trust nobody.
    assert create(forwarded_allow_ips="").forwarded_allow_ips == ""


# -- the way to the workers --------------------------------------------------------------------------------------------

binds = (
    st.builds(Bind, st.just("tcp"), host=st.sampled_from(["h", "::1"]), port=st.integers(0, 65535))
    | st.builds(Bind, st.just("unix"), path=st.sampled_from(["/x", "//x", "@x"]))
    | st.builds(Bind, st.just("fd"), fd=st.integers(0, 9))
)
texts = st.text(st.characters(exclude_characters="\0"))
# Said to be ASCII, lest hypothesis goes through all of Unicode to find that these are.
ascii_only = st.characters(codec="ascii")
header = st.tuples(
    st.from_regex(r"[A-Za-z0-9-]+", fullmatch=True, alphabet=ascii_only),
    st.from_regex(r"[!-~]*", fullmatch=True, alphabet=ascii_only),
)
seconds = st.floats(0.001, MAX_SECONDS) | st.integers(1, MAX_SECONDS)
values = st.fixed_dictionaries(
    {"app": st.sampled_from(["a:b", "a.b:c.d", "a:b()"]), "workers": st.integers(1, 1000)},
    optional={
        "bind": st.lists(binds, min_size=1, unique=True),
        "policy": st.sampled_from([*settings.POLICIES, "my.module:Policy"]),
        "backlog": st.integers(0, 2**31 - 1),
        "timeout_boot": seconds,
        "timeout_graceful_shutdown": seconds,
        "timeout_keep_alive": st.integers(0, 1000),
        "restart_backoff_max": st.floats(0.1, 1000),
        "ws_ping_interval": st.none() | seconds,
        "use_colors": st.none() | st.booleans(),
        "headers": st.lists(header),
        "reload_includes": st.lists(texts.filter(str.strip)),
        "root_path": texts,
        "forwarded_allow_ips": st.none() | texts,
        "log_level": st.none() | st.sampled_from(["info", "trace"]),
        "h11_max_incomplete_event_size": st.none() | st.integers(1, 2**31 - 1),
    },
)


@given(values)
def test_settings_survive_json_exactly(values: dict[str, Any]) -> None:
    made = Settings.create(**values)
    back = Settings.from_json(json.loads(json.dumps(made.to_json())))
    assert back == made
    assert hash(back) == hash(made)
    for field in dataclasses.fields(Settings):
        assert type(getattr(back, field.name)) is type(getattr(made, field.name))


def test_from_json_does_not_ask_the_environment_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made = create(workers=2)
    monkeypatch.setenv("WEB_CONCURRENCY", "7")
    monkeypatch.setenv("PORT", "7")
    monkeypatch.setenv("CLUSTERSERVE_POLICY", "least")
    assert Settings.from_json(made.to_json()) == made


def test_to_json_holds_every_field() -> None:
    rest = {field.name for field in dataclasses.fields(Settings)} - {*LAUNCH_NAMES}
    assert set(create().to_json()) == rest


# -- development -------------------------------------------------------------------------------------------------------


def test_one_worker_is_enough_where_files_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    found = create(reload=True)
    assert (found.workers, found.workers_source) == (1, "one, for development with --reload")
    assert create(reload=True, workers=3).workers == 3
    assert create(reload=False, workers=None).workers == create().workers
    monkeypatch.setenv("WEB_CONCURRENCY", "7")
    assert create(reload=True).workers == 7


def test_a_reload_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    told = "reload=True: needs the package watchfiles, which is not installed: pip install 'clusterserve[reload]'"
    assert refused(reload=True) == told
    assert create(reload=False).reload is False


@pytest.mark.parametrize(
    ("values", "package"),
    [({"http": "zttp"}, "zttp"), ({"ws": "websockets-sansio"}, "websockets"), ({"ws": "wsproto"}, "wsproto")],
)
def test_a_protocol_needs_its_package(values: dict[str, str], package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a traceback in every worker, which reads as if the application were at fault."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refused(**values).endswith(f": needs the package {package}, which is not installed: pip install {package}")
    assert create(http="h11", ws="mine:Protocol").ws == "mine:Protocol"


def test_patterns_come_alone_or_in_a_list() -> None:
    assert create(reload_includes="*.html").reload_includes == ("*.html",)
    assert create(reload_includes=["*.html", Path("x.css")]).reload_includes == ("*.html", "x.css")
    assert create(reload_dirs=None).reload_dirs == ()
    assert refused(reload_excludes=["*", " "]) == "reload_excludes=' ': is empty"
    assert refused(reload_dirs=["nowhere"]) == "reload_dirs='nowhere': there is no such directory"
    assert refused(reload_extra_files=5) == "reload_extra_files=5: must be a text"


# -- modes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "mode"), [("022", 0o22), ("0o22", 0o22), ("22", 0o22), (18, 18), ("777", 0o777)])
def test_a_mode_in_text_is_octal(value: object, mode: int) -> None:
    assert create(umask=value).umask == mode


@pytest.mark.parametrize("value", ["18", "1000", "-1", "", "rw", 512, -1, True, 1.0])
def test_what_is_no_mode(value: object) -> None:
    assert refused(umask=value) == f'umask={value!r}: must be an octal number from 0 to 777, as in "660" or 0o660'


def test_the_mode_of_socket_files() -> None:
    assert create().socket_mode == 0o666
    assert create(umask="027").socket_mode == 0o640
    assert create(umask="027", uds_permissions="666").socket_mode == 0o666
