"""The run folder among several processes: the first one makes, locks and writes it, the others read it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from potstill.errors import StorageError
from potstill.experiments.run_folder import RunFolder
from potstill.processes.group import Processes

_PATIENCE = 10.0  # seconds until a network's file system shows what another machine has made


@contextmanager
def open_folder(root: Path, name: str, processes: Processes, *, resume: bool, overwrite: bool) -> Iterator[RunFolder]:
    """The folder of a run that is about to begin or to go on, until it is over.

    Args:
        root: where run folders stand.
        name: of this one.
        processes: of which the first one writes.
        resume: go on with a run that is there.
        overwrite: delete it first.

    Raises:
        UsageError, StorageError, ArtifactError: as ``RunFolder.create``.
        StorageError: a process does not see the folder that the first one has made.
    """
    if processes.first:
        with RunFolder.create(root, name, resume=resume, overwrite=overwrite) as folder:
            processes.share(None)
            yield folder
        return
    processes.share(None)
    path = root / name
    patience = time.monotonic() + _PATIENCE
    while not path.is_dir():
        if time.monotonic() > patience:
            raise StorageError(
                f"{path} was made by the first process, and rank {processes.rank} does not see it: "
                "give a --root that all machines share"
            )
        time.sleep(0.1)
    yield RunFolder(path)
