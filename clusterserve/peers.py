"""The options of uvicorn and gunicorn (some of granian's and hypercorn's, and of versions to come) that are not taken.

Each ends with a line that says so and what to use instead: an option that is ignored in silence is the worst of all.
"""

from __future__ import annotations

from typing import Final, NoReturn

from clusterserve.checks import near_match
from clusterserve.errors import SettingsError
from clusterserve.options import SPECS

_YET: Final = "is not available in this version"
_HTTP2: Final = "has no counterpart: HTTP/2 is offered with --http zttp --http2, and has the measures of that"
_PARSER: Final = (
    "has no counterpart: it concerns gunicorn's own HTTP parser and the workers use uvicorn's, leave it out"
)
_LOGGING: Final = f"{_YET}: name the handlers and formats in a file for --log-config"
_DIRTY: Final = "has no counterpart: give long work to a task queue"
_COUNTED: Final = f"{_YET}: count in --hooks, or in a middleware of the application"
_SIGNALS: Final = f"{_YET}: the master is controlled by signals (docs/settings.md)"

# By what there is to say, since many say the same.
_SAID: Final[dict[str, str]] = {
    "has no counterpart: the workers' event loops shake hands without waiting for anybody, leave it out": """
        --suppress-ragged-eofs --do-handshake-on-connect""",
    _HTTP2: """
        --http-protocols --http2-cleartext --http2-max-concurrent-streams --http2-initial-window-size
        --http2-max-frame-size --http2-max-header-list-size""",
    _PARSER: """
        --permit-obsolete-folding --strip-header-spaces --permit-unconventional-http-method
        --permit-unconventional-http-version --casefold-http-method --forwarder-headers --header-map""",
    _LOGGING: """
        --logger-class --log-syslog --log-syslog-to --log-syslog-prefix --log-syslog-facility""",
    "has no counterpart: the workers speak HTTP only, so let the proxy speak it too": "--protocol --uwsgi-allow-from",
    _DIRTY: "--dirty-app --dirty-workers --dirty-timeout --dirty-threads --dirty-graceful-timeout",
    _COUNTED: """
        --statsd-host --statsd-prefix --dogstatsd-tags --enable-backlog-metric --metrics --metrics-address
        --metrics-bind --metrics-port""",
    _SIGNALS: "--control-socket --control-socket-mode",
    f"{_YET}: the number of workers is fixed with --workers, and changed by SIGTTIN and SIGTTOU": "--max-workers",
    "has no counterpart: the heartbeats of workers need no file, leave it out": "--worker-tmp-dir",
    "has no counterpart: nothing is sent with sendfile, leave it out": "--no-sendfile",
    "has no counterpart: there is no control socket, leave it out": "--no-control-socket",
    "has no counterpart: workers inherit stdin, stdout and stderr, leave it out": "--enable-stdio-inheritance -R",
    "has no counterpart: nothing goes to syslog by itself, leave it out": "--disable-redirect-access-to-syslog",
    "has no counterpart: use a debugger, or python -m trace": "--spew",
    "has no counterpart: load the paste file in a module of your own, and name that as MODULE:ATTRIBUTE": """
        --paste --paster --paste-global""",
    "has no counterpart in uvicorn's workers: leave it out": "--asgi-disconnect-grace-period",
    "has no counterpart: files are watched with watchfiles, or polled if WATCHFILES_FORCE_POLLING=1 is set": """
        --reload-engine""",
    "is called --lifespan here": "--asgi-lifespan",
    "is called --loop here": "--asgi-loop",
    "is called --http here": "--http-parser",
    "is called --ws-max-size here": "--websocket-max-message-size",
    "is not available: leave the background to systemd (docs/systemd.md), a container or another supervisor": """
        --daemon -D""",
}

#: Every such option and the sentence it ends with.
NOT_TAKEN: Final = {flag: f"{flag} {text}" for text, flags in _SAID.items() for flag in flags.split()}


def refuse_option(name: str) -> NoReturn:
    """Raise what there is to say of an option that is not ours."""
    if name in NOT_TAKEN:
        raise SettingsError(NOT_TAKEN[name])
    known = [flag for spec in SPECS for flag in spec.flags]
    raise SettingsError(f"no such option {name}{near_match(name, [*known, *NOT_TAKEN], 0.7)}")
