"""`Settings`: everything a cluster is told, checked once, frozen for its life.

`Settings.create` is the one door: the command line and `Cluster(app, **settings)` both come through it.  Defaults that
the environment may move (WEB_CONCURRENCY, PORT, LISTEN_FDS, CLUSTERSERVE_POLICY, FORWARDED_ALLOW_IPS) are looked up
there (`defaults`), and what settings cannot be together is refused (`contradictions`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Final

from clusterserve import contradictions, defaults
from clusterserve.binds import DEFAULT_PORT, Bind
from clusterserve.checks import (
    Check,
    SettingValueError,
    app_directory,
    choice,
    codes,
    directory,
    file,
    flag,
    headers,
    installed,
    is_import,
    is_path,
    log_file,
    log_template,
    module,
    near_match,
    octal,
    of_path,
    optional,
    pattern,
    patterns,
    proxies,
    proxy_mode,
    reload,
    seconds,
    several,
    size,
    text,
    texts,
    tls_version,
    usual_attribute,
    whole,
)
from clusterserve.defaults import POLICIES
from clusterserve.errors import SettingsError
from clusterserve.launch import LAUNCH_CHECKS, LAUNCH_NAMES, Launch

__all__ = ["POLICIES", "Bind", "SettingValueError", "Settings"]

#: What `run` does to its process, and a `Cluster` not to the process of the program that it is part of.
OF_THE_PROCESS: Final = ("pid", "umask", "reload")

#: Fields that JSON has as lists.
_TUPLES: Final = (
    "access_log_exclude", "reload_dirs", "reload_includes", "reload_excludes", "reload_extra_files",
    "on_worker_exit_code",
)  # fmt: skip

_ADDRESSES: Final = ("bind", "uds", "fd", "host", "port")


@dataclass(frozen=True, kw_only=True)
class Settings(Launch):
    """What to serve, where, with how many workers and how.  Build it with `create`, which checks."""

    app: str  # empty: workers run a program, `exec`
    app_dir: str | None = None  # None: the program that embeds us has its own sys.path in order
    factory: bool = False
    interface: str = "auto"
    threads: int = 10

    binds: tuple[Bind, ...] = (Bind("tcp", host="127.0.0.1", port=DEFAULT_PORT),)
    backlog: int = 2048
    uds_permissions: int | None = None  # None: as uvicorn, whoever may reach the directory may connect

    policy: str = "rr"
    dispatch: str = "auto"
    workers: int = 1
    workers_source: str = ""  # why that many, for the start-up line
    respawn: bool = True  # False: how many workers there are is the program's business
    max_pending: int = 2048
    limit_concurrency: int | None = None  # over all workers together
    worker_connections: int | None = None
    reuse_port: bool = False
    preload: bool = False
    hooks: str | None = None

    timeout_boot: float = 60.0
    timeout_graceful_shutdown: float = 30.0
    shutdown_delay: float = 0.0
    timeout_keep_alive: int = 5
    timeout_queue: float = 30.0
    timeout_request_header: float = 30.0
    timeout_request: float = 0.0
    timeout_request_body: float = 0.0
    limit_request_line: int = 4094
    limit_request_fields: int = 100
    limit_request_field_size: int = 8190
    restart_backoff: float = 0.1
    restart_backoff_max: float = 15.0
    min_uptime: float = 1.0
    max_restarts: int = 16
    on_worker_exit_code: tuple[int, ...] = ()
    reload_surge: int = 1

    timeout: float = 30.0
    limit_max_requests: int = 0
    limit_max_requests_jitter: int = 0
    workers_lifetime: float = 0.0
    workers_lifetime_jitter: float = 0.0
    workers_max_rss: int = 0  # bytes; whoever sets it says "512M", or counts MiB
    rss_sample_interval: float = 30.0
    rss_samples: int = 1

    loop: str = "auto"
    http: str = "auto"
    ws: str = "auto"
    ws_max_size: int = 16 * 1024 * 1024
    ws_max_queue: int = 32
    ws_ping_interval: float | None = 20.0
    ws_ping_timeout: float | None = 20.0
    ws_per_message_deflate: bool = True
    lifespan: str = "auto"
    h11_max_incomplete_event_size: int | None = None
    reset_contextvars: bool = False
    http2: bool = False

    root_path: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    server_header: bool = True
    date_header: bool = True
    proxy_headers: bool = True
    forwarded_allow_ips: str | None = None
    proxy_protocol: str = "off"
    proxy_allow_from: str = "127.0.0.1,::1"

    # In development: who saves a file sees what comes of it.
    reload: bool = False
    reload_dirs: tuple[str, ...] = ()  # none: the working directory, and that of the application
    reload_includes: tuple[str, ...] = ()  # besides those of core/watched.py
    reload_excludes: tuple[str, ...] = ()
    reload_delay: float = 0.25
    reload_extra_files: tuple[str, ...] = ()

    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None  # None: it stands in the certificate's file
    ssl_keyfile_password: str | None = field(default=None, repr=False)
    ssl_ca_certs: str | None = None
    ssl_cert_reqs: int = 0
    ssl_ciphers: str | None = None
    ssl_version: int = 17
    ssl_reload: bool = True

    log_level: str | None = None
    log_config: str | None = None
    log_format: str = "text"
    error_logfile: str = "-"  # stderr
    access_log: bool = True
    access_logfile: str = "-"  # stdout
    access_logformat: str | None = None  # None: uvicorn's
    access_log_exclude: tuple[str, ...] = ()
    use_colors: bool | None = None
    env_file: str | None = None
    capture_output: bool = False

    # Of the process, so of `run` and the command line only.
    pid: str | None = None
    umask: int | None = None
    name: str | None = None

    @classmethod
    def create(cls, **values: object) -> Settings:
        """Check `values`, fill in what the environment decides, and return the settings.

        Takes the fields of this class, except that addresses come as `bind` (a text, a `Bind` or several of them) or
        as `host`, `port`, `uds`, `fd`, and that `workers` may be None or "auto".  Raises `SettingsError`, one line.
        """
        for name in values:
            if name not in _KEYWORDS:
                raise SettingsError(f"there is no setting {name!r}{near_match(name, _KEYWORDS)}")
        checked: dict[str, Any] = {
            name: _CHECKS[name](name, value) for name, value in values.items() if name in _CHECKS
        }
        if "exec" not in checked:
            checked["app"], called = _app(values.get("app"))
            checked["factory"] = called or checked.get("factory", False)
        elif values.get("app") is not None:
            raise SettingsError("app and exec exclude each other: workers serve an application or run a program")
        else:
            checked["app"] = ""
        addresses = {name: values[name] for name in _ADDRESSES if values.get(name) is not None}
        # A program says itself where it listens.
        checked["binds"] = defaults.binds(addresses) if addresses or checked["app"] else ()
        if checked.get("respawn") is False and values.get("workers") is None:
            checked["workers"], source = 0, ""
        else:
            checked["workers"], source = defaults.workers(values.get("workers"), reloads=bool(checked.get("reload")))
        checked["workers_source"] = checked.get("workers_source") or source
        checked["policy"] = defaults.policy(values.get("policy"))
        if checked.get("forwarded_allow_ips") is None:
            # uvicorn's own default, spelled out: a blank variable would make uvicorn trust nobody.
            checked["forwarded_allow_ips"] = defaults.variable("FORWARDED_ALLOW_IPS") or "127.0.0.1,::1"
        settings = cls(**checked)
        contradictions.check(settings)
        return settings

    @property
    def templated(self) -> bool:
        """Whether workers are forked from a template process, for whatever it prepares (worker/preparations.py).

        In development for nothing but speed: it has imported what is ours and uvicorn's, and whoever saves a file waits
        for the application alone.
        """
        return (self.preload or self.tls or self.reload) and self.respawn and not self.exec

    @property
    def timeout_start(self) -> float:
        """How long the first workers may take until they listen, everything included (seconds)."""
        return self.timeout_boot * (2 if self.templated else 1)

    @property
    def own_access_log(self) -> bool:
        """Whether the lines of the access log say more than uvicorn knows when it writes its own."""
        return self.access_log and (self.log_format == "json" or self.access_logformat is not None)

    @property
    def borrows(self) -> bool:
        """Whether workers give connections back: only under a policy, and not if connections are the unit.

        What a program's servers say to their clients is not ours to know: their connections are theirs to the end.
        """
        return self.dispatch != "connection" and self.policy != "none" and not self.exec and not self.tls

    @property
    def tls(self) -> bool:
        """Whether all addresses are served with TLS, whose ends are in the workers: what they accept they keep."""
        return self.ssl_certfile is not None

    @property
    def socket_mode(self) -> int:
        """The mode of the files of unix sockets."""
        if self.uds_permissions is not None:
            return self.uds_permissions
        return 0o666 & ~(self.umask or 0)

    @property
    def title(self) -> str:
        """What it is called where its processes are listed."""
        return self.name or self.app or self.exec

    def to_json(self) -> dict[str, object]:
        """The settings in JSON's own types, without those of `Launch`.  `from_json` gives back what equals the rest."""
        values: dict[str, object] = {
            field.name: getattr(self, field.name) for field in fields(self) if field.name not in LAUNCH_NAMES
        }
        values["binds"] = [str(bind) for bind in self.binds]
        values["headers"] = [list(header) for header in self.headers]
        values.update({name: list(getattr(self, name)) for name in _TUPLES})
        return values

    @classmethod
    def from_json(cls, values: dict[str, object]) -> Settings:
        """The settings that `to_json` wrote; they were checked then and are not checked again."""
        known: dict[str, Any] = dict(values)
        known["binds"] = tuple(Bind.parse(bind) for bind in known["binds"])
        known["headers"] = tuple((name, value) for name, value in known["headers"])
        known.update({name: tuple(known[name]) for name in _TUPLES})
        return cls(**known)


