"""Which stores there are, found by key and removed.  No torch here."""

import contextlib
import errno
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.errors import ArtifactError, StorageError, UsageError, nearest
from potstill.store.claims import NAME as LOCK
from potstill.store.claims import Claims
from potstill.store.files import Files
from potstill.store.layout import Layout
from potstill.store.manifest import Manifest
from potstill.store.records import Record

_KEY = re.compile(r"[0-9a-f]{16}")
_LEFT = re.compile(r"\.[0-9a-f]{16}\.(removed|[0-9a-f]{8}\.new)")
_SHORTEST = 4  # characters of a key that suffice where no other begins so
_ATTEMPTS = 5


@dataclass(frozen=True)
class Listed:
    """A store as it is found in its folder; nothing is checked but the manifest.

    Attributes:
        path: its folder.
        size: bytes on the disk.
        used: when it was last opened, in seconds since 1970.
        manifest: what its records are answers to; None where ``error`` says what is wrong.
        recorded: records that are marked, by view.
        error: why it cannot be used; empty where it can.
    """

    path: Path
    size: int
    used: float
    manifest: Manifest | None
    recorded: tuple[int, ...] = ()
    error: str = ""

    @property
    def key(self) -> str:
        """16 hex digits."""
        return self.path.name

    @property
    def share(self) -> float | None:
        """Of the records of all views that the store has, how many are there; None where it has none."""
        if self.manifest is None or not self.recorded:
            return None
        return sum(self.recorded) / (len(self.recorded) * self.manifest.samples)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        found: dict[str, Any] = {"key": self.key, "path": str(self.path), "bytes": self.size, "last_use": self.used}
        if self.manifest is None:
            return found | {"error": self.error}
        manifest, facts = self.manifest, self.manifest.facts
        return found | {
            "samples": manifest.samples,
            "views": len(self.recorded),
            "recorded": list(self.recorded),
            "record": {"kind": manifest.record.kind, "bytes": manifest.record.nbytes, **_sizes(manifest.record)},
            "teacher": facts.get("teacher"),
            "folder": facts.get("folder"),
            "data": facts.get("data"),
            "split": manifest.identity.get("split"),
            "error": self.error or None,
        }


def list_stores(root: Path) -> list[Listed]:
    """The stores of a folder, the last used first.

    Raises:
        StorageError: the folder cannot be read.
    """
    return sorted(map(_listed, _folders(root)), key=lambda each: (-each.used, each.key))


def find(root: Path, key: str) -> Path:
    """The folder of a store.

    Args:
        root: the folder of all stores.
        key: or its beginning, where no other begins so.

    Raises:
        UsageError: no such store; the message names the nearest.
        StorageError: the folder cannot be read.
    """
    known = [folder.name for folder in _folders(root)]
    found = [name for name in known if name == key or (len(key) >= _SHORTEST and name.startswith(key))]
    if len(found) == 1:
        return root / found[0]
    if found:
        raise UsageError(f"several stores begin with {key!r}: {', '.join(sorted(found))}")
    raise UsageError(
        f"no store {key!r} in {root}{nearest(key, known)}\nKnown: {', '.join(sorted(known)) or 'none'}; "
        "`potstill store ls` shows them"
    )


def remove(path: Path) -> int:
    """Delete a store; one that is damaged too.

    Returns:
        Bytes that were freed.

    Raises:
        StorageError: it is in use, or cannot be deleted.
    """
    claims = Claims(path)  # with a new lock file where a store has none yet: somebody may be about to open it
    try:
        if not claims.use_alone():
            raise StorageError(f"{path} is in use; wait for the run that uses it, or stop it")
        size = _size(path)
        gone = path.with_name(f".{path.name}.removed")
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(gone)  # what an interrupted removal left
        path.rename(gone)  # at once, for those who look for it
        _delete(gone)
    except OSError as error:
        raise StorageError(f"cannot remove {path}: {error.strerror or error}") from error
    finally:
        claims.release()
    return size


def _delete(folder: Path) -> None:
    for attempt in range(_ATTEMPTS):
        try:
            shutil.rmtree(folder)
            return
        except OSError as error:  # whoever was about to open the store may just have put a file there
            if error.errno != errno.ENOTEMPTY or attempt == _ATTEMPTS - 1:
                raise


def sweep(root: Path) -> None:
    """Delete what an interrupted removal, or the making of a store, has left."""
    with contextlib.suppress(OSError):
        for folder in root.iterdir():
            if _LEFT.fullmatch(folder.name):
                shutil.rmtree(folder, ignore_errors=True)


def _folders(root: Path) -> list[Path]:
    try:
        return [
            each for each in root.iterdir() if _KEY.fullmatch(each.name) and each.is_dir() and not each.is_symlink()
        ]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"cannot read {root}: {error.strerror or error}") from error


def _listed(path: Path) -> Listed:
    size, used = _size(path), _used(path)
    try:
        manifest = Manifest.read(path)
    except ArtifactError as error:
        return Listed(path, size, used, None, error=str(error))
    try:
        return Listed(path, size, used, manifest, _recorded(path, Layout.of(manifest)))
    except OSError as error:
        return Listed(path, size, used, manifest, error=f"cannot read {path}: {error.strerror or error}")


def _recorded(path: Path, layout: Layout) -> tuple[int, ...]:
    files = Files(path, layout, write=False)
    try:
        counts = []
        for view in range(files.views()):
            marks = (layout.read_mark(block, mark) for block, mark in enumerate(files.read_marks(view)))
            counts.append(sum(int.from_bytes(mark[1].tobytes(), "little").bit_count() for mark in marks if mark))
        return tuple(counts)
    finally:
        files.close()


def _sizes(record: Record) -> dict[str, int]:
    return {"classes": record.classes, "embedding": record.embedding}


def _used(path: Path) -> float:
    for name in (path / LOCK, path):
        with contextlib.suppress(OSError):
            return name.stat().st_mtime
    return 0.0


def _size(path: Path) -> int:
    """Room that is taken on the disk; a file may have holes."""
    found = 0
    with contextlib.suppress(OSError):
        for each in os.scandir(path):
            status = each.stat(follow_symlinks=False)
            found += getattr(status, "st_blocks", -(-status.st_size // 512)) * 512
    return found
