"""What the user, the application or the machine gets wrong: one clear line, the right exit code, and nothing left."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest

from tests.helpers.server import EXAMPLE, ROOT, WORKER_LISTENS, Finished, Serve, run

ANY_PORT = ("--bind", "127.0.0.1:0")


def one_line(finished: Finished, *words: str) -> None:
    """stderr says it in exactly one line; there is no other, no traceback, and no worker had been started."""
    lines = finished.err.splitlines()
    assert len(lines) == 1, finished.text
    for word in words:
        assert word in lines[0]
    assert "Worker" not in finished.out


def once(finished: Finished, *phrases: str) -> None:
    """Each phrase stands in the output exactly once, however many workers met the trouble."""
    for phrase in phrases:
        assert finished.text.count(phrase) == 1, f"{phrase!r} in:\n{finished.text}"


# ── 3: the application ──────────────────────────────────────────────────────────────────────────────────────────────


def test_module_not_found() -> None:
    finished = run("no_such_module:app", "--workers", "2", *ANY_PORT)
    assert finished.code == 3
    assert len(finished.lines(r"No module named 'no_such_module'|[Cc]ould not import module \"no_such_module\"")) == 1


def test_package_not_found() -> None:
    finished = run("no_such_package.module:app", "--workers", "2", *ANY_PORT)
    assert finished.code == 3
    assert len(finished.lines(r'Could not import module "no_such_package\.module": there is no "no_such_package"')) == 1
    assert "Traceback" not in finished.text


def test_attribute_not_found() -> None:
    finished = run("examples.asgi_app:nope", "--workers", "2", *ANY_PORT)
    assert finished.code == 3
    assert len(finished.lines(r"nope.* not found|no attribute 'nope'")) == 1


def test_an_app_that_raises_on_import_shows_its_traceback_once() -> None:
    finished = run("tests.helpers.apps.raises:app", "--workers", "2", *ANY_PORT)
    assert finished.code == 3
    once(finished, "Traceback (most recent call last)", "RuntimeError: the app's own trouble")
    # The traceback is the application's: it leads to the line that is at fault.
    assert re.search(r'raises\.py", line \d+', finished.text)


def test_an_app_with_a_syntax_error(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("app = \n")
    finished = run("broken:app", "--app-dir", str(tmp_path), "--workers", "2", *ANY_PORT)
    assert finished.code == 3
    once(finished, "SyntaxError: invalid syntax")


def test_an_app_that_imports_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "needy.py").write_text("import no_such_dependency\n")
    finished = run("needy:app", "--app-dir", str(tmp_path), "--workers", "2", *ANY_PORT)
    assert finished.code == 3
    # Its own module exists: what is missing must be named, not "could not import needy".
    once(finished, "ModuleNotFoundError: No module named 'no_such_dependency'")


def test_a_lifespan_that_fails() -> None:
    finished = run("tests.helpers.apps.lifespans:fails_at_startup", "--workers", "2", *ANY_PORT)
    assert finished.code == 3
    once(finished, "RuntimeError: the lifespan's own trouble")


def test_every_worker_dies_at_boot() -> None:
    finished = run("tests.helpers.apps.exits:app", "--workers", "2", *ANY_PORT)
    assert finished.code == 3
    assert len(finished.lines(r"\b7\b")) >= 1, "the exit code of the worker is named"
    assert "Traceback" not in finished.text


def test_an_app_that_exits_with_a_message_on_import(tmp_path: Path) -> None:
    (tmp_path / "strict.py").write_text("import sys\n\nsys.exit('SECRET_KEY is not set')\n")
    finished = run("strict:app", "--app-dir", str(tmp_path), "--workers", "2", *ANY_PORT)
    assert finished.code == 3
    once(finished, "SECRET_KEY is not set")


def test_boot_takes_too_long() -> None:
    finished = run("tests.helpers.apps.hangs:app", "--workers", "1", "--timeout-boot", "0.5", *ANY_PORT)
    assert finished.code == 3
    assert len(finished.lines(r"--timeout-boot|timeout_boot|\b0\.5 s")) >= 1
    assert "Traceback" not in finished.text


def test_a_factory_that_raises(tmp_path: Path) -> None:
    (tmp_path / "made.py").write_text("def create():\n    raise LookupError('no recipe')\n")
    finished = run("made:create", "--factory", "--app-dir", str(tmp_path), "--workers", "2", *ANY_PORT)
    assert finished.code == 3
    once(finished, "LookupError: no recipe")


def test_a_factory_is_called(serve: Serve) -> None:
    assert serve("--factory", app="tests.helpers.apps.full:create_app").get("/").status == 200


def test_an_app_that_is_no_app(tmp_path: Path) -> None:
    (tmp_path / "number.py").write_text("app = 42\n")
    finished = run("number:app", "--app-dir", str(tmp_path), "--workers", "1", "--lifespan", "on", *ANY_PORT)
    assert finished.code == 3


def test_a_socket_file_is_gone_after_a_failed_start(tmp_path: Path) -> None:
    path = tmp_path / "s"
    finished = run("tests.helpers.apps.raises:app", "--workers", "1", "--bind", f"unix:{path}")
    assert finished.code == 3
    assert not path.exists()


# ── 1: the machine ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_address_in_use(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as occupied:
        port = occupied.getsockname()[1]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        finished = run(EXAMPLE, "--workers", "2", "--bind", address)
    assert finished.code == 1
    one_line(finished, address, "in use")


def test_the_second_address_in_use_takes_nothing_with_it(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.create_server(("127.0.0.1", 0)) as occupied:
        address = f"127.0.0.1:{occupied.getsockname()[1]}"
        finished = run(EXAMPLE, "--bind", f"unix:{path}", "--bind", address)
    assert finished.code == 1
    one_line(finished, address)
    assert not path.exists()


def test_a_unix_path_where_somebody_listens(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as occupied:
        occupied.bind(str(path))
        occupied.listen()
        finished = run(EXAMPLE, "--bind", f"unix:{path}")
        assert finished.code == 1
        one_line(finished, str(path), "in use")
        assert path.exists(), "the other program's socket file stays"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


def test_a_unix_path_where_a_file_lies(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    finished = run(EXAMPLE, "--bind", f"unix:{path}")
    assert finished.code == 1
    one_line(finished, str(path))
    assert path.read_text() == "precious"


def test_a_unix_path_in_no_directory(tmp_path: Path) -> None:
    path = tmp_path / "no" / "s"
    finished = run(EXAMPLE, "--bind", f"unix:{path}")
    assert finished.code == 1
    one_line(finished, str(path))


def test_a_unix_path_that_is_too_long(tmp_path: Path) -> None:
    path = tmp_path / ("s" * 108)
    finished = run(EXAMPLE, "--bind", f"unix:{path}")
    assert finished.code in (1, 2)
    one_line(finished, "s" * 108)


def test_no_permission() -> None:
    # /sys lets nobody create a socket, root included.
    finished = run(EXAMPLE, "--bind", "unix:/sys/clusterserve-e2e.sock")
    assert finished.code == 1
    one_line(finished, "/sys/clusterserve-e2e.sock", "ermi")


def test_an_address_of_another_machine() -> None:
    finished = run(EXAMPLE, "--bind", "192.0.2.1:8000")
    assert finished.code == 1
    one_line(finished, "192.0.2.1:8000")


def test_a_host_that_has_no_address() -> None:
    finished = run(EXAMPLE, "--bind", "no-such-host.invalid:8000")
    assert finished.code == 1
    one_line(finished, "no-such-host.invalid")


@pytest.mark.parametrize("option", ["--bind", "--fd"])
def test_a_descriptor_that_is_not_open(option: str) -> None:
    value = "fd://97" if option == "--bind" else "97"
    finished = run(EXAMPLE, option, value)
    assert finished.code == 1
    one_line(finished, "97")


def test_a_descriptor_that_is_a_pipe() -> None:
    read, write = os.pipe()
    try:
        finished = run(EXAMPLE, "--bind", f"fd://{read}", pass_fds=[read])
    finally:
        os.close(read)
        os.close(write)
    assert finished.code == 1
    one_line(finished, f"fd://{read}", "socket")


def test_a_descriptor_that_is_a_connection() -> None:
    left, right = socket.socketpair()
    with left, right:
        number = left.fileno()
        finished = run(EXAMPLE, "--bind", f"fd://{number}", pass_fds=[number])
    assert finished.code == 1
    one_line(finished, f"fd://{number}", "not a listening socket")


def test_a_descriptor_that_does_not_listen() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        number = silent.fileno()
        finished = run(EXAMPLE, "--bind", f"fd://{number}", pass_fds=[number])
    assert finished.code == 1
    one_line(finished, f"fd://{number}", "not a listening socket")


def test_a_descriptor_that_is_a_datagram_socket() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(("127.0.0.1", 0))
        number = datagrams.fileno()
        finished = run(EXAMPLE, "--bind", f"fd://{number}", pass_fds=[number])
    assert finished.code == 1
    one_line(finished, f"fd://{number}", "not a listening socket")


# ── 2: the command line ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((EXAMPLE, "--policy", "leest"), ("--policy", "leest", "least")),
        ((EXAMPLE, "--policy", "round-robin"), ("--policy", "round-robin", "rr")),
        ((EXAMPLE, "--workers", "0"), ("--workers", "0")),
        ((EXAMPLE, "--workers", "-1"), ("--workers", "-1")),
        ((EXAMPLE, "--workers", "x"), ("--workers", "x")),
        ((EXAMPLE, "--bind", "127.0.0.1:99999"), ("99999",)),
        ((EXAMPLE, "--bind", "127.0.0.1:http"), ("http",)),
        ((EXAMPLE, "--port", "x"), ("--port", "x")),
        ((EXAMPLE, "--host", "127.0.0.1", "--bind", "127.0.0.1:0"), ("--host", "--bind")),
        ((EXAMPLE, "--worker", "2"), ("--worker", "--workers")),
        ((EXAMPLE, "--polcy", "rr"), ("--polcy", "--policy")),
        ((EXAMPLE, "--dispatch", "requests"), ("--dispatch", "request")),
        ((EXAMPLE, "--policy", "none", "--dispatch", "request"), ("--dispatch", "request", "none")),
        ((EXAMPLE, "--timeout-graceful-shutdown", "-1"), ("--timeout-graceful-shutdown", "-1")),
        ((), ("APP",)),
        (("examples.asgi_app",), ("examples.asgi_app:app",)),
        (("rnu", EXAMPLE), ("rnu",)),
        (("ctl",), ("ctl",)),
    ],
    ids=lambda value: " ".join(value).replace(EXAMPLE, "APP") if isinstance(value, tuple) else None,
)
def test_usage(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    finished = run(*arguments)
    assert finished.code == 2, finished.text
    one_line(finished, *words)


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"CLUSTERSERVE_POLICY": "rr", "CLUSTERSERVE_SCHED_POLICY": "none"}, ("POLICY", "SCHED_POLICY", "rr", "none")),
        ({"CLUSTERSERVE_SCHED_POLICY": "shared"}, ("CLUSTERSERVE_SCHED_POLICY", "shared")),
        ({"WEB_CONCURRENCY": "many"}, ("WEB_CONCURRENCY", "many")),
        ({"CLUSTERSERVE_WORKERS": "-3"}, ("CLUSTERSERVE_WORKERS", "-3")),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None,
)
def test_usage_of_the_environment(env: dict[str, str], words: tuple[str, ...]) -> None:
    finished = run(EXAMPLE, *ANY_PORT, env=env)
    assert finished.code == 2, finished.text
    one_line(finished, *words)


def test_a_policy_of_ones_own_that_is_not_there() -> None:
    finished = run(EXAMPLE, "--policy", "no_such_module:Policy", *ANY_PORT)
    assert finished.code == 2
    one_line(finished, "no_such_module:Policy")


def test_both_policy_variables_may_agree(serve: Serve) -> None:
    serve(env={"CLUSTERSERVE_POLICY": "least", "CLUSTERSERVE_SCHED_POLICY": "least"})


# ── what is not bad ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_blank_variable_is_as_good_as_none(serve: Serve) -> None:
    names = ("WEB_CONCURRENCY", "CLUSTERSERVE_POLICY", "CLUSTERSERVE_SCHED_POLICY", "PORT")
    server = serve(env=dict.fromkeys(names, ""))
    assert server.get("/").status == 200


def test_web_concurrency_says_how_many(serve: Serve) -> None:
    server = serve("--bind", "127.0.0.1:0", env={"WEB_CONCURRENCY": "2"}, workers=None, bind=None)
    server.wait_for(WORKER_LISTENS, count=2)
    assert len(server.workers) == 2


def test_a_worker_count_of_auto(serve: Serve) -> None:
    server = serve("--workers", "auto", workers=None)
    [told] = server.wait_for(r"with (\d+) workers?\b")
    assert 1 <= int(told[1]) <= len(os.sched_getaffinity(0))
    server.wait_for(WORKER_LISTENS, count=int(told[1]))


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_and_version(argument: str) -> None:
    finished = run(argument)
    assert finished.code == 0
    assert finished.err == ""
    assert "clusterserve" in finished.out


def test_the_command_that_is_implied(serve: Serve) -> None:
    assert serve(EXAMPLE, "--workers", "1", *ANY_PORT, app="run", workers=None, bind=None).get("/").status == 200


def test_the_applications_directory_is_where_the_command_is_given(tmp_path: Path) -> None:
    (tmp_path / "here.py").write_text("raise RuntimeError('found it')\n")
    finished = run("here:app", "--workers", "1", *ANY_PORT, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert finished.code == 3
    once(finished, "RuntimeError: found it")
