"""The command line: argv → `Settings` → `run_settings` → an exit code.

click parses and writes the help; what else has a say, and who wins, is in sources.py.  Whatever is wrong costs one line
on stderr and exit code 2, before anything has started.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import NoReturn

import click
from click.core import ParameterSource

from clusterserve.environment import Environment
from clusterserve.errors import ClusterError, SettingsError
from clusterserve.execline import SETTINGS, Line, refuse_foreign, split
from clusterserve.importing import nothing_collected
from clusterserve.options import COMMANDS, GROUPS, SPECS, Spec, refuse_command
from clusterserve.settings import Settings
from clusterserve.sources import Given, Layer, gather, settings_of, unread
from clusterserve.succession import beginning
from clusterserve.surroundings import Reading, Surroundings

_DEFAULTS = {field.name: field.default for field in fields(Settings)}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    if os.getpid() == 1:
        # The kernel gives process 1, that of a container, no signal that it does not handle; everybody else dies of it.
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """What `clusterserve ARGV` does; returns its exit code."""
    # Before anything is changed: a new master is started likewise.
    beginning()
    try:
        program = None
        if argv and argv[0] == "exec":
            program = split(argv[1:])
            argv = program.ours
        elif argv and argv[0] in COMMANDS and argv[0] not in ("run", "config"):
            refuse_command(argv[0])
        line = parse(argv)
        if "help" in line:
            command = _COMMAND if program is None else _EXEC
            click.echo(command.get_help(click.Context(command, info_name="clusterserve", max_content_width=100)))
            return 0
        if "version" in line:
            click.echo(version())
            return 0
        check_platform(sys.platform)
        if program is not None:
            for setting, item in line.items():
                refuse_foreign(setting, item.origin)
        start, environment = _directory(), Environment()
        with environment.anew():
            given = gather(line, parse)
        if program is not None:
            given = _program(given, program)
        if "print_config" in given:
            # Imported when asked for, as whatever else most runs do without.
            from clusterserve.report import report

            click.echo(report(given))
            return 0
        settings = settings_of(given, serves="check_config" not in given)

        def reread() -> Reading:
            try:
                before = Surroundings(environment)
            except OSError as error:
                raise SettingsError(f"the working directory: {error.strerror}") from None
            try:
                os.chdir(start)
                with environment.anew():
                    given = gather(parse(argv), parse)
                    settings = settings_of(given if program is None else _program(given, program))
                if environment.changed:
                    import logging

                    # Their names only: values may be secrets.
                    names = ", ".join(environment.changed)
                    logging.getLogger("clusterserve").info("Variables have changed: %s", names)
                return Reading(settings, before)
            except OSError as error:
                before.restore()
                raise SettingsError(f"{start}: {error.strerror}") from None
            except ClusterError:
                before.restore()
                raise

    except ClusterError as error:
        # Whatever was typed is quoted in these: keep it on one line, and out of the terminal's control codes.
        return _fail("".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error)), error.exit_code)
    try:
        if "check_config" in given:
            from clusterserve.master.check import check

            check(settings)
            click.echo(f"The configuration is good: {settings.app} can be served")
            return 0
        if note := unread(given):
            print(f"clusterserve: warning: {note}", file=sys.stderr)
        # Imported when there is something to run: --help and a mistyped option answer at once.
        with nothing_collected():
            from clusterserve.master.run import run_settings

        return run_settings(settings, exits=True, reread=reread)
    except ClusterError as error:
        return error.exit_code if error.told else _fail(str(error), error.exit_code)
    except KeyboardInterrupt:  # before the master listens to signals
        return 130


def _directory() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        raise SettingsError("the working directory has been removed; start in one that exists") from None


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


def parse(argv: Sequence[str], origin: str = "") -> Layer:
    """The layer of a command line; `origin` is what the names in it begin with.  Raises `SettingsError`."""
    try:
        with _COMMAND.make_context("clusterserve", list(argv)) as context:
            layer = {
                spec.setting: Given(context.params[spec.setting], origin + spec.name, " ")
                for spec in SPECS
                if context.get_parameter_source(spec.setting) is ParameterSource.COMMANDLINE
            }
            words: tuple[str, ...] = context.params["words"]
    except click.NoSuchOption as error:
        from clusterserve.peers import refuse_option

        refuse_option(error.option_name)
    except click.UsageError as error:
        message = error.format_message().rstrip(".")
        raise SettingsError(message[:1].lower() + message[1:]) from None
    if words and words[0] in ("run", "config"):
        if words[0] == "config":
            layer["print_config"] = Given(True, "config")
        words = words[1:]
    elif words and words[0].strip() and ":" not in words[0]:
        refuse_command(words[0], words[1:])
    if len(words) > 1:
        raise SettingsError(f"one APP only, and {words[1]!r} is a second")
    if words and words[0].strip():
        layer["app"] = Given(words[0], "APP")
    return layer


def _program(given: Layer, program: Line) -> Layer:
    """`given`, for `exec`: what variables and files say for applications is not meant."""
    if not program.program:
        raise SettingsError("no program given; say what to run, as in: clusterserve exec script.py, or exec -m module")
    if not program.program.startswith("-m ") and not os.path.exists(program.program):
        raise SettingsError(f"there is no program {program.program!r}")
    given = {setting: item for setting, item in given.items() if setting in SETTINGS}
    return {**given, "exec": Given(program.program, "SCRIPT", " "), "args": Given(program.args, "ARGUMENTS", " ")}


class _Command(click.Command):
    usage = "[run|config] MODULE:ATTRIBUTE [OPTIONS]"

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


def option_help(spec: Spec) -> str:
    """What the help says of an option, with its default."""
    default = _DEFAULTS.get(spec.setting)
    if spec.kind in ("flag", "pair") or "[default:" in spec.help or default in (None, (), ""):
        return spec.help
    shown = f"{default:g}" if isinstance(default, float) else str(default).lower()
    return f"{spec.help}  [default: {shown}]"


def _option(spec: Spec) -> click.Option:
    if spec.kind in ("flag", "pair"):
        flags = [f"{flag}/--no-{flag[2:]}" if spec.kind == "pair" else flag for flag in spec.flags]
        return click.Option([*flags, spec.setting], is_flag=True, default=None, help=spec.help)
    if spec.kind == "optional":
        flags = [*spec.flags, spec.setting]
        return click.Option(
            flags, type=str, metavar=spec.metavar, is_flag=False, flag_value=spec.bare, help=option_help(spec)
        )
    many = spec.kind == "many"
    return click.Option(
        [*spec.flags, spec.setting], type=str, metavar=spec.metavar, multiple=many, help=option_help(spec)
    )


_COMMAND = _Command(
    "clusterserve",
    params=[click.Argument(["words"], nargs=-1), *map(_option, SPECS)],
    add_help_option=False,
    help="Serve the ASGI application MODULE:ATTRIBUTE with a cluster of workers: one master accepts connections and "
    "hands each to the worker whose turn it is.",
    epilog="Every option may be set as CLUSTERSERVE_<OPTION>, APP as CLUSTERSERVE_APP, and several together as "
    "CLUSTERSERVE_CMD_ARGS, or in a file (--config).  What is nearer to the command line wins; a blank variable is as "
    "good as none.  `clusterserve config` shows what comes of it all.",
)

_EXEC = _Exec(
    "clusterserve exec",
    params=[_option(spec) for spec in SPECS if spec.setting in SETTINGS],
    add_help_option=False,
    help="Run a Python program in each worker of a cluster.  Whatever it listens on with asyncio or uvloop is shared: "
    "the master accepts the connections and hands each to the worker whose turn it is.",
    epilog="What stands behind SCRIPT or MODULE is for the program.",
)
