"""`Identity`: the TLS context of this worker's servers, and what its new connections are shown."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from typing import Any, Final

from ..credentials import Credentials, new_context, prepare, terms
from ..settings import Settings

#: What is offered by ALPN where the HTTP implementation says nothing of its own.
HTTP_1_1: Final = ("http/1.1",)


class _Door(ssl.SSLContext):
    """What servers have, for good: connections are made of `current`.  Event loops ask for them in this one way."""

    current: ssl.SSLContext

    def wrap_bio(self, *args: Any, **options: Any) -> ssl.SSLObject:
        return self.current.wrap_bio(*args, **options)


class Identity:
    """`context` is for the servers, for the life of this process.

    A context cannot be given a new certificate: one whose key is of another kind would stand *beside* the
    old one, for clients that prefer that (measured, OpenSSL 3.0).  So each renewal is a new context, which a connection
    changes to in its handshake; its session tickets are still those of the first.

    Unless clients are let in on other terms from now on.  Whoever resumes a session is not examined again: then the
    first context goes too, and with it the keys of the sessions that were made on the old terms.
    """

    def __init__(
        self,
        settings: Settings,
        credentials: Credentials,
        protocols: Sequence[str] = HTTP_1_1,
        inherited: ssl.SSLContext | None = None,
    ) -> None:
        """Raises `ssl.SSLError` for credentials that the master has not proved.

        `inherited`: a new context of a process before us, whose other children share our sessions, made for the same
        terms.
        """
        self._settings = settings
        self._protocols = protocols
        self._terms = terms(settings, credentials)
        self.context = _Door(ssl.PROTOCOL_TLS_SERVER)
        self.context.current = self._filled(inherited or new_context(settings), credentials)

    def renew(self, values: dict[str, Any]) -> None:
        """Show these to new connections, as `Credentials.to_json` has them; those that are there go on."""
        credentials = Credentials.from_json(values)
        renewed = self._filled(new_context(self._settings), credentials)
        before, self._terms = self._terms, terms(self._settings, credentials)
        if self._terms != before:
            self.context.current = renewed
            return

        def change(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
            connection.context = renewed

        self.context.current.sni_callback = change

    def _filled(self, context: ssl.SSLContext, credentials: Credentials) -> ssl.SSLContext:
        prepare(context, self._settings, credentials, self._protocols)
        return context
