"""The command line: the commands, and the mapping of errors to exit codes.

torch is imported only by the commands that need it, so that --help is fast.
"""

import contextlib
import errno
import functools
import io
import os
import re
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from potstill import __version__
from potstill.cli import cache, catalog, check, deployment, federated, run, sweep
from potstill.cli.run import check_torchrun_command, is_first_process, rank_prefix
from potstill.console import escape_control
from potstill.errors import PotstillError, RankLost, RemoteFailure, Stopped, UsageError, did_you_mean, storage_error
from potstill.training.callbacks import SignalHandler

INTERNAL_ERROR = 1
USAGE_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as in shells
CLOSED_PIPE = 141  # 128 + SIGPIPE, as in shells
_HELP = ["-h", "--help"]
_INTERRUPTED = "interrupted"

app = typer.Typer(
    name="potstill",
    help="Distil a large image classifier into a small one, and test whether distillation helped.",
    epilog="Start with: potstill run quickstart.",
    no_args_is_help=True,
    # Rich help takes 0.1 s at each start, rich tracebacks show local variables, completion adds two options.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": _HELP},
)


def _print_version(value: bool | None) -> None:
    if value:
        typer.echo(f"potstill {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool | None,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = None,
) -> None:
    """Parse the options before the command."""


for _verb in (
    run.run,
    run.train,
    sweep.fit,
    sweep.sweep,
    deployment.predict,
    deployment.evaluate,
    deployment.export,
    deployment.shrink,
    deployment.benchmark,
    deployment.push,
    deployment.serve,
    check.check,
    run.report,
    catalog.recipes,
    catalog.models,
    catalog.methods,
):
    app.command()(_verb)
app.add_typer(cache.cache_app, name="cache")
app.add_typer(federated.federated_app, name="federated")


