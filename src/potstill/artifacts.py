"""The one writer and the one checked reader of files: a file appears whole or not at all.

Temporary file in the same folder, fsync, rename, fsync of the folder.  (``torch.save`` to a path hides a full disk
and destroys the old file, so tensors are serialised to memory and written here.)  Files that carry their own SHA-256
are written by ``potstill.sealed``, on top of this.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from potstill.errors import ArtifactError, StorageError

PART = ".part"  # how the temporary files end that a killed process leaves
DAMAGED = "is damaged: its SHA-256 is not the one that was recorded when it was written"
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_NO_SYNCING = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)  # file systems whose folders cannot be synced


def write_bytes(path: Path, *chunks: bytes, previous: Path | None = None) -> None:
    """Put ``chunks``, one after the other, at ``path``, whole or not at all; an older file survives a failure.

    Args:
        path: a regular file, or nothing yet; of a link, what it leads to.
        chunks: the content.
        previous: beside ``path``; there the older file stays.

    Raises:
        StorageError: no space, no permission, or an I/O error; names path and reason.
    """
    _write(path, chunks, previous)


def _write(path: Path, chunks: Iterable[bytes], previous: Path | None) -> None:
    temporary: Path | None = None
    try:
        target = _writable(path)
        _make_folder(target.parent)
        temporary = _beside(target)
        _write_new(temporary, chunks)
        if previous is not None and target.exists():
            _keep(target, previous)
        os.replace(temporary, target)
        temporary = None
        _sync_folder(target.parent)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            _unlink(temporary)


def write_chunks(path: Path, chunks: Iterable[bytes]) -> str:
    """As ``write_bytes``, of chunks that are made one by one; returns the SHA-256 of the file, in hex.

    Raises:
        StorageError: as ``write_bytes``.
    """
    sha256 = hashlib.sha256()

    def digested() -> Iterator[bytes]:
        for chunk in chunks:
            sha256.update(chunk)
            yield chunk

    _write(path, digested(), None)
    return sha256.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Put UTF-8 ``text`` at ``path``, whole or not at all; what UTF-8 does not have becomes a visible escape."""
    write_bytes(path, encoded(text))


def move(source: Path, target: Path) -> None:
    """Let a written file take the place of another one in its folder.

    Raises:
        StorageError: it could not be renamed; names path and reason.
    """
    try:
        os.replace(source, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror or error}") from error


def as_json(value: Any) -> bytes:
    """Indented JSON and a line end; NaN is refused, since JSON has none (write None)."""
    return encoded(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_bytes(path: Path, *, sha256: str | None = None) -> bytes:
    """The file's bytes, compared with ``sha256`` (hex) before anybody parses them.

    Raises:
        ArtifactError: missing, unreadable, or other bytes than were written.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    if sha256 is not None and digest(data) != sha256:
        raise ArtifactError(f"{path} {DAMAGED}")
    return data


def digest(data: bytes) -> str:
    """SHA-256 as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def digest_of(path: Path) -> str:
    """SHA-256 of a file of any size.

    Raises:
        ArtifactError: missing or unreadable.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def encoded(text: str) -> bytes:
    """UTF-8; of a file name that is not UTF-8, Python's lone surrogates become visible escapes, as in JSON."""
    return text.encode("utf-8", "backslashreplace")


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files that killed processes left below ``folder``; nobody else may be writing there.

    Raises:
        StorageError: one cannot be deleted.
    """
    try:
        for leftover in folder.rglob(f".*{PART}"):
            leftover.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot tidy {folder}: {error.strerror or error}") from error


def _unreadable(path: Path, error: OSError) -> ArtifactError:
    return ArtifactError(f"cannot read {path}: {error.strerror or error}")


def _writable(path: Path) -> Path:
    # To rename something onto a link or a device (/dev/stdout) would replace that.
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "it is there, and no regular file")
    return target


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}{PART}")


def _write_new(path: Path, chunks: Iterable[bytes]) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        for chunk in chunks:
            rest = memoryview(chunk)
            while rest:
                rest = rest[os.write(handle, rest) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def _keep(path: Path, previous: Path) -> None:
    """Give the file a second name, in place of whatever has it; a copy where the file system has no second names."""
    second = _beside(previous)
    try:
        try:
            os.link(path, second)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            _write_new(second, [path.read_bytes()])
        os.replace(second, previous)
    finally:
        _unlink(second)  # of a failure, or where ``previous`` was the same file already: then nothing is renamed


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _make_folder(folder: Path) -> None:
    """With its parents, each lasting: a synced file is of no use in a folder that a power cut takes away."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder)
    with contextlib.suppress(PermissionError):  # of the folder above, which may be somebody else's
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # has no handles of folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_SYNCING:
            raise
    finally:
        os.close(handle)
