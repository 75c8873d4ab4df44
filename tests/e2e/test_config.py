"""Configuration as a new user meets it: a file, `clusterserve config`, `--check-config`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.server import EXAMPLE, Serve, run

APP = """
async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"from the file"})
"""


def test_a_file_is_enough(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "site_main.py").write_text(APP)
    (tmp_path / "clusterserve.toml").write_text(
        'app = "site_main:app"\nworkers = 2\nbind = "127.0.0.1:0"\nlifespan = "off"\n[headers]\nX-Where = "here"\n'
    )
    server = serve("--chdir", str(tmp_path), app="run", workers=None, bind=None, ready=False)
    server.wanted_workers = 2
    server.wait_ready()
    response = server.get("/")
    assert (response.body, response.headers["x-where"]) == (b"from the file", "here")
    assert server.found(r"2 workers \(clusterserve.toml: workers\)")


def test_the_report_is_a_file_that_gives_the_same_report(tmp_path: Path) -> None:
    first = run("config", EXAMPLE, "--workers", "3", "--bind", ":0", cwd=tmp_path)
    assert (first.code, first.err) == (0, "")
    (tmp_path / "clusterserve.toml").write_text(first.out)
    second = run("config", cwd=tmp_path)
    assert second.code == 0
    assert [line.partition("  #")[0] for line in second.out.splitlines()] == [
        line.partition("  #")[0] for line in first.out.splitlines()
    ]


def test_a_good_configuration(tmp_path: Path) -> None:
    good = (EXAMPLE, "--check-config", "--policy", "tests.helpers.policies:Newest", "--hooks", "tests.helpers.hooks")
    done = run(*good, env={"WEB_CONCURRENCY": ""})
    assert (done.code, done.err) == (0, "")
    assert done.out == f"The configuration is good: {EXAMPLE} can be served\n"


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["no_such_module:app"], 3, 'Error loading ASGI app. Could not import module "no_such_module".'),
        ([f"{EXAMPLE}x"], 3, 'Error loading ASGI app. Attribute "appx" not found in module "examples.asgi_app".'),
        (["tests.helpers.apps.raises:app"], 3, "the application 'tests.helpers.apps.raises:app' could not be loaded"),
        ([EXAMPLE, "--policy", "tests.helpers.policies:NoPolicy"], 2, "tests.helpers.policies:NoPolicy"),
        ([EXAMPLE, "--hooks", "no_such_hooks"], 2, "no_such_hooks"),
        ([EXAMPLE, "--http", "no_such:Protocol"], 3, 'Could not import module "no_such"'),
        ([EXAMPLE, "--workers", "0"], 2, "--workers 0"),
    ],
)
def test_what_is_wrong_ends_the_check_as_it_would_the_start(options: list[str], code: int, text: str) -> None:
    done = run(*options, "--check-config")
    assert (done.code, done.out) == (code, "")
    first = done.err.splitlines()[0]
    assert first.startswith("clusterserve: error: ")
    assert text in first


def test_the_applications_traceback_begins_with_the_application() -> None:
    done = run("tests.helpers.apps.raises:app", "--check-config")
    frames = done.lines(r'^  File "')
    assert frames
    assert "raises.py" in frames[0]
