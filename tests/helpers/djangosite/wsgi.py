"""The project's WSGI application, as startproject writes it."""

from __future__ import annotations

import os

from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.helpers.djangosite.settings")

application = get_wsgi_application()
