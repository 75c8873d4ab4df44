"""From what was imported to what uvicorn serves; and what is relied upon of its `Config.load` for that."""

from __future__ import annotations

from typing import Any

import pytest
import uvicorn
from uvicorn.middleware.asgi2 import ASGI2Middleware

from clusterserve.errors import BootError
from clusterserve.settings import Settings
from clusterserve.worker.application import Application
from clusterserve.worker.wsgi import Bridge


async def asgi3(scope: Any, receive: Any, send: Any) -> None: ...
def asgi2(scope: Any) -> Any: ...
def wsgi(environ: Any, start_response: Any) -> Any: ...
def anything(first: Any, *others: Any) -> Any: ...


def loaded(app: Any, **values: Any) -> tuple[uvicorn.Config, Application]:
    application = Application(Settings.create(app="a:b", workers=1, **values))
    config = uvicorn.Config(
        lambda: application.load(app, config), factory=True, proxy_headers=False, log_config=None, log_level="info"
    )
    config.load()
    return config, application


def test_uvicorn_sets_the_protocols_first_and_reads_the_interface_last() -> None:
    seen: list[Any] = []

    def factory() -> Any:
        seen.append(config.ws_protocol_class)
        config.ws_protocol_class = None
        config.interface = "asgi2"
        return asgi2

    config = uvicorn.Config(factory, factory=True, proxy_headers=False, log_config=None, ws="wsproto")
    config.load()
    assert seen != [None]
    assert config.ws_protocol_class is None
    assert isinstance(config.loaded_app, ASGI2Middleware)


def test_asgi_is_uvicorns() -> None:
    config, application = loaded(asgi3)
    assert config.loaded_app is asgi3
    assert config.ws_protocol_class is not None
    assert application.threads is None
    config, application = loaded(asgi2)
    assert isinstance(config.loaded_app, ASGI2Middleware)
    assert application.threads is None


@pytest.mark.parametrize("factory", [True, False])
def test_wsgi_gets_its_threads_and_no_websockets(factory: bool) -> None:
    config, application = loaded((lambda: wsgi) if factory else wsgi, factory=factory, threads=3)
    assert isinstance(config.loaded_app, Bridge)
    assert config.loaded_app.app is wsgi
    assert config.ws_protocol_class is None
    assert application.threads is config.loaded_app.threads
    assert application.threads.places == 3


def test_who_says_the_interface_is_believed() -> None:
    config, _ = loaded(anything, interface="wsgi")
    assert isinstance(config.loaded_app, Bridge)
    config, _ = loaded(anything, interface="asgi3")
    assert config.loaded_app is anything
    with pytest.raises(BootError, match="cannot tell which interface 'a:b' speaks"):
        loaded(anything)