# Former flags and commands, and their names now.
_RENAMED = {
    "--root": "--output-dir",
    "--replay": "--reproduce",
    "--over": "--search",
    "--inside": "--preprocessing",
    "--max-drop": "--max-accuracy-drop",
    "store": "cache",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 success, 1 bug, 2 usage, 3 data, 4 artifact, 5 storage (see errors.py).

    Args:
        arguments: those after ``potstill`` on the command line; None: ``sys.argv``.
    """
    try:
        return _exit_code(arguments)
    finally:
        for stream in (sys.stdout, sys.stderr):
            _detach_closed_stream(stream)


def _exit_code(arguments: Sequence[str] | None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # so that any file name can be printed in any locale
    try:
        with SignalHandler():  # a signal during a write does not leave temporary files
            code = _run_verb(list(sys.argv[1:] if arguments is None else arguments))
            sys.stdout.flush()
        if code == INTERRUPTED:  # the parser has caught the KeyboardInterrupt
            return _print_error(_INTERRUPTED, INTERRUPTED)
        return code if isinstance(code, int) else 0
    except (BrokenPipeError, SystemExit):  # the parser turns a BrokenPipeError inside a command into SystemExit
        return CLOSED_PIPE
    except (KeyboardInterrupt, Stopped) as stopped:
        code = getattr(stopped, "exit_code", INTERRUPTED)
        return _print_error("; ".join([_INTERRUPTED, *_notes(stopped)]), code) if is_first_process() else code
    except RemoteFailure as error:
        return error.exit_code
    except PotstillError as error:
        return _print_error(_message_with_rank(error), error.exit_code)
    except Exception as error:
        return _report_other_error(error)


@functools.cache
def _command() -> Any:
    return typer.main.get_command(app)


def _run_verb(arguments: list[str]) -> Any:
    if "" in arguments:  # it would be the path of the current folder
        before = shlex.join(["potstill", *arguments[: arguments.index("")]])
        raise UsageError(f"an argument is empty, the one after `{before}`: is a variable of the shell not set?")
    check_torchrun_command(arguments)
    if arguments and (new := _RENAMED.get(arguments[0])) and not new.startswith("--"):
        raise UsageError(f"`potstill {arguments[0]}` has been renamed to `potstill {new}`")
    command = _command()
    if len(arguments) == 2 and arguments[0] in command.commands and arguments[1] in _HELP:
        # Typer would first check the absent options before the command, which takes 0.1 s.
        verb = command.commands[arguments[0]]
        return verb.main(
            args=arguments[1:], prog_name=f"potstill {arguments[0]}", standalone_mode=False, help_option_names=_HELP
        )
    return command.main(args=list(arguments), prog_name="potstill", standalone_mode=False, obj=list(arguments))


def _report_other_error(error: Exception) -> int:
    if (storage := storage_error(error)) is not None:
        return _print_error(_message_with_rank(storage), storage.exit_code)
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return _print_error(f"{str(error.filename)[:60]}... is too long for the name of a file or folder", USAGE_ERROR)
    if isinstance(error, typer.Abort):
        return _print_error(_INTERRUPTED, INTERRUPTED)
    # Parser errors: their class is typer's in new versions and click's in older ones.
    if hasattr(error, "format_message") and hasattr(error, "show"):
        if new := _RENAMED.get(str(getattr(error, "option_name", ""))):
            return _print_error(f"{error.option_name} has been renamed to {new}", USAGE_ERROR)  # type: ignore[attr-defined]
        if message := _invalid_value_message(error) or _setting_message(error):
            return _print_error(message, USAGE_ERROR)
        with contextlib.suppress(BrokenPipeError):
            error.show()
        return USAGE_ERROR
    sys.stderr.write(escape_control(rank_prefix() + "".join(traceback.format_exception(error)), keep="\n"))
    return _print_error(
        "this is a bug in potstill; please report it with the lines above and the command", INTERNAL_ERROR
    )


def _invalid_value_message(error: Exception) -> str | None:
    """Return the message on a value that typer could not convert, with the value; None for other errors.

    Typer's own message leaves the value out since it converts by pydantic; before, its message had it.
    """
    from pydantic import ValidationError

    from potstill.config.settings_errors import expected_value

    cause, parameter = error.__cause__ or error.__context__, getattr(error, "param", None)
    if not isinstance(cause, ValidationError) or parameter is None:
        return None
    details = cause.errors(include_url=False)[0]
    name, text = parameter.opts[0], str(details["input"])
    if choices := _CHOICE.findall(details["msg"].rpartition("is not one of")[2]):
        return f"{name} must be one of {', '.join(choices)}, got {text!r}{did_you_mean(text, choices)}"
    return f"{name} must be {expected_value(details)}, got {text!r}{_number_hint(text, parameter.metavar)}"


def _setting_message(error: Exception) -> str | None:
    """Return the message on a flag of ``run`` that another command has as a setting only; None for other errors."""
    from potstill.config.overrides import SETTING_FLAGS
    from potstill.config.settings_errors import dotted_key

    path, context = SETTING_FLAGS.get(getattr(error, "option_name", None) or ""), getattr(error, "ctx", None)
    if path is None or context is None or not hasattr(error, "possibilities"):
        return None
    if not any("--set" in parameter.opts for parameter in context.command.params):
        return None
    return f"{context.command_path} has no {error.option_name}: give --set {dotted_key(path)}=VALUE"  # type: ignore[attr-defined]


def _number_hint(text: str, metavar: str | None) -> str:
    """Return how a number is written, for one with a comma or, of a share, with a percent sign.

    Example:
        >>> _number_hint("5%", "SHARE"), _number_hint("0,1", None), _number_hint("abc", "SHARE")
        ('; for 5 % give 0.05', '; give 0.1', '')
    """
    with contextlib.suppress(ValueError):
        if text.endswith("%"):
            share = metavar in _SHARES
            return f"; for {text[:-1].strip()} % give {float(text[:-1]) / (100 if share else 1):g}"
        if text.count(",") == 1:
            return f"; give {float(text.replace(',', '.')):g}"
        if metavar in _SHARES and 1 < float(text) <= 100:
            return f"; for {text} % give {float(text) / 100:g}"
    return ""


_SHARES = ("SHARE", "P")  # metavars of shares of 1
_CHOICE = re.compile(r"'([^']+)'")  # in typer's message on an unknown one


def _message_with_rank(error: PotstillError) -> str:
    """Return the message with the rank; without it for usage errors, which all ranks have, and for lost ranks."""
    message = "\n".join([str(error), *_notes(error)])
    return message if isinstance(error, UsageError | RankLost) else f"{rank_prefix()}{message}"


def _notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


def _print_error(message: str, code: int) -> int:
    with contextlib.suppress(BrokenPipeError):  # `potstill ... 2>&1 | head`
        sys.stderr.write(escape_control(f"error: {message}", keep="\n") + "\n")
    return code


def _detach_closed_stream(stream: Any) -> None:
    """Redirect a stream without reader to os.devnull, or the interpreter prints an error at its exit."""
    try:
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
