"""From what was imported to what uvicorn serves: factories called, the interface told, WSGI put behind a bridge.

Relied upon of uvicorn's `Config.load`, next to what asgi.py says (contract test in tests/worker/test_application.py):
`interface` is read, and `ws_protocol_class` has been set, when the factory is called.
"""

from __future__ import annotations

from typing import Any

from ..interface import built, interface_of
from ..settings import Settings
from .threads import Threads


class Application:
    """The one of this worker.  `threads` are those of a WSGI application, None for others, once it is loaded.

    `called`: the factory that it comes from was called elsewhere.
    """

    def __init__(self, settings: Settings, *, called: bool = False) -> None:
        self._settings = settings
        self._factory = settings.factory and not called
        self.threads: Threads | None = None

    def stuck(self) -> bool:
        """Whether nothing is to be expected of its threads; asked with every heartbeat."""
        return self.threads is not None and self.threads.stuck()

    def load(self, app: Any, config: Any) -> Any:
        """What `config`, uvicorn's, is to serve for `app`; called by it as a factory.

        Raises `BootError` if it cannot be told which interface that speaks, and TypeError if it is no factory.
        """
        settings = self._settings
        app = built(app, factory=self._factory)
        interface = interface_of(app, settings.app) if settings.interface == "auto" else settings.interface
        if interface != "wsgi":
            config.interface = interface
            return app
        # a2wsgi is not imported for anybody else.
        from .wsgi import Bridge

        config.interface = "asgi3"
        # WSGI has no WebSockets, and no client is to be told otherwise.
        config.ws_protocol_class = None
        self.threads = Threads(settings.threads)
        return Bridge(app, self.threads)
