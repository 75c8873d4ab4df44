"""`--check-config`: everything that a start would load, loaded, and nothing opened or started."""

from __future__ import annotations

import os
import sys
from typing import Any

import uvicorn
from uvicorn.importer import ImportFromStringError, import_from_string

from ..errors import BootError
from ..interface import built, interface_of
from ..logs import configure
from ..settings import Settings
from ..tracebacks import of_application
from .hooks import load_hooks
from .policies import policy_factory


def check(settings: Settings) -> None:
    """Load the application as a worker does, and the policy, hooks and logging as the master does.

    For a process that ends next: the application is imported into it.  Raises `SettingsError` or `BootError`, as the
    start would.
    """
    configure(settings)
    if settings.app_dir is not None:
        sys.path.insert(0, os.path.abspath(settings.app_dir))
    policy_factory(settings.policy, slots=settings.workers, long_lived=not settings.borrows)
    if settings.hooks is not None:
        load_hooks(settings.hooks)
    try:
        app = import_from_string(settings.app)

        def load() -> Any:
            made = built(app, factory=settings.factory)
            if settings.interface == "auto":
                interface_of(made, settings.app)
            return made

        config = uvicorn.Config(
            load,
            factory=True,
            interface="asgi3",
            http=settings.http,
            ws=settings.ws,
            # Else it reads WEB_CONCURRENCY, which may be blank.
            workers=1,
            lifespan=settings.lifespan,  # type: ignore[arg-type]
            log_config=None,
        )
        config.load()
        if ":" in settings.loop:
            import_from_string(settings.loop)
    except ImportFromStringError as exc:
        raise BootError(f"Error loading ASGI app. {exc}") from None
    except BootError:
        raise
    except (Exception, SystemExit) as exc:
        reason = f"the application {settings.app!r} could not be loaded"
        raise BootError(reason, of_application(exc)) from exc
