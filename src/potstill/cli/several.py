"""A verb that torchrun has started in several processes: ``torchrun --nproc-per-node 2 -m potstill run ...``."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from potstill.errors import Elsewhere, UsageError
from potstill.processes.launch import attempt, launched

VERBS = ("run", "train")


def first() -> bool:
    """Whether this is the one process, or the first of several: the one that talks."""
    return not launched() or os.environ["RANK"] == "0"


def who() -> str:
    """What a message of another process than the first begins with."""
    return "" if first() else f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}: "


def refuse_verb(arguments: list[str]) -> None:
    """Only training is worth several processes.

    Raises:
        UsageError: another verb, started by torchrun; ``Elsewhere`` in all processes but the first.
    """
    if launched() and arguments and arguments[0] not in VERBS:
        if not first():
            raise Elsewhere(UsageError.exit_code)
        raise UsageError(
            f"torchrun has started `potstill {arguments[0]}` {os.environ['WORLD_SIZE']} times; "
            f"only {' and '.join(VERBS)} share their work: start it without torchrun"
        )


@contextmanager
def together() -> Iterator[dict[str, Any]]:
    """Join the other processes, where there are any.

    Yields:
        Keyword arguments for the pipeline.
    """
    if not launched():  # torch, which takes seconds, is not needed to find a mistake in a recipe
        yield {}
        return
    # Before torch is loaded.  Else each process warns that no parameter is unused, which is what we want.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from potstill.processes.joining import joined

    with joined() as processes:
        yield {"processes": processes}


def go_on_where_restarted(folder: dict[str, Any], name: str) -> None:
    """A run that torchrun starts again, after it has lost a process, goes on from its last checkpoint."""
    if attempt() == 0:
        return
    from potstill.experiments.run_folder import RunFolder

    if RunFolder(Path(folder["root"]) / name).known:
        folder |= {"resume": True, "overwrite": False}
