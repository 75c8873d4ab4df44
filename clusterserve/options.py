"""The options of the command line, as data: how they are written, which setting they give, what the help says.

Those of uvicorn and gunicorn that are not among them are in peers.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple, NoReturn

from clusterserve.checks import near_match, of_path, usual_attribute
from clusterserve.errors import SettingsError


class Spec(NamedTuple):
    """One option.  `flags[0]` is its name in messages and, under the prefix, in the environment."""

    flags: tuple[str, ...]
    setting: str
    help: str
    metavar: str = ""
    kind: Literal["value", "many", "flag", "pair", "optional"] = "value"
    #: What a bare flag means, if its value is optional.
    bare: str = ""

    @property
    def name(self) -> str:
        return self.flags[0]

    @property
    def variables(self) -> list[str]:
        return [variable(flag) for flag in self.flags if flag.startswith("--")]


def variable(flag: str) -> str:
    return "CLUSTERSERVE_" + flag.removeprefix("--").replace("-", "_").upper()


def _flag(flags: str, help: str) -> Spec:
    names = tuple(flags.split())
    return Spec(names, names[0][2:].replace("-", "_"), help, kind="flag")


def _pair(flag: str, help: str) -> Spec:
    return _flag(flag, help if "[default:" in help else f"{help}  [default: on]")._replace(kind="pair")


def _value(flags: str, metavar: str, help: str, setting: str = "") -> Spec:
    names = tuple(flags.split())
    return Spec(names, setting or names[0][2:].replace("-", "_"), help, metavar)


GROUPS: dict[str, tuple[Spec, ...]] = {
    "Configuration": (
        _value(
            "--config -c",
            "FILE",
            "Read settings from this TOML file.  [default: clusterserve.toml, or tool.clusterserve of pyproject.toml]",
        ),
        _flag("--check-config", "Load everything, the application too, say what is wrong, and exit."),
        _flag("--print-config", "Print every setting and where it comes from, and exit; as the command config does."),
    ),
    "Application": (
        _value("--app-dir --pythonpath", "DIR", "Look for APP in this directory first.  [default: .]"),
        _value("--chdir", "DIR", "Change to this directory first."),
        _flag("--factory", "APP is a function without arguments that returns the application."),
        _value(
            "--interface", "[auto|asgi3|asgi2|wsgi]", "The interface APP speaks; auto: as the way it is called tells."
        ),
        _value("--threads", "N", "Threads in each worker for a WSGI application: so many requests it serves at once."),
        _value("--env -e", "NAME=VALUE", "Set this variable for the application; repeatable.")._replace(kind="many"),
        _value("--env-file", "FILE", "Set variables from this file, unless they are set already."),
        _value(
            "--worker-class -k",
            "NAME",
            "Taken for gunicorn's command lines. sync and gthread: APP is WSGI, with one thread if --threads says no "
            "more; uvicorn.workers.UvicornWorker, uvicorn_worker.UvicornWorker and asgi: as without it.",
        ),
    ),
    "Binding": (
        _value(
            "--bind -b",
            "ADDRESS",
            "Listen here; repeatable. HOST:PORT, [IPV6]:PORT, :PORT, unix:PATH, unix:@NAME, fd://N or fd://NAME (a "
            "socket from systemd); port 0 takes a "
            "free one and says which.  [default: 127.0.0.1:8000]",
        )._replace(kind="many"),
        _value("--host", "HOST", "Listen on this host, instead of --bind.  [default: 127.0.0.1]"),
        _value("--port", "PORT", "Listen on this port, instead of --bind.  [default: $PORT on all hosts, or 8000]"),
        _value("--uds", "PATH", "Listen on this unix socket, instead of --bind."),
        _value("--fd", "N", "Listen on this inherited descriptor, instead of --bind."),
        _value(
            "--uds-permissions",
            "MODE",
            "The mode of the files of unix sockets, as in 660.  [default: 666, less the bits of --umask]",
        ),
        _flag("--reuse-port", "Share TCP addresses with other programs that do the same (SO_REUSEPORT)."),
        _value("--backlog", "N", "Connections the kernel holds until they are accepted."),
    ),
    "Cluster": (
        _value(
            "--workers -w",
            "N|auto",
            "Worker processes.  [default: $WEB_CONCURRENCY, or auto: the processors this process may use]",
        ),
        _value(
            "--policy",
            "NAME",
            "Which worker gets a connection: rr (in turn), least (fewest connections), hash (by the client's address), "
            "none (the workers accept by themselves) or MODULE:CLASS.  [default: $CLUSTERSERVE_SCHED_POLICY, or rr]",
        ),
        _value(
            "--dispatch",
            "[auto|connection|request]",
            "How long a worker has a connection: until it ends, for one request, or (auto) as long as its requests are "
            "cheaper than handing it on.",
        ),
        _flag(
            "--preload",
            "Import APP once, in a template process from which the workers are forked, so that they share its memory "
            "(docs/preload.md).",
        ),
        _value("--max-pending", "N", "Stop accepting while this many connections wait for a worker."),
        _value(
            "--worker-connections --backpressure",
            "N",
            "Hand a worker no more while it has this many connections; what comes then waits. 0: it takes none.",
        ),
        _value(
            "--limit-concurrency",
            "N",
            "Answer 503 to what comes while this many requests and WebSockets are in progress in all workers together.",
        ),
        _value(
            "--timeout-queue",
            "SECONDS",
            "Answer 503 to a request for which no worker was free for this long; 0: let it wait.",
        ),
        _value("--timeout-boot", "SECONDS", "How long a worker may take from its start until it listens."),
        _value(
            "--timeout-graceful-shutdown --graceful-timeout",
            "SECONDS",
            "How long requests in flight may take once the cluster stops.",
        ),
        _value(
            "--shutdown-delay",
            "SECONDS",
            "Once told to stop, serve on as before for this long; the application can know it (docs/draining.md).",
        ),
        _value("--hooks", "MODULE", "Call this module's functions on_fork, on_exit, on_ready … (docs/hooks.md)."),
        _value("--restart-backoff", "SECONDS", "Wait before a dead worker is replaced; doubles while they keep dying."),
        _value("--restart-backoff-max", "SECONDS", "The longest such wait."),
        _value("--min-uptime", "SECONDS", "A worker that served for this long was healthy: then the wait starts over."),
        _value(
            "--max-restarts",
            "N",
            "After so many restarts in a row in vain, wait --restart-backoff-max each time, and say so; 0: never.",
        ),
        _value(
            "--on-worker-exit-code",
            "LIST",
            "Do not restart a worker that exits with one of these codes, separated by commas.",
        ),
        _value("--reload-surge", "N", "Replacements that may start at once while the workers they replace serve on."),
    ),
    "Workers' health": (
        _value(
            "--timeout -t --timeout-worker-healthcheck",
            "SECONDS",
            "A worker whose event loop has not turned for this long, or whose WSGI threads are stuck for so long, "
            "tells the stacks of its threads, and is killed and replaced; 0: never.",
        ),
        _value(
            "--limit-max-requests --max-requests",
            "N",
            "Replace a worker that has served this many requests, once its replacement listens; 0: never.",
        ),
        _value("--limit-max-requests-jitter --max-requests-jitter", "N", "Up to this many more, for each at random."),
        _value("--workers-lifetime", "SECONDS", "Replace a worker that has served for this long; 0: never."),
        _value("--workers-lifetime-jitter", "SECONDS", "Up to this much longer, for each at random."),
        _value(
            "--workers-max-rss",
            "SIZE",
            "Replace a worker that holds more memory, as in 512M or 1.5G; a bare number counts MiB; 0: never.",
        ),
        _value("--rss-sample-interval", "SECONDS", "How often its memory is looked at."),
        _value("--rss-samples", "N", "So many looks in a row must find too much."),
    ),
    "Development": (
        _flag("--reload", "Watch files, and replace all workers as soon as one changes. Needs clusterserve[reload]."),
        _value(
            "--reload-dir",
            "DIR",
            "Watch this directory and all below it; repeatable.  [default: the working directory, and --app-dir]",
            "reload_dirs",
        )._replace(kind="many"),
        _value(
            "--reload-include",
            "PATTERN",
            "Files that fit count too, and directories that do are watched; repeatable.  [default: *.py]",
            "reload_includes",
        )._replace(kind="many"),
        _value(
            "--reload-exclude",
            "PATTERN",
            "Files and directories that fit do not count; repeatable.  [default: .* .py[cod] .sw.* ~*, and what is in "
            "hidden directories, __pycache__, node_modules, site-packages]",
            "reload_excludes",
        )._replace(kind="many"),
        _value("--reload-delay", "SECONDS", "The time between two reloads, at least."),
        _value(
            "--reload-extra-file",
            "FILE",
            "This file counts too, wherever it is, or those that fit this pattern; repeatable.",
            "reload_extra_files",
        )._replace(kind="many"),
    ),
    "Debugging": (
        _value(
            "--debug-port",
            "[HOST:]BASE",
            "Let a debugger (debugpy) attach to the worker in slot i at port BASE + i; 0: at free ports. The log says "
            "where. Needs clusterserve[debug].  [default of HOST: 127.0.0.1]",
        ),
        _flag(
            "--debug-wait",
            "Each worker waits for its debugger before it imports APP.  [default of --debug-port: 127.0.0.1:5678]",
        ),
        _value("--profile", "DIR", "Each worker writes a profile for pstats to this directory when it ends."),
    ),
    "HTTP": (
        _value("--loop", "[auto|asyncio|uvloop]", "The event loop of the workers."),
        _value("--http", "[auto|h11|httptools|zttp]", "The HTTP implementation, or MODULE:CLASS."),
        _flag("--http2", "Offer HTTP/2 as well; needs --http zttp."),
        _value(
            "--timeout-request-header",
            "SECONDS",
            "How long a client may take to send the head of a request; then 408. 0: as long as it likes.",
        ),
        _value(
            "--timeout-request",
            "SECONDS",
            "End a request that runs for longer: 504, or the end of the connection if that has begun. 0: never.",
        ),
        _value(
            "--timeout-request-body",
            "SECONDS",
            "End a request whose body pauses for longer: 408, or the end of the connection. 0: as long as it likes.",
        ),
        _value("--limit-request-line", "BYTES", "The longest line of a request; then 414. 0: as long as it is."),
        _value("--limit-request-fields", "N", "The most header fields of a request; then 431. 0: any number."),
        _value(
            "--limit-request-field-size --limit-request-field_size",
            "BYTES",
            "The longest header field of a request; then 431. 0: as long as it is.",
        ),
        _value("--timeout-keep-alive --keep-alive", "SECONDS", "Close a connection that asks nothing for this long."),
        _value("--root-path", "PATH", "ASGI's root_path, for an app that is mounted below this path."),
        _value("--header", "NAME:VALUE", "Send this header with every response; repeatable.", "headers")._replace(
            kind="many"
        ),
        _pair("--server-header", "Send a Server header."),
        _pair("--date-header", "Send a Date header."),
        _value("--h11-max-incomplete-event-size", "BYTES", "h11 only: what to buffer of an incomplete event."),
        _value("--lifespan", "[auto|on|off]", "Run the application's lifespan."),
        _flag("--reset-contextvars", "Run each request in a fresh context."),
    ),
    "WebSocket": (
        _value("--ws", "[auto|none|websockets|websockets-sansio|wsproto]", "The implementation, or MODULE:CLASS."),
        _value("--ws-max-size", "BYTES", "The largest message."),
        _value("--ws-max-queue", "N", "The longest queue of messages."),
        _value("--ws-ping-interval", "SECONDS", "Time between pings."),
        _value("--ws-ping-timeout", "SECONDS", "Close when a ping is unanswered for this long."),
        _value("--ws-per-message-deflate", "BOOLEAN", "Compress messages."),
    ),
    "TLS": (
        _value(
            "--ssl-certfile --certfile",
            "FILE",
            "Serve https with this certificate, followed by those that prove it; in PEM form, as all of these.",
        ),
        _value("--ssl-keyfile --keyfile", "FILE", "Its private key.  [default: the certificate's file]"),
        _value(
            "--ssl-keyfile-password",
            "TEXT",
            "What opens the key. Who can run ps reads it here: better set $CLUSTERSERVE_SSL_KEYFILE_PASSWORD.",
        ),
        _value("--ssl-ca-certs --ca-certs", "FILE", "Trust clients' certificates that these have signed."),
        _value(
            "--ssl-cert-reqs --cert-reqs", "[0|1|2]", "A client's certificate is not asked for, is welcome, is a must."
        ),
        _value("--ssl-ciphers --ciphers", "LIST", "OpenSSL's cipher list, up to TLS 1.2.  [default: Python's]"),
        _value("--ssl-version", "17|5", "17: the best that both sides know, from TLS 1.2 on; 5: TLS 1.2 only."),
        _pair("--ssl-reload", "Use changed files at once, without a reload; the old ones if the new do not fit."),
    ),
    "Proxies": (
        _pair("--proxy-headers", "Take scheme and client address from X-Forwarded-Proto and X-Forwarded-For."),
        _value(
            "--forwarded-allow-ips",
            "LIST",
            "Trust these headers from these addresses, networks or literals, separated by commas; '*' trusts all.  "
            "[default: $FORWARDED_ALLOW_IPS, or 127.0.0.1,::1]",
        ),
        _value(
            "--proxy-protocol",
            "[off|v1|v2|auto]",
            "Take the client's address from the PROXY header that a proxy sends first; without a value: auto.",
        )._replace(kind="optional", bare="auto"),
        _value(
            "--proxy-allow-from",
            "LIST",
            "Believe these addresses or networks, separated by commas; '*': all. Unix sockets are always believed.",
        ),
    ),
    "Logging": (
        _value("--log-level", "[critical|error|warning|info|debug|trace]", "How much to say.  [default: info]"),
        _value(
            "--log-config --log-config-json",
            "FILE",
            "A configuration of Python's logging as made for uvicorn: .ini, .json, .yaml, .toml.",
        ),
        _value("--log-format", "[text|json]", "Log for people, or a JSON object a line (docs/logging.md)."),
        _value(
            "--error-logfile --log-file",
            "FILE",
            "Log to this file, but for the access log; -: to stderr. SIGUSR1 opens it again.",
        ),
        _pair("--access-log", "Log every request."),
        _value("--access-logfile", "FILE", "Log requests to this file; -: to stdout. SIGUSR1 opens it again."),
        _value(
            "--access-logformat --access-log-format",
            "TEXT",
            "A line of the access log in gunicorn's atoms, as in '%(h)s \"%(r)s\" %(s)s %(L)s'.  [default: uvicorn's]",
        ),
        _value(
            "--access-log-exclude",
            "PATTERN",
            "Do not log requests for such paths, as in '/health*', unless they fail; repeatable.",
        )._replace(kind="many"),
        _pair("--use-colors", "Colour the log.  [default: on a terminal]"),
    ),
    "Process": (
        _value(
            "--user -u", "USER", "Let the workers run as this user, a name or a number; the master stays root.", "uid"
        ),
        _value("--group -g", "GROUP", "Let the workers run in this group.", "gid"),
        _flag("--initgroups", "Taken for gunicorn's command lines: the user's other groups are always theirs too."),
        _value("--umask -m", "MODE", "The umask of the master and the workers, in octal.  [default: as it is]"),
        _value("--pid -p --pid-file", "FILE", "Write the master's process id to this file, and remove it at the end."),
        _value(
            "--name -n --process-name",
            "TEXT",
            "What ps and top show in the titles of the processes, if setproctitle is installed.  [default: APP]",
        ),
        _flag("--capture-output", "What the application prints goes to stderr, where the log is."),
    ),
    "Other": (
        _flag("--version -v", "Say which version this is."),
        _flag("--help -h", "Show this text."),
    ),
}

SPECS = tuple(spec for group in GROUPS.values() for spec in group)
COMMANDS = ("run", "exec", "config", "ctl", "top")

#: What is said to this one start of the program, and nowhere but on its command line.
ONCE: Final = frozenset({"help", "version", "check_config", "print_config"})

#: What the command line does by itself, before there are `Settings`.
OURS: Final = frozenset({"config", "chdir", "env", *ONCE})


def refuse_command(word: str, rest: Sequence[str] = ()) -> NoReturn:
    """Raise what there is to say of a first word that is no application; `rest` are those behind it."""
    if word == "exec":
        raise SettingsError("'exec' comes before its options")
    if word in COMMANDS:
        raise SettingsError(f"{word!r} is reserved and not available in this version")
    if word in ("help", "version"):
        raise SettingsError(f"no such command {word!r}; did you mean '--{word}'?")
    app = next((each for each in rest if ":" in each), None)
    if app is not None:
        hint = f"; did you mean 'clusterserve {app}'?"
    else:
        name, advice = of_path(word)
        hint = f"; did you mean '{name}:{usual_attribute(name)}'{advice}?" if name else ""
    raise SettingsError(f"no such command {word!r}{near_match(word, COMMANDS, 0.75) or hint}")