# What may be given to `create` for every field whose meaning is its own, whoever gives it.
_CHECKS: Final[dict[str, Check]] = {
    **LAUNCH_CHECKS,
    "respawn": flag,
    "app_dir": optional(app_directory),
    "factory": flag,
    "interface": choice("auto", "asgi3", "asgi2", "wsgi"),
    "threads": whole(1),
    "backlog": whole(0),
    "uds_permissions": optional(octal),
    "dispatch": choice("auto", "connection", "request"),
    "workers_source": text,
    "max_pending": whole(1),
    "limit_concurrency": optional(whole(1)),
    "worker_connections": optional(whole(0)),
    "reuse_port": flag,
    "preload": flag,
    "hooks": optional(module),
    "timeout_boot": seconds(above_zero=True),
    "timeout_graceful_shutdown": seconds(),
    "shutdown_delay": seconds(),
    "timeout_keep_alive": whole(0),
    "timeout_queue": seconds(),
    "timeout_request_header": seconds(),
    "timeout_request": seconds(),
    "timeout_request_body": seconds(),
    "limit_request_line": whole(0),
    "limit_request_fields": whole(0),
    "limit_request_field_size": whole(0),
    # From zero, doubling would never leave zero: a dying app would be respawned in a busy loop.
    "restart_backoff": seconds(above_zero=True),
    "restart_backoff_max": seconds(above_zero=True),
    "min_uptime": seconds(),
    "max_restarts": whole(0),
    "on_worker_exit_code": codes,
    "reload_surge": whole(1),
    "timeout": seconds(),
    "limit_max_requests": whole(0),
    "limit_max_requests_jitter": whole(0),
    "workers_lifetime": seconds(),
    "workers_lifetime_jitter": seconds(),
    "workers_max_rss": size,
    "rss_sample_interval": seconds(above_zero=True),
    "rss_samples": whole(1),
    "loop": choice("auto", "asyncio", "uvloop", later=("none", "zuvloop")),
    "http": installed(choice("auto", "h11", "httptools", "zttp", imports=True), {"zttp": "zttp"}),
    "ws": installed(
        choice("auto", "none", "websockets", "websockets-sansio", "wsproto", imports=True),
        {"websockets": "websockets", "websockets-sansio": "websockets", "wsproto": "wsproto"},
    ),
    "ws_max_size": whole(1),
    "ws_max_queue": whole(0),
    "ws_ping_interval": optional(seconds()),
    "ws_ping_timeout": optional(seconds()),
    "ws_per_message_deflate": flag,
    "lifespan": choice("auto", "on", "off"),
    "h11_max_incomplete_event_size": optional(whole(1)),
    "reset_contextvars": flag,
    "root_path": text,
    "headers": headers,
    "server_header": flag,
    "date_header": flag,
    "proxy_headers": flag,
    "forwarded_allow_ips": optional(texts),
    "http2": flag,
    "ssl_certfile": optional(file),
    "ssl_keyfile": optional(file),
    "ssl_keyfile_password": optional(text),
    "ssl_ca_certs": optional(file),
    "ssl_cert_reqs": whole(0, 2),
    "ssl_ciphers": optional(text),
    "ssl_version": tls_version,
    "ssl_reload": flag,
    "proxy_protocol": proxy_mode,
    "proxy_allow_from": proxies,
    "reload": reload,
    "reload_dirs": several(directory),
    "reload_includes": several(pattern),
    "reload_excludes": several(pattern),
    "reload_delay": seconds(),
    "reload_extra_files": several(pattern),
    "log_level": optional(choice("critical", "error", "warning", "info", "debug", "trace", any_case=True)),
    "log_config": optional(file),
    "log_format": choice("text", "json"),
    "error_logfile": log_file,
    "access_log": flag,
    "access_logfile": log_file,
    "access_logformat": optional(log_template),
    "access_log_exclude": patterns,
    "use_colors": optional(flag),
    "env_file": optional(file),
    "capture_output": flag,
    "pid": optional(text),
    "umask": optional(octal),
    "name": optional(text),
}
_KEYWORDS: Final = (*_CHECKS, "app", "workers", "policy", *_ADDRESSES)


