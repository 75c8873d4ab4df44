"""What is wrong with a certificate is said with the name of the file; and what is right becomes a context."""

from __future__ import annotations

import json
import ssl
from pathlib import Path
from typing import Any

import pytest

from clusterserve.checks import SettingValueError
from clusterserve.credentials import MOST, Credentials, new_context, prepare, read
from clusterserve.errors import SettingsError
from clusterserve.settings import Settings
from tests.helpers.certificates import RSA, Authority, Pair


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def authority(directory: Path) -> Authority:
    return Authority(directory)


@pytest.fixture(scope="module")
def pair(authority: Authority) -> Pair:
    return authority.issue("good")


def settings(pair: Pair, **values: Any) -> Settings:
    return Settings.create(app="a:b", **{"ssl_certfile": pair.certificate, "ssl_keyfile": pair.key, **values})


def test_what_was_read_makes_a_context(authority: Authority, pair: Pair) -> None:
    good = settings(pair, ssl_ca_certs=str(authority.file), ssl_cert_reqs=2, ssl_ciphers="ECDHE+AESGCM", ssl_version=5)
    found = read(good)
    again = Credentials.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found
    context = new_context(good)
    prepare(context, good, again, ["h2"])
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.minimum_version is context.maximum_version is ssl.TLSVersion.TLSv1_2
    assert context.cert_store_stats()["x509_ca"] == 1


def test_secrets_are_not_for_everybodys_eyes(authority: Authority) -> None:
    """What is logged, printed or raised may be read by who must not know."""
    secret = settings(authority.issue("secret", password="open sesame"), ssl_keyfile_password="open sesame")
    assert "sesame" not in repr(secret)
    assert "PRIVATE" not in repr(read(secret))
    with pytest.raises(SettingsError) as caught:
        Settings.create(app="a:b", ssl_keyfile_password="open sesame")
    assert "sesame" not in str(caught.value)


def test_one_file_for_both(pair: Pair, tmp_path: Path) -> None:
    both = tmp_path / "both"
    both.write_bytes(pair.key.read_bytes() + pair.certificate.read_bytes())
    assert Settings.create(app="a:b", ssl_certfile=str(both)).tls


@pytest.fixture(scope="module")
def unfit(directory: Path, authority: Authority, pair: Pair) -> None:
    """Files that do not go with `pair`, or with nothing.  A key of RSA's is dear: once for all."""
    authority.issue("other")
    authority.issue("rsa", RSA)
    authority.issue("locked", password="right")
    broken = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"
    for name, text in (("empty", ""), ("junk", "junk\n"), ("broken", broken), ("long", "x" * (MOST + 1))):
        (directory / name).write_text(text)


@pytest.mark.usefixtures("unfit")
@pytest.mark.parametrize(
    ("certificate", "key", "more", "setting", "reason"),
    [
        ("good.crt", "other.key", {}, "ssl_keyfile", "is not the key of the certificate in {}/good.crt"),
        ("good.crt", "rsa.key", {}, "ssl_keyfile", "is not the key of the certificate in {}/good.crt"),
        ("good.crt", "nothing", {}, "ssl_keyfile", "there is no such file"),
        ("good.crt", "empty", {}, "ssl_keyfile", "is empty"),
        ("good.crt", "long", {}, "ssl_keyfile", f"is larger than {MOST} bytes"),
        ("good.crt", "junk", {}, "ssl_keyfile", "holds no private key in PEM form"),
        ("good.crt", "good.crt", {}, "ssl_keyfile", "holds no private key in PEM form"),
        ("good.crt", "broken", {}, "ssl_keyfile", "holds a private key that cannot be read"),
        ("good.crt", None, {}, "ssl_certfile", "holds no private key in PEM form: name its file with ssl_keyfile"),
        ("junk", "good.key", {}, "ssl_certfile", "holds no certificate in PEM form"),
        ("good.key", "good.key", {}, "ssl_certfile", "holds no certificate in PEM form"),
        ("locked.crt", "locked.key", {}, "ssl_keyfile", "is encrypted, and needs ssl_keyfile_password"),
        (
            "locked.crt", "locked.key", {"ssl_keyfile_password": "wrong"}, "ssl_keyfile",
            "is encrypted, and ssl_keyfile_password does not open it",
        ),
        ("good.crt", "good.key", {"ssl_ca_certs": "junk"}, "ssl_ca_certs", "holds no certificate in PEM form"),
        ("good.crt", "good.key", {"ssl_ciphers": "nonsense"}, "ssl_ciphers", "OpenSSL knows no such cipher"),
        (
            "good.crt", "good.key", {"ssl_cert_reqs": 2}, "ssl_cert_reqs",
            "needs ssl_ca_certs: whose certificates clients must have",
        ),
        (
            "good.crt", "good.key", {"dispatch": "request"}, "dispatch",
            "cannot be had with TLS: the worker that has a connection's keys keeps it",
        ),
        (
            "good.crt", "good.key", {"ssl_version": "TLSv1_1"}, "ssl_version",
            "has no counterpart: TLS 1.0 and 1.1 are broken, leave it out",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit(
    directory: Path, certificate: str, key: str | None, more: dict[str, Any], setting: str, reason: str,
) -> None:  # fmt: skip
    values = {name: str(directory / each) if name == "ssl_ca_certs" else each for name, each in more.items()}
    files = {"ssl_certfile": str(directory / certificate), "ssl_keyfile": key and str(directory / key)}
    with pytest.raises(SettingValueError) as caught:
        Settings.create(app="a:b", **files, **values)
    assert (caught.value.setting, caught.value.reason) == (setting, reason.format(directory))


@pytest.mark.parametrize(
    "values",
    [{"ssl_keyfile": "KEY"}, {"ssl_ca_certs": "KEY"}, {"ssl_cert_reqs": 1}, {"ssl_ciphers": "ECDHE"}],
    ids=lambda values: next(iter(values)),
)
def test_what_means_nothing_without_a_certificate(pair: Pair, values: dict[str, Any]) -> None:
    given = {name: str(pair.key) if value == "KEY" else value for name, value in values.items()}
    with pytest.raises(SettingValueError, match="needs ssl_certfile: without a certificate there is no TLS"):
        Settings.create(app="a:b", **given)


def test_a_program_has_its_own(pair: Pair) -> None:
    with pytest.raises(SettingValueError, match="the servers of a program have TLS of their own"):
        Settings.create(exec="x.py", ssl_certfile=str(pair.certificate), ssl_keyfile=str(pair.key))


def test_http2_needs_its_implementation() -> None:
    with pytest.raises(SettingValueError, match="needs the HTTP implementation that has it, which is zttp"):
        Settings.create(app="a:b", http2=True)
