"""What a worker's servers show, and whose sessions they resume: real handshakes, in memory."""

from __future__ import annotations

import contextlib
import ssl
from pathlib import Path
from typing import Any

import pytest

from clusterserve.credentials import Credentials, new_context, read, terms
from clusterserve.settings import Settings
from clusterserve.worker.identity import Identity
from tests.helpers.certificates import Authority, Pair


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("strangers"))


def settings(pair: Pair, **values: Any) -> Settings:
    return Settings.create(app="a:b", ssl_certfile=pair.certificate, ssl_keyfile=pair.key, **values)


class Visitor:
    """A client that comes again with the session of its last visit."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        self.session: ssl.SSLSession | None = None

    def visits(self, identity: Identity) -> tuple[str, bool]:
        """The name it is shown, and whether its session was resumed; raises `ssl.SSLError` if it is not let in."""
        ours, theirs = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = self._context.wrap_bio(theirs, ours, server_hostname="localhost", session=self.session)
        server = identity.context.wrap_bio(ours, theirs, server_side=True)
        open_ends = {client, server}
        while open_ends:
            for end in tuple(open_ends):
                with contextlib.suppress(ssl.SSLWantReadError):
                    end.do_handshake()
                    open_ends.discard(end)
        # With TLS 1.3 the session comes with what is said first.
        server.write(b"x")
        assert client.read(1) == b"x"
        self.session = client.session
        certificate = client.getpeercert()
        assert certificate is not None
        names = [value for ((key, value), *_) in certificate["subject"] if key == "commonName"]  # type: ignore[misc]
        return str(names[0]), bool(client.session_reused)


@pytest.fixture(params=[ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
def trusting(request: pytest.FixtureRequest, authority: Authority) -> ssl.SSLContext:
    context = authority.trusting(authority.issue("client"))
    context.minimum_version = context.maximum_version = request.param
    return context


def test_a_session_outlives_a_certificate(authority: Authority, trusting: ssl.SSLContext) -> None:
    first, second = authority.issue("first"), authority.issue("second")
    wanted = settings(first, ssl_ca_certs=str(authority.file), ssl_cert_reqs=2)
    identity, visitor = Identity(wanted, read(wanted)), Visitor(trusting)
    assert visitor.visits(identity) == ("first", False)
    assert visitor.visits(identity) == ("first", True)
    renewed = settings(second, ssl_ca_certs=str(authority.file), ssl_cert_reqs=2)
    identity.renew(read(renewed).to_json())
    resumed = visitor.visits(identity)
    assert resumed[1]
    assert Visitor(trusting).visits(identity) == ("second", False)


def test_but_not_the_terms_on_which_it_was_made(
    authority: Authority, strangers: Authority, trusting: ssl.SSLContext
) -> None:
    """Whoever resumes a session is not asked for a certificate: one of an authority that is no more would be let in."""
    pair = authority.issue("server")
    wanted = settings(pair, ssl_ca_certs=str(authority.file), ssl_cert_reqs=2)
    before = read(wanted)
    identity, visitor = Identity(wanted, before), Visitor(trusting)
    visitor.visits(identity)
    identity.renew(Credentials(before.chain, before.key, strangers.file.read_bytes()).to_json())
    with pytest.raises(ssl.SSLError):
        visitor.visits(identity)
    # And on those of before again: from the beginning.
    identity.renew(before.to_json())
    assert visitor.visits(identity) == ("server", False)
    assert visitor.visits(identity) == ("server", True)


def test_terms_are_whom_to_trust_and_how(authority: Authority, strangers: Authority, tmp_path: Path) -> None:
    pair, other = authority.issue("one"), authority.issue("other")

    def of(pair: Pair, **values: Any) -> str:
        wanted = settings(pair, **values)
        return terms(wanted, read(wanted))

    known, unknown = {"ssl_ca_certs": str(authority.file)}, {"ssl_ca_certs": str(strangers.file)}
    different = [
        of(pair), of(pair, **known), of(pair, **unknown), of(pair, **known, ssl_cert_reqs=1),
        of(pair, **known, ssl_cert_reqs=2), of(pair, ssl_ciphers="ECDHE+AESGCM"),
    ]  # fmt: skip
    assert len(set(different)) == len(different)
    assert of(pair) == of(other)
    copy = tmp_path / "copy"
    copy.write_bytes(authority.file.read_bytes())
    assert of(pair, **known) == of(pair, ssl_ca_certs=str(copy))


def test_sessions_are_shared_with_whom_the_context_is(authority: Authority, trusting: ssl.SSLContext) -> None:
    """As processes do that have inherited it."""
    wanted = settings(authority.issue("shared"))
    visitor, inherited = Visitor(trusting), new_context(wanted)
    one = Identity(wanted, read(wanted), inherited=inherited)
    two = Identity(wanted, read(wanted), inherited=inherited)
    visitor.visits(one)
    assert visitor.visits(two) == ("shared", True)
    assert visitor.visits(Identity(wanted, read(wanted))) == ("shared", False)
