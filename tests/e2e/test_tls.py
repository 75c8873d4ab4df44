"""TLS: its ends are in the workers, its certificates come from the master and change under way; with real clients."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import shutil
import signal
import ssl
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import uvicorn
from websockets.sync.client import connect as websocket

from clusterserve import Cluster
from tests.helpers.certificates import RSA, Authority, Pair
from tests.helpers.raw import Address, Client, request
from tests.helpers.server import EXAMPLE, KEEP, WORKER_LISTENS, Serve, Server, run
from tests.helpers.waiting import DEADLINE, eventually

FULL = "tests.helpers.apps.full:app"

#: A client's first words of TLS, and no more.
HALF_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def pair(authority: Authority) -> Pair:
    return authority.issue("first")


@pytest.fixture(
    scope="module",
    params=[
        ("--loop", "uvloop", "--http", "httptools"),
        ("--loop", "asyncio", "--http", "h11"),
        ("--loop", "uvloop", "--policy", "none"),
    ],
    ids=["uvloop-httptools", "asyncio-h11", "none"],
)
def shared(
    request: pytest.FixtureRequest, serve_module: Serve, pair: Pair, tmp_path_factory: pytest.TempPathFactory
) -> Server:
    binds = ["127.0.0.1:0", f"unix:{tmp_path_factory.mktemp('u')}/s"]
    return serve_module(*request.param, *pair.options, app=FULL, workers=2, bind=binds)


def secure(server: Server, context: ssl.SSLContext, number: int = 0) -> Client:
    return Client(server.addresses[number], tls=context)


def name_of(server: Server, context: ssl.SSLContext) -> str:
    """The common name in the certificate that a new connection is shown."""
    with secure(server, context) as client:
        return common_name(client)


def common_name(client: Client) -> str:
    assert isinstance(client.socket, ssl.SSLSocket)
    certificate = client.socket.getpeercert()
    assert certificate is not None
    return next(value for ((key, value), *_) in certificate["subject"] if key == "commonName")  # type: ignore[misc]


def openssl(server: Server, *options: str, said: str = "") -> str:
    """What `openssl s_client` has to tell of a connection."""
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{server.address.port}", *options]
    done = subprocess.run(command, input=said, capture_output=True, text=True, timeout=DEADLINE, check=False)
    return done.stdout + done.stderr


# ── what is served ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("number", [0, 1], ids=["tcp", "unix"])
def test_requests(shared: Server, authority: Authority, number: int) -> None:
    with secure(shared, authority.trusting(), number) as client:
        said = client.ask("GET", "/scope?a=b").json()
        assert (said["scheme"], said["query"]) == ("https", "a=b")
        assert said["client"] == ([*client.socket.getsockname()] if number == 0 else None)
        body = os.urandom(300_000)
        assert client.ask("POST", "/echo", body=body).body == body
        assert len(client.ask("GET", "/bytes?n=3000000&length=1").body) == 3_000_000


def test_addresses_are_https(shared: Server) -> None:
    assert shared.found(r"Listening on https://127.0.0.1:\d+$")
    assert shared.url.startswith("https://")


def test_a_web_socket(shared: Server, authority: Authority) -> None:
    url = f"wss://localhost:{shared.address.port}/ws"
    with websocket(url, ssl=authority.trusting(), proxy=None, open_timeout=DEADLINE) as client:
        client.send("one")
        assert client.recv(DEADLINE) == "one"


def test_plain_http_gets_no_answer(shared: Server) -> None:
    with shared.connect() as client:
        client.send(request("GET", "/"))
        # At most an alert of TLS.
        assert not client.rest().startswith(b"HTTP")
    assert not shared.found("Traceback|ERROR")


@pytest.mark.needs_tool("openssl")
@pytest.mark.parametrize("version", ["tls1_2", "tls1_3"])
def test_openssl_is_content(shared: Server, authority: Authority, version: str) -> None:
    said = openssl(
        shared, f"-{version}", "-CAfile", str(authority.file), "-verify_return_error", "-alpn", "h2,http/1.1"
    )
    assert "Verify return code: 0 (ok)" in said
    assert "ALPN protocol: http/1.1" in said
    assert "CN = first" in said


def test_the_clusters_url(authority: Authority, pair: Pair) -> None:
    with Cluster(
        EXAMPLE, bind="127.0.0.1:0", workers=1, ssl_certfile=pair.certificate, ssl_keyfile=pair.key
    ) as cluster:
        assert re.fullmatch(r"https://127\.0\.0\.1:\d+", cluster.url)
        with Client(Address.parse(cluster.url), tls=authority.trusting()) as client:
            assert client.ask("GET", "/whoami").json()["id"] == 1


@pytest.mark.needs_tool("curl")
@pytest.mark.needs_module("zttp")
def test_http2(serve: Serve, authority: Authority, pair: Pair) -> None:
    offered = ["http/1.1", "h2"]
    if "http2" not in inspect.signature(uvicorn.Config).parameters:
        # The oldest uvicorn that we work with.
        finished = run(EXAMPLE, "--http", "zttp", "--http2", *pair.options, "--bind", "127.0.0.1:0", "-w", "1")
        assert finished.lines("--http2 needs a newer uvicorn")
        return
    server = serve("--http", "zttp", "--http2", *pair.options, app=FULL)
    curl = ["curl", "-sS", "--noproxy", "*", "--cacert", str(authority.file), "-w", "\n%{http_version}"]
    for option, version in (("--http2", "2"), ("--http1.1", "1.1")):
        url = f"https://localhost:{server.address.port}/scope"
        done = subprocess.run([*curl, option, url, url], capture_output=True, text=True, timeout=DEADLINE, check=True)
        assert done.stdout.endswith(f"\n{version}"), done
        assert '"scheme":"https"' in done.stdout
    context = authority.trusting()
    context.set_alpn_protocols(offered)
    with secure(server, context) as client:
        assert isinstance(client.socket, ssl.SSLSocket)
        assert client.socket.selected_alpn_protocol() == "h2"


def test_clients_must_say_who_they_are(serve: Serve, authority: Authority, pair: Pair) -> None:
    server = serve(*pair.options, "--ssl-ca-certs", str(authority.file), "--ssl-cert-reqs", "2")
    with secure(server, authority.trusting(authority.issue("client"))) as client:
        assert client.ask("GET", "/").status == 200
    # With TLS 1.3 the client's side of the handshake is done before it is refused.
    with secure(server, authority.trusting()) as client, contextlib.suppress(ssl.SSLError):
        # Whether the loop sends it the reason or not.
        assert client.rest() == b""


# ── certificates that change ────────────────────────────────────────────────────────────────────────────────────────


class Mounted:
    """A secret as Kubernetes mounts it: the files are links through a directory that is swapped as a whole."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._number = 0
        self.pair = Pair(directory / "tls.crt", directory / "tls.key")
        for file in (self.pair.certificate, self.pair.key):
            file.symlink_to(f"..data/{file.name}")

    def holds(self, pair: Pair, key: Pair | None = None) -> None:
        self._number += 1
        made = self._directory / f"..{self._number}"
        made.mkdir()
        shutil.copy(pair.certificate, made / "tls.crt")
        shutil.copy((key or pair).key, made / "tls.key")
        link = self._directory / "..new"
        link.symlink_to(made.name)
        link.rename(self._directory / "..data")


