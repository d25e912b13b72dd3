"""The one writer and the one checked reader of files: a file appears whole or not at all.

Temporary file in the same folder, fsync, rename, fsync of the folder.  (``torch.save`` to a path hides a full disk
and destroys the old file, so tensors are serialised to memory and written here.)
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from potstill.errors import ArtifactError, StorageError


def write_bytes(path: Path, *chunks: bytes) -> None:
    """Put ``chunks``, one after the other, at ``path``, whole or not at all; an older file survives a failure.

    Raises:
        StorageError: no space, no permission, or an I/O error; names path and reason.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        with os.fdopen(handle, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
        _sync_folder(path.parent)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def write_text(path: Path, text: str) -> None:
    """Put UTF-8 ``text`` at ``path``, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Put ``value`` at ``path`` as indented JSON; NaN is refused, since JSON has none (write None)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """Put one JSON value a line at ``path``; written anew each time, so that no reader ever sees half a line."""
    write_text(path, "".join(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n" for value in values))


def read_bytes(path: Path, *, sha256: str | None = None) -> bytes:
    """The file's bytes, compared with ``sha256`` (hex) before anybody parses them.

    Raises:
        ArtifactError: missing, unreadable, or other bytes than were written.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
    if sha256 is not None and digest(data) != sha256:
        raise ArtifactError(f"{path} is damaged: its SHA-256 is not the one that was recorded when it was written")
    return data


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        ArtifactError: missing, unreadable or no JSON.
    """
    try:
        return json.loads(read_bytes(path))
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged: it is no JSON ({error})") from error


def digest(data: bytes) -> str:
    """SHA-256 as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
