"""Where debuggers listen: what `debug_port` may be, and which address follows for a worker."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from typing import Final

from clusterserve.binds import Bind
from clusterserve.checks import SettingValueError

#: debugpy's own, and that of its clients.
DEFAULT: Final = "127.0.0.1:5678"

_HOST: Final = r"(?:[A-Za-z0-9][^:\[\]/]*|\[[^\]]*\])"

_LAST: Final = 65535
#: Past the last port it goes on here: those below need privileges (Node).
_FIRST: Final = 1024

#: A text is a base, to which a worker's slot is added; a number is used as it is; a function gives such a number.
DebugPort = str | int | Callable[[], object]


def debug_port(setting: str, value: object) -> DebugPort | None:
    """Check a value of the setting, and that debugpy is there.  A text comes back as HOST:PORT."""
    if value is None:
        return None
    port: DebugPort
    if isinstance(value, str):
        port = _base(setting, value)
    elif callable(value):
        port = value
    else:
        port = exact_port(setting, value)
    require_debugpy(setting, value)
    return port


def require_debugpy(setting: str, value: object) -> None:
    """Raises `SettingValueError` if it is not installed."""
    if importlib.util.find_spec("debugpy") is None:
        raise SettingValueError(
            setting, value, "needs the package debugpy, which is not installed: pip install 'clusterserve[debug]'"
        )


def exact_port(setting: str, value: object) -> int:
    """A port as a number; nothing else, not even its text, is one (Node)."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LAST:
        raise SettingValueError(setting, value, f"must be a port, a whole number from 0 to {_LAST}")
    return value


def address(port: str | int, slot: int) -> tuple[str, int]:
    """Host and port for the worker in `slot`; port 0 is any that is free."""
    if isinstance(port, int):
        return Bind.parse(DEFAULT).host, port
    base = Bind.parse(port)
    number = base.port + slot if base.port else 0
    return base.host, number if number <= _LAST else _FIRST + (number - _LAST - 1) % (_LAST - _FIRST + 1)


def written(host: str, port: int) -> str:
    """HOST:PORT, with brackets where they belong."""
    return str(Bind("tcp", host=host, port=port))


def _base(setting: str, value: str) -> str:
    default = Bind.parse(DEFAULT)
    text = value.strip()
    if re.fullmatch("[0-9]+", text):
        text = f"{default.host}:{text}"
    elif re.fullmatch(_HOST, text):
        text = f"{text}:{default.port}"
    # Not ":5678" for everywhere: whoever reaches a debugger runs what he likes in the worker.
    elif not re.fullmatch(f"{_HOST}:[0-9]+", text):
        raise SettingValueError(setting, value, "must be PORT, HOST:PORT or [IPV6]:PORT")
    try:
        return str(Bind.parse(text))
    except SettingValueError as error:
        raise SettingValueError(setting, value, error.reason) from None
