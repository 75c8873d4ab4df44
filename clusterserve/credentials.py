"""`Credentials`: what a TLS server shows to its clients and whom it trusts, and the contexts that are made of it.

The master reads the files, proves that they fit, and sends the texts to its workers.  So all workers have the same,
what they have was good as a whole, and they need no right to read the key (`--user`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import ssl
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from clusterserve.checks import SettingValueError

if TYPE_CHECKING:
    from clusterserve.settings import Settings

#: The longest file (bytes): all that a worker is told fits into one message.
MOST: Final = 300_000

#: `ssl.PROTOCOL_TLSv1_2`, whose mention alone is deprecated.
TLS_1_2_ONLY: Final = 5


@dataclass(frozen=True)
class Credentials:
    """The contents of the files, as they are."""

    chain: bytes
    #: Empty: it stands in the chain's file.
    key: bytes = field(repr=False)
    #: Empty: clients' certificates are nothing to us.
    trusted: bytes

    def to_json(self) -> dict[str, str]:
        """In JSON's own types; `from_json` has the same again."""
        return {name: getattr(self, name).decode("latin-1") for name in ("chain", "key", "trusted")}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Credentials:
        return cls(**{name: str(value).encode("latin-1") for name, value in values.items()})


def files(settings: Settings) -> dict[str, str]:
    """The files, by the settings that name them."""
    named = {name: getattr(settings, name) for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs")}
    return {name: path for name, path in named.items() if path is not None}


def read(settings: Settings) -> Credentials:
    """Read the files and prove that they fit together; raises `SettingValueError`, which names what does not."""
    found = {name: _contents(name, path) for name, path in files(settings).items()}
    credentials = Credentials(*(found.get(name, b"") for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs")))
    context = new_context(settings)
    try:
        prepare(context, settings, credentials)
    except ssl.SSLError as error:
        raise _explained(error, settings, credentials) from None
    return credentials


def terms(settings: Settings, credentials: Credentials) -> str:
    """What a client must fulfil to be let in, as a fingerprint.

    A session that is resumed is not examined again: it must not be one that was made on other terms.
    """
    said = repr((settings.ssl_cert_reqs, settings.ssl_ciphers)).encode() + credentials.trusted
    return hashlib.sha256(said).hexdigest()


def new_context(settings: Settings) -> ssl.SSLContext:
    """A context that shows nothing yet.  Processes that inherit the same one by `fork` resume each other's sessions."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if settings.ssl_version == TLS_1_2_ONLY:
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


def prepare(
    context: ssl.SSLContext, settings: Settings, credentials: Credentials, protocols: Sequence[str] = ()
) -> None:
    """Fill a new context; raises `ssl.SSLError`.  `protocols` are offered by ALPN."""
    # An empty password, where none is known: else OpenSSL would ask for it on the terminal.
    password = settings.ssl_keyfile_password or ""
    if settings.ssl_ciphers:
        context.set_ciphers(settings.ssl_ciphers)
    with contextlib.ExitStack() as stack:
        chain = stack.enter_context(_as_file(credentials.chain))
        key = stack.enter_context(_as_file(credentials.key)) if credentials.key else None
        context.load_cert_chain(chain, key, lambda: password)
        context.verify_mode = ssl.VerifyMode(settings.ssl_cert_reqs)
        if credentials.trusted:
            context.load_verify_locations(stack.enter_context(_as_file(credentials.trusted)))
    if protocols:
        context.set_alpn_protocols(list(protocols))


@contextlib.contextmanager
def _as_file(contents: bytes) -> Iterator[str]:
    """A path to these bytes, in memory only: `ssl` takes nothing but paths."""
    fd = os.memfd_create("credentials")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(contents)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def _contents(setting: str, path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            contents = file.read(MOST + 1)
    except OSError as error:
        raise SettingValueError(setting, path, f"cannot be read: {(error.strerror or str(error)).lower()}") from None
    if len(contents) > MOST:
        raise SettingValueError(setting, path, f"is larger than {MOST} bytes")
    if not contents:
        raise SettingValueError(setting, path, "is empty")
    return contents


def _explained(error: ssl.SSLError, settings: Settings, credentials: Credentials) -> SettingValueError:
    """OpenSSL tells in few cases only what is wrong, and never with which file."""
    scratch = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if settings.ssl_ciphers and not _works(lambda: scratch.set_ciphers(settings.ssl_ciphers or "")):
        return SettingValueError("ssl_ciphers", settings.ssl_ciphers, "OpenSSL knows no such cipher")
    with _as_file(credentials.chain) as chain:
        if not _works(lambda: scratch.load_verify_locations(chain)):
            return SettingValueError("ssl_certfile", settings.ssl_certfile, "holds no certificate in PEM form")
    # The second: they are not even of one kind.
    if error.reason in ("KEY_VALUES_MISMATCH", "NO_CERTIFICATE_ASSIGNED", "KEY_TYPE_MISMATCH"):
        reason = f"is not the key of the certificate in {settings.ssl_certfile}"
        return SettingValueError(*_key(settings), reason)
    if error.reason and error.library != "X509":
        return SettingValueError("ssl_certfile", settings.ssl_certfile, error.reason.lower().replace("_", " "))
    if credentials.trusted:
        with _as_file(credentials.trusted) as trusted:
            if not _works(lambda: scratch.load_verify_locations(trusted)):
                return SettingValueError("ssl_ca_certs", settings.ssl_ca_certs, "holds no certificate in PEM form")
    if b"ENCRYPTED" in (credentials.key or credentials.chain):
        reason = "is encrypted, and ssl_keyfile_password does not open it"
        if settings.ssl_keyfile_password is None:
            reason = "is encrypted, and needs ssl_keyfile_password"
        return SettingValueError(*_key(settings), reason)
    if b"PRIVATE KEY-----" in (credentials.key or credentials.chain):
        return SettingValueError(*_key(settings), "holds a private key that cannot be read")
    advice = "" if credentials.key else ": name its file with ssl_keyfile"
    return SettingValueError(*_key(settings), f"holds no private key in PEM form{advice}")


def _key(settings: Settings) -> tuple[str, str | None]:
    """The setting that names the key, and the file."""
    return ("ssl_certfile", settings.ssl_certfile) if settings.ssl_keyfile is None else (
        "ssl_keyfile", settings.ssl_keyfile
    )  # fmt: skip


def _works(step: Any) -> bool:
    try:
        step()
    except ssl.SSLError:
        return False
    return True