def _app(value: object) -> tuple[str, bool]:
    """The import string without gunicorn's call brackets, and whether it had them."""
    if not isinstance(value, str):
        given = "nothing" if value is None else f"an object of type {type(value).__name__}"
        raise SettingsError(f'each worker imports the app itself: pass an import string like "module:app", not {given}')
    where, colon, attribute = value.partition(":")
    if not colon:
        module, advice = of_path(value or "module")
        reason = f"an app is MODULE:ATTRIBUTE; did you mean '{module}:{usual_attribute(module)}'{advice}?"
        raise SettingValueError("app", value, reason)
    if is_path(where):
        module, advice = of_path(where)
        reason = f"a module has a name, and no path: did you mean '{module}:{attribute}'{advice}?"
        raise SettingValueError("app", value, reason)
    name = attribute.removesuffix("()")
    factory, bracket, _ = attribute.partition("(")
    if bracket and is_import(f"{where}:{factory}") and name == attribute:
        # gunicorn's may have arguments.
        raise SettingValueError("app", value, "a factory is called without arguments, as in MODULE:FACTORY()")
    if not is_import(f"{where}:{name}"):
        raise SettingValueError("app", value, "an app is MODULE:ATTRIBUTE, or MODULE:FACTORY()")
    return f"{where}:{name}", name != attribute
