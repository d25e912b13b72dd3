"""The verb that shows a run's models in a browser: serve."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from potstill.errors import Elsewhere, Stopped, UsageError


def serve(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, a run's name below --root, or a model.")],
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    root: Annotated[Path, typer.Option(metavar="DIR", help="The runs to be browsed.")] = Path("runs"),
) -> None:
    """Try a run's models on images in a browser, on this machine alone."""
    from potstill.console import plain

    try:
        from potstill.serve.server import serve as serve_page
    except ImportError as error:
        if error.name not in ("fastapi", "uvicorn", "starlette", "h11"):
            raise
        raise UsageError(f'serve needs {error.name}\nInstall: pip install "potstill[serve]"') from error

    def say(address: str) -> None:
        sys.stdout.write(plain(f"{address}  (Ctrl-C ends it)") + "\n")
        sys.stdout.flush()

    below = root / run
    try:
        serve_page(below if not run.exists() and below.is_dir() else run, host=host, port=port, root=root, say=say)
    except Stopped as stopped:  # as it should end: nothing is left to be said
        raise Elsewhere(stopped.exit_code) from None
