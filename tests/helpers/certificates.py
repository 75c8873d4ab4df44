"""Certificates for tests, made by an authority of their own, and what clients need to trust them."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import final

import trustme
from cryptography.hazmat.primitives import serialization

ECDSA = trustme.KeyType.ECDSA
RSA = trustme.KeyType.RSA


@dataclass(frozen=True)
class Pair:
    """The files of a certificate."""

    certificate: Path
    key: Path

    @property
    def options(self) -> tuple[str, ...]:
        return "--ssl-certfile", str(self.certificate), "--ssl-keyfile", str(self.key)


@final
class Authority:
    """Signs certificates for localhost and its addresses.  `file` is its own certificate."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._ca = trustme.CA()
        self.file = directory / "authority.pem"
        self._ca.cert_pem.write_to_path(str(self.file))

    def issue(self, name: str, kind: trustme.KeyType = ECDSA, password: str | None = None) -> Pair:
        """NAME.crt and NAME.key, for the common name `name`."""
        issued = self._ca.issue_cert("localhost", "127.0.0.1", "::1", common_name=name, key_type=kind)
        pair = Pair(self._directory / f"{name}.crt", self._directory / f"{name}.key")
        pair.certificate.write_bytes(b"".join(each.bytes() for each in issued.cert_chain_pems))
        key = issued.private_key_pem.bytes()
        if password is not None:
            secret = serialization.load_pem_private_key(key, None)
            key = secret.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(password.encode()),
            )
        pair.key.write_bytes(key)
        return pair

    def trusting(self, pair: Pair | None = None) -> ssl.SSLContext:
        """A client's context that trusts this authority, and shows `pair` if it is asked who it is."""
        context = ssl.create_default_context(cafile=str(self.file))
        if pair is not None:
            context.load_cert_chain(pair.certificate, pair.key)
        return context
