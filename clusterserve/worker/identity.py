"""`Identity`: the TLS context of this worker's servers, and what its new connections are shown."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from typing import Any, Final

from ..credentials import Credentials, new_context, prepare
from ..settings import Settings

#: What is offered by ALPN where the HTTP implementation says nothing of its own.
HTTP_1_1: Final = ("http/1.1",)


class Identity:
    """`context` is for the servers, for the life of this process.

    A connection's context cannot be given a new certificate: one whose key is of another kind would stand *beside* the
    old one, for clients that prefer that (measured, OpenSSL 3.0).  So each renewal is a new context, which a connection
    changes to in its handshake; its session tickets are still those of `context`.
    """

    def __init__(
        self,
        settings: Settings,
        credentials: Credentials,
        protocols: Sequence[str] = HTTP_1_1,
        inherited: ssl.SSLContext | None = None,
    ) -> None:
        """Raises `ssl.SSLError` for credentials that the master has not proved.

        `inherited`: a new context of a process before us, whose other children share our sessions.
        """
        self._settings = settings
        self._protocols = protocols
        self.context = inherited or new_context(settings)
        prepare(self.context, settings, credentials, protocols)

    def renew(self, values: dict[str, Any]) -> None:
        """Show these to new connections, as `Credentials.to_json` has them; those that are there go on."""
        renewed = new_context(self._settings)
        prepare(renewed, self._settings, Credentials.from_json(values), self._protocols)

        def change(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
            connection.context = renewed

        self.context.sni_callback = change