RENEWED = r"The certificate has changed: new connections get that of "
KEPT = (
    r"ERROR: +The certificate has changed, and the old one stays: ssl_keyfile='.*': is not the key of the certificate"
)


@pytest.mark.parametrize("policy", ["rr", "none"])
def test_a_changed_certificate_is_used_at_once(serve: Serve, authority: Authority, tmp_path: Path, policy: str) -> None:
    first, second = authority.issue(f"{policy}-rsa", RSA), authority.issue(f"{policy}-ecdsa")
    mounted = Mounted(tmp_path)
    mounted.holds(first)
    server = serve("--policy", policy, *mounted.pair.options, *KEEP, workers=2)
    only_rsa = authority.trusting()
    only_rsa.maximum_version = ssl.TLSVersion.TLSv1_2
    only_rsa.set_ciphers("aRSA")
    with secure(server, authority.trusting()) as client:
        assert common_name(client) == f"{policy}-rsa"
        mounted.holds(second)
        eventually(
            lambda: {name_of(server, authority.trusting()) for _ in range(4)} == {f"{policy}-ecdsa"},
            "every worker shows the second",
        )
        # Nobody sees the first any more, also who would rather have it: its key is of another kind.
        with pytest.raises(ssl.SSLError):
            name_of(server, only_rsa)
        # Half a change is none.
        mounted.holds(first, key=second)
        server.wait_for(KEPT)
        assert name_of(server, authority.trusting()) == f"{policy}-ecdsa"
        mounted.holds(first)
        eventually(lambda: len(server.found(RENEWED)) == 2, "it is renewed again")
        assert len(server.found(KEPT)) == 1
        # The connection from before all that is not concerned.
        assert client.ask("GET", "/whoami").status == 200
    assert len(server.announced) == 2


