"""Checks of single values, each a function `(setting, value) -> the value in its own type`.

They take text wherever a variable or an option may bring it, and raise `SettingValueError`, whose reason is worded to
stand behind "--port 99999:" as well as behind "port=99999:".
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from clusterserve.errors import SettingsError

Check: TypeAlias = Callable[[str, object], object]

MAX_INT = 2**31 - 1  # what a C int holds
# In milliseconds, as poll() counts, this still fits a C int.
MAX_SECONDS = 1_000_000

_TRUE = frozenset({"1", "true", "t", "yes", "y", "on"})
_FALSE = frozenset({"0", "false", "f", "no", "n", "off"})
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")


class SettingValueError(SettingsError):
    """One setting has a value it cannot have.

    The parts stay apart so that each door can name the setting as its user wrote it: `port=99999`, `--port 99999`,
    `CLUSTERSERVE_PORT=99999`.
    """

    def __init__(self, setting: str, value: object, reason: str) -> None:
        super().__init__(f"{setting}={value!r}: {reason}")
        self.setting = setting
        self.value = value
        self.reason = reason


def near_match(word: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """`; did you mean 'NAME'?` for the name most like `word`, or nothing."""
    # Imported when something is wrong: a good command line need not pay for it.
    from difflib import get_close_matches

    near = get_close_matches(word, list(names), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""


def whole(low: int, high: int = MAX_INT, *, also: str = "") -> Callable[[str, object], int]:
    limits = f"of at least {low}" if high == MAX_INT else f"from {low} to {high}"

    def check(setting: str, value: object) -> int:
        number = value
        if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,18}", value.strip()):
            number = int(value)
        # A bool is an int to Python and a mistake here.
        if isinstance(number, bool) or not isinstance(number, int) or not low <= number <= high:
            raise SettingValueError(setting, value, f"must be a whole number {limits}{also}")
        return number

    return check


def seconds(*, above_zero: bool = False) -> Callable[[str, object], float]:
    limits = f"above 0 and up to {MAX_SECONDS}" if above_zero else f"from 0 to {MAX_SECONDS}"

    def check(setting: str, value: object) -> float:
        number = value
        if isinstance(value, str) and re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)", value.strip()):
            number = float(value)
        if isinstance(number, int | float) and not isinstance(number, bool):
            # Also what refuses nan, inf and an int too large for a float.
            in_range = 0 < number <= MAX_SECONDS if above_zero else 0 <= number <= MAX_SECONDS
            if in_range:
                return float(number)
        raise SettingValueError(setting, value, f"must be a number of seconds {limits}")

    return check


def octal(setting: str, value: object) -> int:
    """A file mode or a umask: a text is octal, as chmod has it; a number is what it is, as in `0o022`."""
    mode = value
    if isinstance(value, str) and re.fullmatch(r"(0o)?[0-7]{1,5}", value.strip()):
        mode = int(value, 8)
    if isinstance(mode, bool) or not isinstance(mode, int) or not 0 <= mode <= 0o777:
        # In a file, 660 is a decimal number, and not what was meant.
        raise SettingValueError(setting, value, 'must be an octal number from 0 to 777, as in "660" or 0o660')
    return mode


_MULTIPLES = {"": 1 << 20, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def size(setting: str, value: object) -> int:
    """An amount of memory, in bytes: `512M`, `1.5G`, `900K`; a bare number counts MiB."""
    written = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    if isinstance(written, str):
        found = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]+)?) ?([KMGT]?)(?:i?B)?", written.strip(), re.IGNORECASE)
        if found:
            return int(float(found[1]) * _MULTIPLES[found[2].upper()])
    raise SettingValueError(setting, value, "must be an amount of memory, as in 512M or 1.5G; a bare number counts MiB")


def choice(
    *names: str, imports: bool = False, later: tuple[str, ...] = (), any_case: bool = False
) -> Callable[[str, object], str]:
    """One of `names`, or MODULE:ATTRIBUTE where `imports`; the `later` ones are told from nonsense."""
    one_of = "one of " if len(names) > 1 else ""
    allowed = f"must be {one_of}{', '.join(names)}{', or MODULE:ATTRIBUTE' if imports else ''}"

    def check(setting: str, value: object) -> str:
        if isinstance(value, str):
            name = value.lower() if any_case else value
            if name in names or (imports and is_import(name)):
                return name
            if value in later:
                raise SettingValueError(setting, value, f"not available in this version; {allowed}")
            raise SettingValueError(setting, value, allowed + near_match(name, names))
        raise SettingValueError(setting, value, allowed)

    return check


def installed(check: Callable[[str, object], str], packages: Mapping[str, str]) -> Callable[[str, object], str]:
    """`check`, of names some of which need a package that not everybody has."""

    def checked(setting: str, value: object) -> str:
        name = check(setting, value)
        package = packages.get(name)
        if package is not None and importlib.util.find_spec(package) is None:
            reason = f"needs the package {package}, which is not installed: pip install {package}"
            raise SettingValueError(setting, value, reason)
        return name

    return checked


def flag(setting: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in _TRUE | _FALSE:
        return value.strip().lower() in _TRUE
    raise SettingValueError(setting, value, "must be true or false")


def text(setting: str, value: object) -> str:
    if not isinstance(value, str):
        raise SettingValueError(setting, value, "must be a text")
    if "\0" in value:
        raise SettingValueError(setting, value, "holds a NUL byte")
    return value


def passable(setting: str, value: object) -> str:
    """A text that a process can be given: as an argument, in a variable, as a path."""
    given = text(setting, value)
    try:
        os.fsencode(given)
    except UnicodeEncodeError:
        raise SettingValueError(setting, value, "holds a character that no process can be given") from None
    return given


def texts(setting: str, value: object) -> str:
    """A text with commas, or the list that it stands for."""
    return ",".join(text(setting, item) for item in value) if isinstance(value, list | tuple) else text(setting, value)


def codes(setting: str, value: object) -> tuple[int, ...]:
    """Exit codes, as a list or a text with commas, each once."""
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    check = whole(0, 255)
    try:
        return tuple(sorted({check(setting, each) for each in items if each != ""}))
    except SettingValueError:
        raise SettingValueError(setting, value, "must be whole numbers from 0 to 255, separated by commas") from None


def proxy_mode(setting: str, value: object) -> str:
    """A version of the PROXY protocol; whether any is taken is a word for it as well."""
    try:
        return "auto" if flag(setting, value) else "off"
    except SettingValueError:
        return choice("off", "v1", "v2", "auto")(setting, value)


def proxies(setting: str, value: object) -> str:
    """Addresses and networks, or "*"."""
    # Not needed for a start without a proxy, and it takes its time.
    from clusterserve.core.proxy import Trust

    listed = texts(setting, value)
    try:
        Trust(listed)
    except ValueError:
        raise SettingValueError(setting, value, "must be addresses and networks, separated by commas, or *") from None
    return listed


def patterns(setting: str, value: object) -> tuple[str, ...]:
    """One text, or several."""
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, Iterable):
        raise SettingValueError(setting, value, "must be a text, or a list of texts")
    return tuple(text(setting, each) for each in value)


def log_file(setting: str, value: object) -> str:
    """A path that may come to exist; `-` is none."""
    name = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(name, str) or not name or "\0" in name:
        raise SettingValueError(setting, value, "must be the path of a file, or -")
    if os.path.isdir(name):
        raise SettingValueError(setting, name, "must be a file, and this is a directory")
    return name


def log_template(setting: str, value: object) -> str | None:
    """A template of gunicorn's atoms; none if it is empty."""
    # Read late: most logs have none.
    from clusterserve.core.atoms import Template, Who

    written = text(setting, value)
    try:
        Template(written, Who(0, 0, 0))
    except ValueError as error:
        raise SettingValueError(setting, value, str(error)) from None
    return written or None


