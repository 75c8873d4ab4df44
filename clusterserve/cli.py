"""The command line: argv and the environment → `Settings` → `run_settings` → an exit code.

Sources by rank: the command line, CLUSTERSERVE_CMD_ARGS, CLUSTERSERVE_<OPTION>, then what `Settings` has as defaults.
click parses and writes the help; the variables are read here, after `--env-file`, so that each is asked for once and a
blank one is as good as none.  Whatever is wrong costs one line on stderr and exit code 2, before anything has started.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple, NoReturn

import click
from click.core import ParameterSource

from clusterserve import checks
from clusterserve.checks import SettingValueError
from clusterserve.errors import ClusterError, SettingsError
from clusterserve.execline import SETTINGS, Line, refuse_foreign, split
from clusterserve.options import COMMANDS, GROUPS, INSTEAD, LATER, SPECS, Spec, refuse_command, refuse_option, variable
from clusterserve.settings import Settings

CMD_ARGS = "CLUSTERSERVE_CMD_ARGS"
_ADDRESSES = ("bind", "uds", "fd", "host", "port")
_DEFAULTS = {field.name: field.default for field in fields(Settings)}


class Given(NamedTuple):
    """A value and where it was written, in its user's words: `--port` or `CLUSTERSERVE_PORT`."""

    value: Any
    origin: str


Layer = dict[str, Given]


def main(argv: Sequence[str] | None = None) -> NoReturn:
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """What `clusterserve ARGV` does; returns its exit code."""
    try:
        program = None
        if argv and argv[0] == "exec":
            program = split(argv[1:])
            argv = program.ours
        elif argv and argv[0] in COMMANDS and argv[0] != "run":
            refuse_command(argv[0])
        given = _parse(argv)
        if "help" in given:
            command = _COMMAND if program is None else _EXEC
            click.echo(command.get_help(click.Context(command, info_name="clusterserve", max_content_width=100)))
            return 0
        if "version" in given:
            click.echo(version())
            return 0
        check_platform(sys.platform)
        settings = _settings(given) if program is None else _program_settings(given, program)
    except ClusterError as error:
        # Whatever was typed is quoted in these: keep it on one line, and out of the terminal's control codes.
        return _fail("".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error)), error.exit_code)
    try:
        # Imported when there is something to run: --help and a mistyped option answer at once.
        from clusterserve.master.run import run_settings

        return run_settings(settings, exits=True)
    except ClusterError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:  # before the master listens to signals
        return 130


def check_platform(platform: str) -> None:
    if platform != "linux":
        raise ClusterError(f"clusterserve runs on Linux only, and this is {platform}")


def version() -> str:
    import platform

    import uvicorn

    from clusterserve import __version__

    python = f"{platform.python_implementation()} {platform.python_version()}"
    return f"Running clusterserve {__version__} with uvicorn {uvicorn.__version__}, {python} on {platform.system()}"


def _fail(message: str, code: int) -> int:
    print(f"clusterserve: error: {message}", file=sys.stderr)
    return code


def _settings(line: Layer) -> Settings:
    """The settings that `line`, the parsed command line, and the environment give together."""
    _load_env_file(line.get("env_file") or _cmd_args().get("env_file") or _environment().get("env_file"))
    given: Layer = {}
    for layer in (line, _cmd_args(), _environment()):
        given = {**_addresses_below(given, layer), **given}
    _refuse_later_variables()
    if "app" not in given:
        raise SettingsError("no APP given; say what to serve, as in: clusterserve myapp:app")
    values = {"app_dir": ".", **{name: item.value for name, item in given.items()}}
    if values.get("workers") not in (None, "auto"):
        values["workers_source"] = given["workers"].origin
    try:
        return Settings.create(**values)
    except SettingValueError as error:
        if error.setting not in given:
            raise
        raise _named(error, given[error.setting].origin) from None


def _program_settings(line: Layer, program: Line) -> Settings:
    """The settings for `exec`: what the environment says for applications is not meant."""
    if not program.program:
        raise SettingsError("no program given; say what to run, as in: clusterserve exec script.py, or exec -m module")
    for name, item in line.items():
        refuse_foreign(name, item.origin)
    script = program.program
    if not script.startswith("-m ") and not os.path.exists(script):
        raise SettingsError(f"there is no program {script!r}")
    _load_env_file(line.get("env_file") or _environment().get("env_file"))
    given = {name: item for name, item in {**_environment(), **line}.items() if name in SETTINGS}
    values = {name: item.value for name, item in given.items()}
    if values.get("workers") not in (None, "auto"):
        values["workers_source"] = given["workers"].origin
    try:
        return Settings.create(exec=script, args=program.args, **values)
    except SettingValueError as error:
        if error.setting not in given:
            raise
        raise _named(error, given[error.setting].origin) from None


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


def _named(error: SettingValueError, origin: str) -> SettingsError:
    """The same error, in the words of whoever wrote the value."""
    shown = str(error.value)
    if not shown or not shown.isprintable() or " " in shown:
        shown = repr(shown)
    return SettingsError(f"{origin}{' ' if '-' in origin else '='}{shown}: {error.reason}")