def test_workers_do_not_need_the_files(serve: Serve, authority: Authority, tmp_path: Path) -> None:
    """So it does not matter who may read the key, nor what lies there when a worker has to be replaced."""
    mounted = Mounted(tmp_path)
    mounted.holds(authority.issue("gone", password="open sesame"))
    server = serve(*mounted.pair.options, env={"CLUSTERSERVE_SSL_KEYFILE_PASSWORD": "open sesame"}, noise=True)
    shutil.rmtree(tmp_path)
    server.wait_for("the old one stays: ssl_certfile='.*': cannot be read: no such file or directory")
    os.kill(server.workers[0].pid, signal.SIGKILL)
    server.wait_for(WORKER_LISTENS, count=2)
    assert name_of(server, authority.trusting()) == "gone"
    server.signal(signal.SIGHUP)
    server.wait_for("Reload refused, nothing was done: --ssl-certfile .*: there is no such file")
    assert len(server.found("the old one stays")) == 1


def test_a_reload_uses_what_is_there(serve: Serve, authority: Authority, tmp_path: Path) -> None:
    """Also other settings, and without a look at the files in between."""
    first, second = authority.issue("before"), authority.issue("after")
    config = tmp_path / "clusterserve.toml"

    def says(pair: Pair) -> None:
        config.write_text(f"ssl_certfile = '{pair.certificate}'\nssl_keyfile = '{pair.key}'\nssl_reload = false\n")

    says(first)
    server = serve("--config", str(config))
    shutil.copy(second.certificate, first.certificate)
    shutil.copy(second.key, first.key)
    server.signal(signal.SIGHUP)
    server.wait_for(WORKER_LISTENS, count=2)
    eventually(lambda: name_of(server, authority.trusting()) == "after", "the contents are read again")
    says(authority.issue("elsewhere"))
    server.signal(signal.SIGHUP)
    server.wait_for(WORKER_LISTENS, count=3)
    eventually(lambda: name_of(server, authority.trusting()) == "elsewhere", "another file is read")


def let_in(server: Server, context: ssl.SSLContext, session: ssl.SSLSession | None) -> ssl.SSLSession | None:
    """The session with which a request was served; None if its client was not let in."""
    try:
        with Client(server.address, tls=context, session=session) as client:
            assert isinstance(client.socket, ssl.SSLSocket)
            assert client.ask("GET", "/", "Connection: close").status == 200
            return client.socket.session
    except (ssl.SSLError, ConnectionError, EOFError):
        return None


@pytest.mark.parametrize("preload", [False, True], ids=["alone", "preload"])
def test_no_session_lets_in_who_would_not_be_let_in_now(
    serve: Serve, authority: Authority, pair: Pair, tmp_path: Path, preload: bool
) -> None:
    """Whoever resumes a session is not asked for a certificate, so it must not be one of when nobody was asked, nor of
    one that an authority has signed which is trusted no more."""
    config, trusted = tmp_path / "clusterserve.toml", tmp_path / "trusted.pem"

    def demands(certificates: int) -> None:
        config.write_text(
            f"ssl_certfile = '{pair.certificate}'\nssl_keyfile = '{pair.key}'\n"
            f"ssl_ca_certs = '{trusted}'\nssl_cert_reqs = {certificates}\n"
        )

    shutil.copy(authority.file, trusted)
    demands(0)
    server = serve("--config", str(config), *(["--preload"] if preload else []))
    anybody, known = authority.trusting(), authority.trusting(authority.issue("known"))
    session = let_in(server, anybody, None)
    assert session is not None
    demands(2)
    server.signal(signal.SIGHUP)
    server.wait_for(r"The application has ended in worker 1 ")
    assert let_in(server, anybody, None) is None
    assert let_in(server, anybody, session) is None
    session = let_in(server, known, None)
    assert session is not None
    (tmp_path / "new").mkdir()
    strangers = Authority(tmp_path / "new")
    shutil.copy(strangers.file, trusted)
    server.wait_for("The certificate has changed")
    eventually(lambda: let_in(server, known, None) is None, "the worker has heard of it")
    assert let_in(server, known, session) is None


