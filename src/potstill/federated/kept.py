"""The state after a round, so that a run that was killed goes on from there."""

import contextlib
from pathlib import Path

import torch

from potstill.federated.messages import TEACHER, Arrays
from potstill.federated.rounds import Progress
from potstill.training.checkpoint import load_checkpoint, save_checkpoint

_PARTS = ("state", "best_state", "said")


class Kept:
    """One checkpoint: the server's progress, and what each client remembers (the teacher is sent again).

    Args:
        path: of the file.
        memories: of the clients in this process, by number.
    """

    def __init__(self, path: Path, memories: dict[int, Arrays]) -> None:
        self.path, self.memories = path, memories

    def write(self, progress: Progress) -> None:
        """Take the place of the state after the round before."""
        arrays: Arrays = {f"{part}|{key}": each for part in _PARTS for key, each in getattr(progress, part).items()}
        for number, memory in self.memories.items():
            own = {key: each for key, each in memory.items() if not key.startswith(TEACHER)}
            arrays |= {f"client {number}|{key}": each for key, each in own.items()}
        tensors = {key: torch.from_numpy(each) for key, each in arrays.items()}
        save_checkpoint(self.path, tensors, {"records": progress.records, "best": progress.best})

    def read(self) -> Progress | None:
        """The progress, with the clients' memories put back; None where nothing was kept.

        Raises:
            ArtifactError: the file is damaged.
        """
        for memory in self.memories.values():
            memory.clear()  # of another algorithm
        if not self.path.exists():
            return None
        tensors, facts = load_checkpoint(self.path)
        progress = Progress(list(facts["records"]), int(facts["best"]))
        for name, tensor in tensors.items():
            part, _, key = name.partition("|")
            where = self.memories[int(part.split()[1])] if part not in _PARTS else getattr(progress, part)
            where[key] = tensor.numpy()
        return progress

    def remove(self) -> None:
        """The model is written, so it is of no more use."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