def _load_env_file(given: Given | None) -> None:
    if given is None:
        return
    from dotenv import load_dotenv

    try:
        load_dotenv(checks.file("env_file", given.value))
    except SettingValueError as error:
        raise _named(error, given.origin) from None
    except (OSError, ValueError) as error:
        raise _named(SettingValueError("env_file", given.value, f"cannot be read: {error}"), given.origin) from None


def _refuse_later_variables() -> None:
    for flag in sorted(LATER | INSTEAD.keys()):
        if flag.startswith("--") and os.environ.get(variable(flag), "").strip():
            raise SettingsError(f"{variable(flag)} is set, but {flag} is not available in this version")


def _environment() -> Layer:
    """CLUSTERSERVE_<OPTION> of every option but the policy, whose two variables `Settings` compares."""
    layer: Layer = {}
    app = os.environ.get("CLUSTERSERVE_APP", "").strip()
    if app:
        layer["app"] = Given(app, "CLUSTERSERVE_APP")
    for spec in SPECS:
        if spec.setting in ("policy", "help", "version"):
            continue
        for name in spec.variables:
            text = os.environ.get(name, "").strip()
            if text:
                # A header holds spaces, an address does not: one to a line, or one to a word.
                several = text.splitlines() if spec.setting == "headers" else text.split()
                layer[spec.setting] = Given(several if spec.kind == "many" else text, name)
                break
    return layer


def _cmd_args() -> Layer:
    text = os.environ.get(CMD_ARGS, "")
    if not text.strip():
        return {}
    import shlex

    try:
        layer = _parse(shlex.split(text), f"{CMD_ARGS} ")
    except ValueError as error:  # an unbalanced quote, or a SettingsError
        raise SettingsError(f"in {CMD_ARGS}: {error}") from None
    if "help" in layer or "version" in layer:
        raise SettingsError(f"in {CMD_ARGS}: --help and --version belong on the command line")
    return layer


def _parse(argv: Sequence[str], origin: str = "") -> Layer:
    try:
        with _COMMAND.make_context("clusterserve", list(argv)) as context:
            layer = {
                spec.setting: Given(context.params[spec.setting], origin + spec.name)
                for spec in SPECS
                if context.get_parameter_source(spec.setting) is ParameterSource.COMMANDLINE
            }
            words: tuple[str, ...] = context.params["words"]
    except click.NoSuchOption as error:
        refuse_option(error.option_name)
    except click.UsageError as error:
        message = error.format_message().rstrip(".")
        raise SettingsError(message[:1].lower() + message[1:]) from None
    if words and words[0] == "run":
        words = words[1:]
    elif words and words[0].strip() and ":" not in words[0]:
        refuse_command(words[0])
    if len(words) > 1:
        raise SettingsError(f"one APP only, and {words[1]!r} is a second")
    if words and words[0].strip():
        layer["app"] = Given(words[0], "APP")
    return layer


class _Command(click.Command):
    usage = "[run] MODULE:ATTRIBUTE [OPTIONS]"

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage("clusterserve", self.usage)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records = {param.name: param.get_help_record(ctx) for param in self.params if isinstance(param, click.Option)}
        for title, group in GROUPS.items():
            rows = [record for spec in group if (record := records.get(spec.setting)) is not None]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


class _Exec(_Command):
    usage = "exec [OPTIONS] {SCRIPT | -m MODULE} [ARGUMENTS]"


def _option(spec: Spec) -> click.Option:
    if spec.kind in ("flag", "pair"):
        flags = [f"{flag}/--no-{flag[2:]}" if spec.kind == "pair" else flag for flag in spec.flags]
        return click.Option([*flags, spec.setting], is_flag=True, default=None, help=spec.help)
    default = _DEFAULTS.get(spec.setting)
    shown = f"{default:g}" if isinstance(default, float) else str(default).lower()
    plain = "[default:" in spec.help or default in (None, (), "")
    text = spec.help if plain else f"{spec.help}  [default: {shown}]"
    many = spec.kind == "many"
    return click.Option([*spec.flags, spec.setting], type=str, metavar=spec.metavar, multiple=many, help=text)


_COMMAND = _Command(
    "clusterserve",
    params=[click.Argument(["words"], nargs=-1), *map(_option, SPECS)],
    add_help_option=False,
    help="Serve the ASGI application MODULE:ATTRIBUTE with a cluster of workers: one master accepts connections and "
    "hands each to the worker whose turn it is.",
    epilog="Every option may be set as CLUSTERSERVE_<OPTION>, APP as CLUSTERSERVE_APP, and several together as "
    "CLUSTERSERVE_CMD_ARGS.  The command line wins; a blank variable is as good as none.",
)

_EXEC = _Exec(
    "clusterserve exec",
    params=[_option(spec) for spec in SPECS if spec.setting in SETTINGS],
    add_help_option=False,
    help="Run a Python program in each worker of a cluster.  Whatever it listens on with asyncio or uvloop is shared: "
    "the master accepts the connections and hands each to the worker whose turn it is.",
    epilog="What stands behind SCRIPT or MODULE is for the program.",
)
