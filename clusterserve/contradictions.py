"""What settings cannot be together, though each has a value that it may have.

`check` is asked once, by `Settings.create`; later changes (`Cluster.setup`) have rules of their own there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from clusterserve.checks import SettingValueError
from clusterserve.errors import SettingsError

if TYPE_CHECKING:
    from clusterserve.settings import Settings

#: Why `debug_port` cannot be a function here.
NEEDS_FORK: Final = "a function is asked by each fork(): it needs respawn=False, and no workers besides"


def check(settings: Settings) -> None:
    """Raise `SettingsError`, one line, for the first contradiction there is."""
    if settings.restart_backoff > settings.restart_backoff_max:
        reason = f"must not be above restart_backoff_max, which is {settings.restart_backoff_max:g}"
        raise SettingValueError("restart_backoff", settings.restart_backoff, reason)
    if callable(settings.debug_port) and (settings.respawn or settings.workers):
        raise SettingValueError("debug_port", settings.debug_port, NEEDS_FORK)
    if settings.preload and (why := _unforkable(settings)):
        raise SettingsError(f"preload {why}")
    if settings.policy == "none" and settings.dispatch == "request":
        raise SettingValueError("dispatch", "request", "needs a policy: under 'none' workers keep what they accept")
    if settings.http2 and settings.http != "zttp":
        raise SettingValueError("http2", True, "needs the HTTP implementation that has it, which is zttp")
    _check_tls(settings)
    if settings.policy == "none" and settings.proxy_protocol != "off":
        reason = "needs a policy: the master reads the header, and under 'none' the workers accept by themselves"
        raise SettingValueError("proxy_protocol", settings.proxy_protocol, reason)
    if settings.policy == "none" and settings.worker_connections is not None:
        reason = "needs a policy: under 'none' the workers accept by themselves, as many as come"
        raise SettingValueError("worker_connections", settings.worker_connections, reason)
    if settings.log_config is not None:
        for name in ("log_format", "error_logfile", "access_logfile"):
            if getattr(settings, name) not in ("text", "-"):
                reason = "log_config decides where the log goes and what it looks like: give one of them"
                raise SettingValueError(name, getattr(settings, name), reason)


def _unforkable(settings: Settings) -> str:
    """Why there can be no preload; empty if there can."""
    if settings.exec:
        return "is for applications: a program is started anew in every worker"
    if not settings.respawn:
        return "needs respawn: with respawn=False every worker is started for itself"
    if settings.debug_wait:
        return "excludes debug_wait: when a worker could wait for its debugger, the application is imported already"
    if settings.capture_output and (settings.silent or settings.stdio):
        return "excludes capture_output with silent or stdio: what is printed has one place for all workers then"
    return ""


def _check_tls(settings: Settings) -> None:
    """Prove that the files fit together.  What says something of TLS says that TLS is meant."""
    if settings.ssl_certfile is None:
        for name in ("ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers"):
            if value := getattr(settings, name):
                shown = "…" if name == "ssl_keyfile_password" else value
                raise SettingValueError(name, shown, "needs ssl_certfile: without a certificate there is no TLS")
        return
    if settings.exec:
        reason = "is for applications: the servers of a program have TLS of their own"
        raise SettingValueError("ssl_certfile", settings.ssl_certfile, reason)
    if settings.dispatch == "request":
        reason = "cannot be had with TLS: the worker that has a connection's keys keeps it"
        raise SettingValueError("dispatch", "request", reason)
    if settings.ssl_cert_reqs == 2 and settings.ssl_ca_certs is None:
        raise SettingValueError("ssl_cert_reqs", 2, "needs ssl_ca_certs: whose certificates clients must have")
    from clusterserve.credentials import read

    read(settings)
