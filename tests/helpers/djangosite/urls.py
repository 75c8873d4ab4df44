"""The project's views."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator

from django.core.handlers.asgi import ASGIRequest
from django.db import connection
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.middleware.csrf import get_token
from django.urls import path

from clusterserve import current_worker


def whoami(request: HttpRequest) -> HttpResponse:
    worker = current_worker()
    return JsonResponse({"id": worker.id if worker else 0, "pid": os.getpid(), "kind": type(request).__name__})


def visits(request: HttpRequest) -> HttpResponse:
    """Session, CSRF token, database."""
    request.session["visits"] = request.session.get("visits", 0) + 1
    with connection.cursor() as cursor:
        cursor.execute("SELECT 41 + 1")
        answer = cursor.fetchone()[0]
    return JsonResponse({"visits": request.session["visits"], "token": get_token(request), "answer": answer})


def upload(request: HttpRequest) -> HttpResponse:
    file = request.FILES["file"]
    return JsonResponse({"name": request.POST["name"], "file": file.name, "size": len(file.read())})


def stream(request: HttpRequest) -> StreamingHttpResponse:
    async def later() -> AsyncIterator[str]:
        for number in range(3):
            yield f"{number}\n"

    def now() -> Iterator[str]:
        for number in range(3):
            yield f"{number}\n"

    return StreamingHttpResponse(later() if isinstance(request, ASGIRequest) else now(), content_type="text/plain")


def where(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"path": request.path, "info": request.path_info, "query": request.GET.dict()})


def raises(request: HttpRequest) -> HttpResponse:
    raise RuntimeError("on purpose")


urlpatterns = [
    path("whoami", whoami),
    path("visits", visits),
    path("upload", upload),
    path("stream", stream),
    path("where/é", where),
    path("raise", raises),
]