def optional(check: Check) -> Check:
    return lambda setting, value: None if value is None else check(setting, value)


def several(check: Check) -> Check:
    """A list of such values, one that stands alone, or none."""

    def every(setting: str, value: object) -> tuple[object, ...]:
        if value is None:
            return ()
        items = value if isinstance(value, Iterable) and not isinstance(value, str | os.PathLike) else (value,)
        return tuple(check(setting, each) for each in items)

    return every


def pattern(setting: str, value: object) -> str:
    """A file's path, or a pattern of them."""
    found = text(setting, os.fspath(value) if isinstance(value, os.PathLike) else value)
    if not found.strip():
        raise SettingValueError(setting, value, "is empty")
    return found


def reload(setting: str, value: object) -> bool:
    """Whether to watch files, which needs what not everybody has."""
    wanted = flag(setting, value)
    if wanted and importlib.util.find_spec("watchfiles") is None:
        reason = "needs the package watchfiles, which is not installed: pip install 'clusterserve[reload]'"
        raise SettingValueError(setting, value, reason)
    return wanted


def directory(setting: str, value: object) -> str:
    return _path(setting, value, os.path.isdir, "there is no such directory")


def app_directory(setting: str, value: object) -> str:
    name = os.fspath(value) if isinstance(value, os.PathLike) else value
    # gunicorn's --pythonpath may be several.
    more = isinstance(name, str) and "," in name
    reason = "there is no such directory" + "; it is one alone, others stand in $PYTHONPATH" * more
    return _path(setting, value, os.path.isdir, reason)


