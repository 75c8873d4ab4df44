"""A Django project in one file: the admin, users, sessions and messages are installed, and every page is a template."""

from __future__ import annotations

import os

from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.urls import path

from benchmarks.apps.common import HOLD_SECONDS
from benchmarks.apps.work import hold

settings.configure(
    ALLOWED_HOSTS=["*"],
    SECRET_KEY="a benchmark's",
    ROOT_URLCONF=__name__,
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    INSTALLED_APPS=[
        "django.contrib.admin", "django.contrib.auth", "django.contrib.contenttypes", "django.contrib.sessions",
        "django.contrib.messages", "django.contrib.staticfiles",
    ],
    STATIC_URL="static/",
    MIDDLEWARE=[
        "django.middleware.security.SecurityMiddleware", "django.contrib.sessions.middleware.SessionMiddleware",
        "django.middleware.common.CommonMiddleware", "django.middleware.csrf.CsrfViewMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
        "django.contrib.messages.middleware.MessageMiddleware",
    ],
    TEMPLATES=[
        {
            "BACKEND": "django.template.backends.django.DjangoTemplates",
            "APP_DIRS": True,
            "OPTIONS": {
                "context_processors": [
                    "django.template.context_processors.request", "django.contrib.auth.context_processors.auth",
                    "django.contrib.messages.context_processors.messages",
                ]
            },
        }
    ],
)  # fmt: skip

from django.core.asgi import get_asgi_application  # noqa: E402

app = get_asgi_application()

from django.contrib import admin  # noqa: E402


def pid(request: HttpRequest) -> HttpResponse:
    hold(HOLD_SECONDS)
    return HttpResponse(f"{os.getpid()}\n", content_type="text/plain")


# The page to log in at: of the admin's, the one that needs no database.
urlpatterns = [path("pid", pid), path("", admin.site.login), path("admin/", admin.site.urls)]
