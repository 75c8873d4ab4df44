"""Where settings are written, by rank, and how what ranks higher wins.

The command line, CLUSTERSERVE_CMD_ARGS, CLUSTERSERVE_<OPTION>, a TOML file, then what `Settings` has as defaults.  Each
source becomes a layer: a value and its origin by setting.  A blank variable is as good as none.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from clusterserve import checks
from clusterserve.checks import SettingValueError, near_match
from clusterserve.defaults import policy_variable
from clusterserve.errors import SettingsError
from clusterserve.launch import make_places
from clusterserve.options import ONCE, OURS, SPECS, Spec, variable
from clusterserve.settings import Settings

CMD_ARGS: Final = "CLUSTERSERVE_CMD_ARGS"
FILE: Final = "clusterserve.toml"
PROJECT: Final = "pyproject.toml"

_ADDRESSES: Final = ("bind", "uds", "fd", "host", "port")

#: What says how to watch files, if they are watched.
_RELOADS: Final = frozenset({"reload_dirs", "reload_includes", "reload_excludes", "reload_delay", "reload_extra_files"})

#: Variables under our prefix that are no options.
_OTHERS: Final = frozenset(
    {CMD_ARGS, "CLUSTERSERVE_APP", "CLUSTERSERVE_SCHED_POLICY", "CLUSTERSERVE_WORKER", "CLUSTERSERVE_WORKER_SLOT"}
)


class Given(NamedTuple):
    """A value and where it was written, in its user's words: `--port`, `CLUSTERSERVE_PORT`, `clusterserve.toml: port`.

    `joint` is what stands there between name and value.
    """

    value: Any
    origin: str
    joint: str = "="

    def refused(self, error: SettingValueError) -> SettingsError:
        """The same error, in the words of whoever wrote the value."""
        reason = error.reason
        if self.origin.rpartition(" ")[2].startswith("--"):
            # Who writes options is told of options.
            reason = _SETTING.sub(lambda found: _NAMES[found[0]], reason)
            if error.value is True:
                return SettingsError(f"{self.origin}: {reason}")
        shown = str(error.value)
        if not shown or not shown.isprintable() or " " in shown:
            shown = repr(shown)
        return SettingsError(f"{self.origin}{self.joint}{shown}: {reason}")


#: Settings whose names are no words of any other meaning, and their options.
_NAMES: Final = {spec.setting: spec.name for spec in SPECS if "_" in spec.setting}
_SETTING: Final = re.compile(rf"\b({'|'.join(_NAMES)})\b")

Layer = dict[str, Given]
Parse = Callable[[Sequence[str], str], Layer]


#: gunicorn's for WSGI, which have one thread if nothing is said of them.
_WSGI_CLASSES: Final = ("sync", "gthread", "gunicorn.workers.sync.SyncWorker", "gunicorn.workers.gthread.ThreadWorker")


def _worker_class(setting: str, value: object) -> None:
    text = checks.text(setting, value)
    if text in ("uvicorn.workers.UvicornWorker", "uvicorn_worker.UvicornWorker", "asgi") or text in _WSGI_CLASSES:
        return
    reasons = {
        "uvicorn.workers.UvicornH11Worker": "write --http h11 --loop asyncio instead",
        "uvicorn_worker.UvicornH11Worker": "write --http h11 --loop asyncio instead",
    }
    reason = "has no counterpart: write gthread for a WSGI application, and leave it out for one of ASGI"
    raise SettingValueError(setting, value, reasons.get(text, reason))


#: Taken for the sake of other servers' command lines, checked, and of no further use.
_COURTESIES: Final[Mapping[str, checks.Check | Callable[[str, object], None]]] = {
    "worker_class": _worker_class,
    "initgroups": checks.flag,
}


def gather(line: Layer, parse: Parse) -> Layer:
    """Everything that is set, `line` being the parsed command line; changes the directory, and reads the files.

    `parse` makes a layer of arguments, given how their origin begins.
    """
    early = _ranked(line, _cmd_args(parse), _environment())
    # As it was typed: relative to the directory in which it was.
    chosen = early.get("config")
    path = None if chosen is None else _absolute(chosen)
    _change_directory(early.get("chdir"))
    _load_env_file(early.get("env_file"))
    file = _file(path, chosen)
    given = _ranked(line, _cmd_args(parse), _environment(), file)
    if given.get("chdir") is file.get("chdir"):
        _change_directory(file.get("chdir"))
    if "env_file" not in early:
        _load_env_file(given.get("env_file"))
        # It may say more, and ranks where variables do.
        given = _ranked(line, _cmd_args(parse), _environment(), file)
    _refuse_strange_variables()
    if "env" in given:
        os.environ.update(_variables(given["env"]))
    return given


def settings_of(given: Layer, *, serves: bool = True) -> Settings:
    """Check `given`, and make it settings.  Raises `SettingsError`, one line, in the words of whoever wrote it.

    `serves`: not only to be looked at, so what they want to be there is made.
    """
    if "app" not in given and "exec" not in given:
        raise SettingsError("no APP given; say what to serve, as in: clusterserve myapp:app")
    given = complete(given)
    values: dict[str, Any] = {"app_dir": ".", **{name: item.value for name, item in given.items()}}
    try:
        for name, check in _COURTESIES.items():
            if name in values:
                check(name, values.pop(name))
        if isinstance(values.get("debug_port"), int):
            # In a file: a base as on the command line, where everything is a text.
            values["debug_port"] = str(values["debug_port"])
        for name in OURS:
            values.pop(name, None)
        if values.get("workers") not in (None, "auto"):
            values["workers_source"] = given["workers"].origin
        settings = Settings.create(**values)
        if serves:
            make_places(settings)
        return settings
    except SettingValueError as error:
        if error.setting not in given:
            raise
        raise given[error.setting].refused(error) from None


def complete(given: Layer) -> Layer:
    """`given`, with what some of it means besides."""
    named = given.get("worker_class")
    if named is None or named.value not in _WSGI_CLASSES:
        return given
    meant: Layer = {"interface": named._replace(value="wsgi"), "threads": named._replace(value=1)}
    return {**meant, **given}


def unread(given: Layer) -> str:
    """A sentence about what is not heeded: options of a reload that is not wanted, and what gunicorn and uvicorn would
    read, a file or variables, where nothing of ours takes its place; else nothing."""
    if not checks.flag("reload", given["reload"].value if "reload" in given else False):
        idle = [item.origin for name, item in given.items() if name in _RELOADS and item.origin.startswith("--")]
        if idle:
            return f"{', '.join(idle)}: without --reload no files are watched"
    if os.environ.get("GUNICORN_CMD_ARGS", "").strip() and not os.environ.get(CMD_ARGS, "").strip():
        return f"GUNICORN_CMD_ARGS is not read; {CMD_ARGS} is"
    theirs = [
        name
        for name, value in sorted(os.environ.items())
        if name.startswith("UVICORN_") and value.strip() and _means(name[8:].lower(), given)
    ]
    if theirs:
        return f"{', '.join(theirs)}: not read; variables begin with CLUSTERSERVE_ here"
    ours = "config" in given or any(item.origin.startswith((f"{FILE}: ", f"{PROJECT}: ")) for item in given.values())
    if ours or os.path.exists(FILE) or not os.path.exists("gunicorn.conf.py"):
        return ""
    return f"gunicorn.conf.py is not read; write its settings to a {FILE} (docs/settings.md)"


def _means(key: str, given: Layer) -> bool:
    """Whether this is a name for a setting, and nobody else has said what it is."""
    spec = _KEYS.get(key)
    setting = spec.setting if spec is not None else key if key == "app" else None
    if setting in _ADDRESSES:
        return not any(name in given for name in _ADDRESSES)
    return setting is not None and setting not in given


# -- ranks -------------------------------------------------------------------------------------------------------------


def _ranked(line: Layer, cmd_args: Layer, environment: Layer, file: Layer | None = None) -> Layer:
    """One layer of all, the highest first."""
    given: Layer = {}
    for layer in (line, cmd_args, environment):
        given = {**_addresses_below(given, layer), **given}
    if "policy" not in given and (found := policy_variable()) is not None:
        # Two variables, compared only if they count.
        given["policy"] = Given(found[1], found[0])
    return {**_addresses_below(given, file or {}), **given}


def _addresses_below(given: Layer, layer: Layer) -> Layer:
    """What of `layer` counts below `given`.

    Where to listen is one setting with several spellings: one that ranks higher replaces all of it, save that host
    and port may come from two places.  Two spellings side by side are a contradiction.
    """
    taken = {name for name in _ADDRESSES if name in given}
    usable = set(_ADDRESSES) if not taken else {"host", "port"} if taken <= {"host", "port"} else set()
    names = [name for name in _ADDRESSES if name in layer and name in usable]
    if len(names) > 1 and names != ["host", "port"]:
        first, second = layer[names[0]].origin, layer[names[1]].origin
        raise SettingsError(f"{first} and {second} exclude each other; several addresses are several --bind")
    return {name: item for name, item in layer.items() if name not in _ADDRESSES or name in names}


# -- the environment ---------------------------------------------------------------------------------------------------


def _environment() -> Layer:
    """CLUSTERSERVE_<OPTION> of every option but the policy, which has two variables."""
    layer: Layer = {}
    app = os.environ.get("CLUSTERSERVE_APP", "").strip()
    if app:
        layer["app"] = Given(app, "CLUSTERSERVE_APP")
    for spec in SPECS:
        if spec.setting == "policy" or spec.setting in ONCE:
            continue
        for name in spec.variables:
            text = os.environ.get(name, "").strip()
            if text:
                # A header holds spaces, an address does not: one to a line, or one to a word.
                several = text.split() if spec.setting == "bind" else text.splitlines()
                layer[spec.setting] = Given(several if spec.kind == "many" else text, name)
                break
    return layer


def _cmd_args(parse: Parse) -> Layer:
    text = os.environ.get(CMD_ARGS, "")
    if not text.strip():
        return {}
    try:
        layer = parse(shlex.split(text), f"{CMD_ARGS} ")
    except ValueError as error:  # an unbalanced quote, or a SettingsError
        raise SettingsError(f"in {CMD_ARGS}: {error}") from None
    if layer.keys() & ONCE:
        raise SettingsError(f"in {CMD_ARGS}: {_once()} belong on the command line")
    return layer


def _once() -> str:
    names = [spec.name for spec in SPECS if spec.setting in ONCE]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _refuse_strange_variables() -> None:
    """A variable under our prefix that is an option of others, or a slip of the pen.

    What is like nothing of ours is left alone: Kubernetes sets some for a service of our name.
    """
    from clusterserve.peers import NOT_TAKEN

    known = {name for spec in SPECS for name in spec.variables} | _OTHERS
    theirs = {variable(flag): flag for flag in NOT_TAKEN if flag.startswith("--")}
    for name, value in sorted(os.environ.items()):
        if not name.startswith("CLUSTERSERVE_") or name in known or not value.strip():
            continue
        if name in theirs:
            raise SettingsError(f"{name} is set, but {NOT_TAKEN[theirs[name]]}")
        positive = name.replace("CLUSTERSERVE_NO_", "CLUSTERSERVE_", 1)
        if positive != name and positive in known:
            raise SettingsError(f"{name} is set, but there is no such option; say {positive}=0")
        if near := near_match(name, known, 0.94):
            raise SettingsError(f"{name} is set, but there is no such option{near}")


def _variables(given: Given) -> dict[str, str]:
    """What `--env` sets, from NAME=VALUE texts or pairs."""
    pairs = [item.split("=", 1) if isinstance(item, str) else list(item) for item in given.value]
    for pair in pairs:
        name = str(pair[0])
        if len(pair) != 2 or not name or not isinstance(pair[1], str) or "=" in name or "\0" in name + pair[1]:
            raise given.refused(SettingValueError("env", "=".join(map(str, pair)), "a variable is NAME=VALUE"))
    return dict(pairs)


def _change_directory(given: Given | None) -> None:
    if given is None:
        return
    try:
        os.chdir(checks.directory("chdir", given.value))
    except SettingValueError as error:
        raise given.refused(error) from None
    except OSError as error:
        raise given.refused(SettingValueError("chdir", given.value, _reason(error))) from None


def _load_env_file(given: Given | None) -> None:
    if given is None:
        return
    from dotenv import load_dotenv

    try:
        load_dotenv(checks.file("env_file", given.value))
    except SettingValueError as error:
        raise given.refused(error) from None
    except (OSError, ValueError) as error:
        raise given.refused(SettingValueError("env_file", given.value, f"cannot be read: {error}")) from None


# -- the file ----------------------------------------------------------------------------------------------------------


def _absolute(chosen: Given) -> str:
    text = checks.text("config", chosen.value)
    if text.endswith(".py") or text.startswith("python:"):
        reason = "a Python file is not read; write its settings to a clusterserve.toml (docs/settings.md)"
        raise chosen.refused(SettingValueError("config", text, reason))
    return os.path.abspath(text.removeprefix("file:"))


def _file(path: str | None, chosen: Given | None) -> Layer:
    """The settings of the file that was chosen; else of the one that lies in this directory, if one does."""
    if path is not None and chosen is not None:
        try:
            text = _text(path)
        except OSError as error:
            reason = f"cannot be read: {_reason(error)}"
            raise chosen.refused(SettingValueError("config", chosen.value, reason)) from None
        return _read(str(chosen.value), text, in_project=os.path.basename(path) == PROJECT)
    for name, in_project in ((FILE, False), (PROJECT, True)):
        try:
            text = _text(name)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise SettingsError(f"{name} cannot be read: {_reason(error)}") from None
        # Most projects' files have nothing for us: neither their faults nor the time to parse them concern us.
        if not in_project or "clusterserve" in text:
            return _read(name, text, in_project=in_project)
    return {}


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except UnicodeDecodeError:
        raise OSError(errno.EILSEQ, "it is not UTF-8") from None


def _read(name: str, text: str, *, in_project: bool) -> Layer:
    from clusterserve import toml

    try:
        table: Any = toml.parse(text)
    except toml.BadTomlError as error:
        raise SettingsError(f"{name} is not TOML: {error}") from None
    if in_project:
        table = table.get("tool", {}).get("clusterserve", {})
        if not isinstance(table, dict):
            raise SettingsError(f"{name}: tool.clusterserve must be a table")
    layer: Layer = {}
    for key, value in table.items():
        plain = key.replace("-", "_")
        spec = _KEYS.get(_GUNICORNS.get(plain, plain))
        setting = spec.setting if spec is not None else "app" if plain in ("app", "wsgi_app") else None
        if setting is None and isinstance(value, dict) and key in ("tool", "clusterserve"):
            raise SettingsError(f"{name}: settings stand at the top of this file, and not in a table {key!r}")
        if setting is None:
            raise _no_such_key(name, key)
        if setting in layer:
            raise SettingsError(f"{layer[setting].origin} and {key} are two names of one setting")
        layer[setting] = Given(_pairs(spec, value), f"{name}: {key}")
    return layer


def _no_such_key(name: str, key: str) -> SettingsError:
    from clusterserve.peers import NOT_TAKEN

    flag = "--" + key.replace("_", "-")
    said = next((NOT_TAKEN[each] for each in NOT_TAKEN if each.replace("_", "-") == flag), None)
    if said is not None:
        return SettingsError(f"{name}: {key} is set, but {said}")
    plain = key.replace("-", "_")
    return SettingsError(f"{name}: there is no setting {key!r}{near_match(plain, [*_KEYS, 'app'])}")


def _pairs(spec: Spec | None, value: object) -> object:
    """Tables, for what is NAME=VALUE or NAME: VALUE elsewhere; where several are possible, one may stand alone."""
    if spec is None or spec.kind != "many":
        return value
    if isinstance(value, dict):
        return list(value.items())
    return [value] if isinstance(value, str) else value


#: What gunicorn calls its settings in its own files, where that is none of its options.
_GUNICORNS: Final = {
    "accesslog": "access_logfile", "errorlog": "error_logfile", "keepalive": "keep_alive", "logconfig": "log_config",
    "logconfig_json": "log_config_json", "loglevel": "log_level", "pidfile": "pid", "preload_app": "preload",
    "proc_name": "name", "proxy_allow_ips": "proxy_allow_from", "raw_env": "env",
}  # fmt: skip

#: What a key in the file may be: an option's names without their dashes, or the setting it gives.
_KEYS: Final[dict[str, Spec]] = {
    key: spec
    for spec in SPECS
    if spec.setting not in ONCE and spec.setting != "config"
    for key in (spec.setting, *(flag[2:].replace("-", "_") for flag in spec.flags if flag.startswith("--")))
}