def file(setting: str, value: object) -> str:
    # Not isfile: a shell's <(command) is a pipe.
    return _path(setting, value, lambda name: os.path.exists(name) and not os.path.isdir(name), "there is no such file")


def tls_version(setting: str, value: object) -> int:
    """One of `ssl`'s protocols for servers, by its number (uvicorn) or name; what is left of them is two."""
    names = {
        "17": 17, "TLS_SERVER": 17, "2": 17, "TLS": 17, "SSLv23": 17,
        "5": 5, "TLSv1_2": 5,
        "3": 3, "TLSv1": 3, "4": 4, "TLSv1_1": 4,
    }  # fmt: skip
    number = names.get(str(value).removeprefix("PROTOCOL_")) if isinstance(value, int | str) else None
    if number is None:
        raise SettingValueError(
            setting, value, "must be 17 (TLS_SERVER), the best that both sides know, or 5 (TLSv1_2)"
        )
    if number in (3, 4):
        raise SettingValueError(setting, value, "has no counterpart: TLS 1.0 and 1.1 are broken, leave it out")
    return number


def writable_directory(setting: str, value: object) -> str:
    """A directory, which may be missing."""
    name = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(name, str) or not name or "\0" in name:
        raise SettingValueError(setting, value, "must be the path of a directory")
    if os.path.lexists(name):
        if not os.path.isdir(name):
            raise SettingValueError(setting, name, "cannot be made: File exists")
        if not os.access(name, os.W_OK | os.X_OK):
            raise SettingValueError(setting, name, "cannot be written: Permission denied")
    return os.path.abspath(name)


def headers(setting: str, value: object) -> tuple[tuple[str, str], ...]:
    """`Name:Value` texts or pairs."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise SettingValueError(setting, value, "must be a list of 'Name:Value' texts or of pairs")
    return tuple(_header(setting, item) for item in value)


def usual_attribute(module: str) -> str:
    """What an application in a module of this name is called, most likely."""
    # Django's files.
    return "application" if module.rpartition(".")[2] in ("asgi", "wsgi") else "app"


def is_path(module: str) -> bool:
    """Whether somebody has named a module by its file."""
    return "/" in module or (module.endswith(".py") and os.path.isfile(module))


def of_path(path: str) -> tuple[str, str]:
    """The module in the file of this path, and, behind it, where it is to be looked for if that is not here."""
    directory, name = "", path.removesuffix(".py").removeprefix("./").rstrip("/")
    if name.startswith(("/", "..")):
        directory, _, name = name.rpartition("/")
    return name.replace("/", ".").strip("."), f" with --app-dir {directory}" if directory else ""


def module(setting: str, value: object) -> str:
    """The dotted name of a module; nothing is imported."""
    if not isinstance(value, str) or not all(part.isidentifier() for part in value.split(".")):
        raise SettingValueError(setting, value, "must be the name of a module, as in package.module")
    return value


def is_import(value: str) -> bool:
    """Whether `value` reads MODULE:ATTRIBUTE; nothing is imported."""
    return re.fullmatch(r"[^\s:()]+:[^\s:()]+", value) is not None


def _path(setting: str, value: object, exists: Callable[[str], bool], reason: str) -> str:
    name = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(name, str):
        raise SettingValueError(setting, value, "must be a path")
    if not exists(name):
        raise SettingValueError(setting, name, reason)
    return name


def _header(setting: str, item: object) -> tuple[str, str]:
    pair = item.split(":", 1) if isinstance(item, str) else item
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
        raise SettingValueError(setting, item, "a header is 'Name:Value'")
    name, content = pair[0].strip(" \t"), pair[1].strip(" \t")
    if not _TOKEN.fullmatch(name):
        raise SettingValueError(setting, item, f"{name!r} is not the name of a header")
    # What goes past here goes on the wire: a line break would be a header of the user's users.
    if not re.fullmatch(r"[\t\x20-\x7e\x80-\xff]*", content):
        raise SettingValueError(setting, item, "a header's value is one line of Latin-1 text")
    return name, content