# ── workers that leave ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("http", ["httptools", "h11"])
def test_a_connection_hears_of_its_last_response(serve: Serve, authority: Authority, pair: Pair, http: str) -> None:
    server = serve(*pair.options, *KEEP, "--http", http, app=FULL)
    context = authority.trusting()
    with secure(server, context) as idle, secure(server, context) as new, secure(server, context) as asking:
        assert idle.ask("GET", "/whoami").json()["id"] == 1
        asking.send(request("POST", "/echo", "Expect: 100-continue", "Content-Length: 4"))
        assert asking.head().status == 100
        server.signal(signal.SIGHUP)
        server.wait_for(WORKER_LISTENS, count=2)
        # The word to go may still be under way to worker 1.
        eventually(lambda: idle.ask("GET", "/whoami").headers.get("connection") == "close", "it is told")
        asking.send(b"body")
        new.send(request("GET", "/whoami"))
        answers = [client.response() for client in (asking, new)]
        assert [answer.headers.get("connection") for answer in answers] == ["close"] * 2
        assert answers[0].body == b"body"
        assert answers[1].json()["id"] == 1
        assert [client.rest() for client in (asking, idle, new)] == [b""] * 3
    with secure(server, context) as other:
        assert other.ask("GET", "/whoami").json()["id"] == 2


def test_a_handshake_that_has_begun_is_finished(serve: Serve, authority: Authority, pair: Pair) -> None:
    server = serve(*pair.options)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = authority.trusting().wrap_bio(incoming, outgoing, server_hostname="localhost")
    with server.connect() as client:
        with pytest.raises(ssl.SSLWantReadError):
            tls.do_handshake()
        client.send(outgoing.read())
        while True:
            incoming.write(client.socket.recv(65536))
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                continue
        server.signal(signal.SIGHUP)
        # The first of the two seconds that it is waited for.
        server.wait_for(WORKER_LISTENS, count=2)
        tls.write(request("GET", "/whoami"))
        client.send(outgoing.read())
        said = b""
        while data := client.socket.recv(65536):
            incoming.write(data)
            try:
                while part := tls.read(65536):
                    said += part
            except ssl.SSLWantReadError:
                pass
    assert b'"id":1' in said


def test_a_client_that_does_not_listen_does_not_delay_the_end(serve: Serve, authority: Authority, pair: Pair) -> None:
    server = serve(*pair.options, *KEEP)
    with secure(server, authority.trusting()) as client:
        assert client.ask("GET", "/").status == 200
        began = time.monotonic()
        assert server.stop() == 0
        # The event loops would wait for half a minute.
        assert time.monotonic() - began < 20


# ── clients that take their time ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_who_says_too_little_is_ended(serve: Serve, authority: Authority, pair: Pair, loop: str) -> None:
    server = serve(*pair.options, *KEEP, "--timeout-request-header", "1", "--loop", loop)
    context = authority.trusting()
    with (
        server.connect() as silent, server.connect() as half, secure(server, context) as shaken,
        secure(server, context) as dripping, secure(server, context) as idle,
    ):  # fmt: skip
        assert idle.ask("GET", "/").status == 200
        half.send(HALF_HELLO)
        dripping.send(b"GET / HTTP/1.1\r\nHost:")
        assert silent.rest() == b""
        half.rest()
        assert shaken.rest() == b""
        assert dripping.response().status == 408
        # Who has been served has the time of --timeout-keep-alive.
        assert idle.ask("GET", "/").status == 200
    assert not server.found("Traceback|ERROR")


def test_a_dead_workers_handshakes(serve: Serve, authority: Authority, pair: Pair) -> None:
    """What it had not read is somebody else's; to whom it has spoken nobody says a word of HTTP."""
    # Half a handshake that the dead one had not read waits for its other half in another worker.
    server = serve(*pair.options, *KEEP, "--timeout-request-header", "5")
    with server.connect() as half, secure(server, authority.trusting()) as shaken:
        half.send(HALF_HELLO)
        with server.stopped_workers() as (worker,), ThreadPoolExecutor(1) as pool:
            served = pool.submit(name_of, server, authority.trusting())
            eventually(lambda: server.sockets() > 0 and served.running(), "a client waits")
            os.kill(worker.pid, signal.SIGKILL)
            assert served.result(DEADLINE) == "first"
        assert not half.rest().startswith(b"HTTP")
        with contextlib.suppress(ssl.SSLEOFError):
            assert shaken.rest() == b""


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("a.crt", "b.key"), "--ssl-keyfile {}/b.key: is not the key of the certificate in {}/a.crt"),
        (("a.crt", "missing"), "--ssl-keyfile {}/missing: there is no such file"),
    ],
)
def test_bad_files_cost_one_line(files: tuple[str, str], message: str, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    for name in ("a", "b"):
        authority.issue(name)
    certificate, key = (str(tmp_path / name) for name in files)
    finished = run(EXAMPLE, "--ssl-certfile", certificate, "--ssl-keyfile", key, "--bind", "127.0.0.1:0")
    assert finished.code == 2
    assert finished.text == f"clusterserve: error: {message.format(tmp_path, tmp_path)}\n"
