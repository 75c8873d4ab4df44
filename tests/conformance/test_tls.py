"""TLS sessions (R15)."""

from __future__ import annotations

import os
import re
import signal
import ssl
import subprocess
from pathlib import Path

import pytest

from tests.helpers.certificates import Authority
from tests.helpers.raw import Client
from tests.helpers.server import IN_TURN, WORKER_LISTENS, Serve, Server
from tests.helpers.waiting import DEADLINE, eventually

WORKERS = 4


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


def ask(server: Server, context: ssl.SSLContext, session: ssl.SSLSession | None) -> tuple[int, bool, ssl.SSLSession]:
    """Who has answered, whether it has resumed the session, and the session now."""
    with Client(server.address, tls=context, session=session) as client:
        worker = client.ask("GET", "/whoami", "Connection: close").json()["id"]
        tls = client.socket
        assert isinstance(tls, ssl.SSLSocket)
        assert tls.session is not None
        return worker, bool(tls.session_reused), tls.session


@pytest.mark.parametrize("preload", [(), ("--preload",)], ids=["alone", "preload"])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=str)
def test_R15_sessions_resume_in_any_worker(
    serve: Serve, authority: Authority, version: ssl.TLSVersion, preload: tuple[str, ...]
) -> None:
    server = serve(*authority.issue("a").options, *IN_TURN, *preload, workers=WORKERS)
    context = authority.trusting()
    context.minimum_version = context.maximum_version = version
    first, resumed, session = ask(server, context, None)
    assert not resumed
    answers = [ask(server, context, session)[:2] for _ in range(15)]
    assert [each for _, each in answers] == [True] * 15
    assert {first, *(worker for worker, _ in answers)} == set(range(1, WORKERS + 1))
    # One that comes in the place of another, and one more.
    os.kill(server.workers[0].pid, signal.SIGKILL)
    server.signal(signal.SIGTTIN)
    server.wait_for(WORKER_LISTENS, count=WORKERS + 2)
    seen = set[int]()

    def newcomers() -> bool:
        worker, resumed, _ = ask(server, context, session)
        assert resumed
        seen.add(worker)
        return seen >= {WORKERS + 1, WORKERS + 2}

    eventually(newcomers, "both have resumed it")


def test_R15_sessions_outlive_reloads_and_certificates(serve: Serve, authority: Authority, tmp_path: Path) -> None:
    pair = authority.issue("b")
    server = serve(*pair.options, *IN_TURN, workers=2)
    context = authority.trusting()
    _, _, session = ask(server, context, None)
    other = authority.issue("c")
    for old, new in ((pair.certificate, other.certificate), (pair.key, other.key)):
        new.rename(old)
    server.wait_for("The certificate has changed: new connections get that of ")
    assert ask(server, context, session)[1]
    server.signal(signal.SIGHUP)
    server.wait_for(WORKER_LISTENS, count=4)
    eventually(lambda: min(each.id for each in server.workers) > 2, "the old ones are gone")
    assert ask(server, context, session)[:2] in ((3, True), (4, True))


@pytest.mark.needs_tool("openssl")
def test_R15_openssl_resumes(serve: Serve, authority: Authority, tmp_path: Path) -> None:
    server = serve(*authority.issue("d").options, *IN_TURN, workers=2)
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{server.address.port}", "-CAfile", str(authority.file)]
    session = tmp_path / "session"
    workers = set()
    for option in ("-sess_out", "-sess_in", "-sess_in"):
        said = subprocess.run(
            [*command, option, str(session), "-ign_eof"],
            input="GET /whoami HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
            capture_output=True, text=True, timeout=DEADLINE, check=True,
        ).stdout  # fmt: skip
        assert ("Reused, TLSv1.3" in said) is (option == "-sess_in")
        assert "Verify return code: 0 (ok)" in said
        found = re.search(r'"id":(\d)', said)
        assert found is not None
        workers.add(found[1])
    assert workers == {"1", "2"}
