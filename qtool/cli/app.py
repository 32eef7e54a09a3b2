"""The command line: qtool's commands, those of plugins, and how a run of it ends."""

from __future__ import annotations

import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import current_thread, main_thread
from typing import Annotated

import typer

from qtool import __version__
from qtool.cli.calibrate import calibrate
from qtool.cli.doctor import doctor
from qtool.cli.eval import evaluate
from qtool.cli.failures import report_failure, report_interruption, silence_streams
from qtool.cli.fetch import fetch
from qtool.cli.inspect import inspect
from qtool.cli.mitigate import mitigate
from qtool.cli.output import say, write_line
from qtool.cli.pack import pack
from qtool.cli.plugins import plugins
from qtool.cli.report import report
from qtool.cli.run import run
from qtool.cli.transform import transform
from qtool.cli.verify import verify
from qtool.errors import ExitCode, PluginError
from qtool.plugins import Plugins

NAME = "qtool"
EPILOG = (
    "Environment: QTOOL_HOME holds artifacts (default ./qtool-artifacts), QTOOL_CACHE fetched models, "
    "QTOOL_DATA local datasets."
)
COMMANDS: Mapping[str, Callable[..., None]] = {
    "calibrate": calibrate,
    "transform": transform,
    "mitigate": mitigate,
    "pack": pack,
    "eval": evaluate,
    "report": report,
    "run": run,
    "inspect": inspect,
    "verify": verify,
    "fetch": fetch,
    "plugins": plugins,
    "doctor": doctor,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        arguments: Its words; by default those that the process was started with.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Options may not have been read by the time something fails.
    debug = "--debug" in words
    try:
        with _stopped_by("SIGTERM", "SIGHUP"):
            return _run(words)
    except KeyboardInterrupt:
        return report_interruption()
    except BrokenPipeError:
        return silence_streams()
    except Exception as error:  # the one place where whatever went wrong becomes a sentence and an exit code
        return report_failure(error, debug=debug)


def build(found: Plugins) -> typer.Typer:
    """Build the command line: qtool's own commands, then those of plugins.

    Raises:
        PluginError: A plugin brings a command whose name is taken.
    """
    app = typer.Typer(
        name=NAME,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog=EPILOG,
    )
    app.callback()(_options)
    for name, function in COMMANDS.items():
        app.command(name)(function)
    owners = dict.fromkeys(COMMANDS, NAME)
    for hook in found.manager.hook.register_commands.get_hookimpls():
        _add(app, hook.plugin_name, hook.function, owners)
    return app


@contextmanager
def _stopped_by(*names: str) -> Iterator[None]:
    """Let signals that the system has end a command as Ctrl-C does; those that are ignored stay so."""
    here = (
        [getattr(signal, name) for name in names if hasattr(signal, name)] if current_thread() is main_thread() else []
    )
    caught = [one for one in here if signal.getsignal(one) == signal.SIG_DFL]
    for one in caught:
        signal.signal(one, signal.default_int_handler)
    try:
        yield
    finally:
        for one in caught:
            signal.signal(one, signal.SIG_DFL)


def _run(words: list[str]) -> int:
    try:
        code = build(Plugins.discover())(words, prog_name=NAME, standalone_mode=False)
        sys.stdout.flush()
    except SystemExit as stop:  # how Typer ends on a closed pipe, and its completion always
        if isinstance(stop.__context__, BrokenPipeError):
            raise stop.__context__ from None
        code = stop.code
    if code == ExitCode.INTERRUPTED:  # what Typer makes of Ctrl-C
        raise KeyboardInterrupt
    return code if isinstance(code, int) else ExitCode.OK


def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", is_eager=True, callback=lambda asked: _version(asked)),
    ] = False,
) -> None:
    """Post-training quantization of language models: transform, mitigate, pack, and compare fairly."""
    del version


def _version(asked: bool) -> bool:
    """Print the version and end, if that is asked."""
    if asked:
        write_line(f"{NAME} {__version__}")
        raise typer.Exit
    return asked


def _add(app: typer.Typer, plugin: str, register: Callable[..., object], owners: dict[str, str]) -> None:
    """Let one plugin add its commands; one that fails is left out, and the others work."""
    before = _names(app)
    try:
        register(app)
    except Exception as error:  # a stranger's module may raise anything
        say("warning", f"the commands of `{plugin}` are left out: {type(error).__name__}: {error}")
    for name in _names(app) - before:
        if name in owners:
            raise PluginError(
                f"two plugins offer the command `{name}`",
                facts=(("one", owners[name]), ("two", plugin)),
                hint=f"pip uninstall {plugin.partition(':')[0]}",
            )
        owners[name] = plugin


def _names(app: typer.Typer) -> Counter[str]:
    """Count the names of commands and of groups of commands."""
    commands = (one.name or getattr(one.callback, "__name__", "").replace("_", "-") for one in app.registered_commands)
    stated = ((one.name, one.typer_instance and one.typer_instance.info.name) for one in app.registered_groups)
    groups = (name for names in stated for name in names if isinstance(name, str))
    return Counter([*commands, *groups])
