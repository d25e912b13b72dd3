"""The entry point: the verbs, and the one place where errors become exit codes."""

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from potstill import __version__
from potstill.cli import catalogs, checking, experiments, exporting, federating, serving, stores, sweeping, using
from potstill.cli.several import first, refuse_verb, who
from potstill.console import plain
from potstill.errors import Elsewhere, PotstillError, RankLost, Stopped, UsageError, storage_error
from potstill.training.stopping import Stopping

OUR_BUG = 1
WRONG_USAGE = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells say it
CLOSED_PIPE = 141  # 128 + SIGPIPE: what a shell shows of other programs whose reader has gone
_HELP = ["-h", "--help"]
_INTERRUPTED = "interrupted; a run goes on from its last checkpoint with --resume"

app = typer.Typer(
    name="potstill",
    help="Distil a large image classifier into a small one, and say honestly whether it helped.",
    epilog="Start with: potstill run quickstart.",
    no_args_is_help=True,
    # Rich help costs 0.1 s at each start, rich tracebacks show local variables, completion is two more options.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": _HELP},
)


def _version(wanted: bool | None) -> None:
    if wanted:
        typer.echo(f"potstill {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = None,
) -> None:
    """Options before the verb."""


for _verb in (
    experiments.run,
    experiments.train,
    sweeping.sweep,
    using.predict,
    using.evaluate,
    exporting.export,
    serving.serve,
    checking.check,
    experiments.report,
    catalogs.recipes,
    catalogs.models,
    catalogs.methods,
):
    app.command()(_verb)
app.add_typer(stores.app, name="store")
app.add_typer(federating.app, name="federated")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code (GUARANTEES: 0 well, 1 our bug, 2 usage, 3 data, 4 artifact, 5 storage...).

    Args:
        arguments: what follows ``potstill`` on the command line; None takes ``sys.argv``.
    """
    try:
        return _exit_code(arguments)
    finally:
        for stream in (sys.stdout, sys.stderr):
            _let_go(stream)


def _exit_code(arguments: Sequence[str] | None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # any file's name can be shown in any locale
    try:
        with Stopping():  # whatever is being written when a signal comes is tidied up
            code = _obey(list(sys.argv[1:] if arguments is None else arguments))
            sys.stdout.flush()
        if code == INTERRUPTED:  # the parser has caught the KeyboardInterrupt
            return _say(_INTERRUPTED, INTERRUPTED)
        return code if isinstance(code, int) else 0
    except (BrokenPipeError, SystemExit):  # SystemExit: what the parser makes of a BrokenPipeError inside a verb
        return CLOSED_PIPE
    except KeyboardInterrupt:
        return _say(_INTERRUPTED, INTERRUPTED)
    except Stopped as stopped:
        return _say(_INTERRUPTED, stopped.exit_code) if first() else stopped.exit_code
    except Elsewhere as error:
        return error.exit_code
    except PotstillError as error:
        return _say(_named(error), error.exit_code)
    except Exception as error:
        return _other(error)


def _obey(arguments: list[str]) -> Any:
    """Let typer run the verb; it returns an exit code, or None."""
    refuse_verb(arguments)
    command: Any = typer.main.get_command(app)
    if len(arguments) == 2 and arguments[0] in command.commands and arguments[1] in _HELP:
        # Typer would first check the (absent) options before the verb, with pydantic: a tenth of a second.
        verb = command.commands[arguments[0]]
        return verb.main(
            args=arguments[1:], prog_name=f"potstill {arguments[0]}", standalone_mode=False, help_option_names=_HELP
        )
    return command.main(args=arguments, prog_name="potstill", standalone_mode=False)


def _other(error: Exception) -> int:
    if (storage := storage_error(error)) is not None:
        return _say(_named(storage), storage.exit_code)
    if isinstance(error, typer.Abort):
        return _say(_INTERRUPTED, INTERRUPTED)
    # Parser errors: their class is typer's in new versions and click's in older ones.
    if hasattr(error, "format_message") and hasattr(error, "show"):
        with contextlib.suppress(BrokenPipeError):
            error.show()
        return WRONG_USAGE
    sys.stderr.write(plain(who() + "".join(traceback.format_exception(error)), keep="\n"))
    return _say("this is a bug in potstill; please report it with the lines above and the command", OUR_BUG)


def _named(error: PotstillError) -> str:
    """The message, with the rank that has it: not for a recipe, wrong for all, nor for a lost rank, which is named."""
    return str(error) if isinstance(error, UsageError | RankLost) else f"{who()}{error}"


def _say(message: str, code: int) -> int:
    with contextlib.suppress(BrokenPipeError):  # `potstill ... 2>&1 | head`
        sys.stderr.write(plain(f"error: {message}", keep="\n") + "\n")
    return code


def _let_go(stream: Any) -> None:
    """Point a stream whose reader has gone at nothing, or the interpreter complains about it when it exits."""
    try:
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
