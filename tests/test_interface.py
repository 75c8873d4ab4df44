"""Which interface an application speaks, told from how it can be called."""

from __future__ import annotations

import functools
from collections.abc import Awaitable
from typing import Any

import django
import flask
import pytest
from django.conf import settings as django_settings
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from starlette.applications import Starlette

from clusterserve.errors import BootError
from clusterserve.interface import built, interface_of

if not django_settings.configured:
    django_settings.configure(SECRET_KEY="of a test", ROOT_URLCONF=__name__)
    django.setup()
urlpatterns: list[Any] = []


async def asgi3(scope: Any, receive: Any, send: Any) -> None: ...
async def unnamed(a: Any, b: Any, c: Any) -> None: ...


def in_front(scope: Any, receive: Any, send: Any) -> Any: ...
def annotated(a: Any, b: Any, c: Any) -> Awaitable[None]: ...
def asgi2(scope: Any) -> Any: ...
def wsgi(environ: Any, start_response: Any) -> Any: ...
def wsgi_of_another_name(env: Any, start: Any) -> Any: ...
def wsgi_with_more(environ: Any, start_response: Any, more: Any = None) -> Any: ...
def three(a: Any, b: Any, c: Any) -> Any: ...
def anything(*args: Any) -> Any: ...
def one_or_two(a: Any, b: Any = None) -> Any: ...
def keyword(a: Any, b: Any, *, c: Any) -> Any: ...
def four(a: Any, b: Any, c: Any, d: Any) -> Any: ...


@functools.wraps(asgi3)
def wrapped(*args: Any) -> Any: ...


class AsyncInstance:
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None: ...

    async def method(self, a: Any, b: Any, c: Any) -> None: ...


class Falcon:
    def __call__(self, env: Any, start_response: Any) -> Any: ...


class Asgi2Class:
    def __init__(self, scope: Any) -> None: ...

    async def __call__(self, receive: Any, send: Any) -> None: ...


class WsgiClass:
    def __init__(self, environ: Any, start_response: Any) -> None: ...

    def __iter__(self) -> Any: ...


class AwaitedClass:
    def __init__(self, a: Any, b: Any, c: Any) -> None: ...

    def __await__(self) -> Any: ...


class ClassOfThree:
    def __init__(self, a: Any, b: Any, c: Any) -> None: ...


def marked(a: Any, b: Any, c: Any) -> Any: ...


# As asgiref marks functions that return a coroutine.
marked._is_coroutine = object()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("app", "interface"),
    [
        (flask.Flask("app"), "wsgi"),
        (WSGIHandler, "wsgi"),
        (ASGIHandler, "asgi3"),
        (Starlette(), "asgi3"),
        (asgi3, "asgi3"),
        (unnamed, "asgi3"),
        (marked, "asgi3"),
        (functools.partial(unnamed, c=3), "asgi3"),
        (functools.partial(functools.partial(unnamed)), "asgi3"),
        (AsyncInstance(), "asgi3"),
        (AsyncInstance().method, "asgi3"),
        (functools.partial(AsyncInstance()), "asgi3"),
        (AwaitedClass, "asgi3"),
        (in_front, "asgi3"),
        (annotated, "asgi3"),
        (wrapped, "asgi3"),
        (asgi2, "asgi2"),
        (Asgi2Class, "asgi2"),
        (wsgi, "wsgi"),
        (wsgi_of_another_name, "wsgi"),
        (wsgi_with_more, "wsgi"),
        (functools.partial(in_front, None), "wsgi"),
        (functools.partial(three, None), "wsgi"),
        (Falcon(), "wsgi"),
        (WsgiClass, "wsgi"),
    ],
)
def test_it_is_told_from_how_it_can_be_called(app: Any, interface: str) -> None:
    if app in (WSGIHandler, ASGIHandler):
        # What a project's wsgi.py and asgi.py have.
        app = app()
    assert interface_of(app, "a:b") == interface


@pytest.mark.parametrize(
    ("app", "why"),
    [
        (three, "it is called with (a, b, c)"),
        (ClassOfThree, "it is called with (a, b, c)"),
        (anything, "it is called with (*args)"),
        (one_or_two, "it is called with (a, b=None)"),
        (iter, "it does not tell how it is called"),
    ],
)
def test_what_could_be_several_is_asked_for(app: Any, why: str) -> None:
    with pytest.raises(BootError) as caught:
        interface_of(app, "a:b")
    assert str(caught.value) == (
        f"cannot tell which interface 'a:b' speaks: {why}; say --interface asgi3, asgi2 or wsgi"
    )


@pytest.mark.parametrize(
    ("app", "reason"),
    [
        (3, "an object of type int cannot be called"),
        (keyword, "it is called with (a, b, *, c), which no interface is"),
        (four, "it is called with (a, b, c, d), which no interface is"),
    ],
)
def test_what_is_none_is_refused(app: Any, reason: str) -> None:
    with pytest.raises(BootError) as caught:
        interface_of(app, "a:b")
    assert str(caught.value) == f"'a:b' is no application: {reason}"


def test_a_factory_is_called_and_the_others_are_not(caplog: pytest.LogCaptureFixture) -> None:
    assert built(wsgi, factory=False) is wsgi
    assert built(lambda: wsgi, factory=True) is wsgi
    assert caplog.text == ""
    assert built(lambda: wsgi, factory=False) is wsgi
    assert "setting the --factory flag explicitly" in caplog.text
    with pytest.raises(TypeError):
        built(wsgi, factory=True)
