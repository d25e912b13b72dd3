"""Write files atomically and read them checked; the location of the cache.

A file appears whole or not at all: temporary file in the same folder, fsync, rename, fsync of the folder.
(``torch.save`` to a path hides a full disk and destroys the old file, so tensors are serialised to memory and written
here.)

Files with a checksum carry their own SHA-256, which is compared before any parser reads a byte.  Each file for itself:
two files that must agree cannot be replaced at one instant, and a run can be killed at any time.  The digest is the
first line of a text, a comment, and the last entry of a JSON object.  Tables (CSV, JSON lines) have no place for it, so
their digests are in a file with a checksum beside them that is written after them.  Of a table that grows line by line,
each line has its own.
"""

import contextlib
import csv
import errno
import hashlib
import io
import itertools
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from potstill.errors import ArtifactError, StorageError, UsageError, did_you_mean, storing

CACHE_VARIABLE = "POTSTILL_CACHE"


def cache_folder(*parts: str) -> Path:
    """Return a folder within the cache: ``$POTSTILL_CACHE``, ``$XDG_CACHE_HOME/potstill`` or ``~/.cache/potstill``."""
    if own := os.environ.get(CACHE_VARIABLE):
        root = Path(own).expanduser()
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "potstill"
    return root.joinpath(*parts)


PART = ".part"  # suffix of temporary files, which a killed process leaves
DAMAGED = "is damaged: its SHA-256 is not the one that was recorded when it was written"
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_NO_SYNCING = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)  # file systems whose folders cannot be synced


def write_bytes(path: Path, *chunks: bytes, previous: Path | None = None) -> None:
    """Write ``chunks`` to ``path``, or what it links to, atomically; on failure the older file stays, else in
    ``previous``.

    StorageError names path and reason.
    """
    _write(path, chunks, previous)


def _write(path: Path, chunks: Iterable[bytes], previous: Path | None) -> None:
    temporary: Path | None = None
    try:
        target = _writable(path)
        _make_folder(target.parent)
        temporary = _temporary_path(target)
        _write_new(temporary, chunks)
        if previous is not None and target.exists():
            _link_previous(target, previous)
        os.replace(temporary, target)
        temporary = None
        sync_folder(target.parent)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            _unlink(temporary)


def write_chunks(path: Path, chunks: Iterable[bytes]) -> str:
    """Write an iterator of chunks like ``write_bytes``; return the SHA-256 of the file in hex."""
    sha256 = hashlib.sha256()

    def digested() -> Iterator[bytes]:
        for chunk in chunks:
            sha256.update(chunk)
            yield chunk

    _write(path, digested(), None)
    return sha256.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 atomically; lone surrogates are escaped."""
    write_bytes(path, encode_text(text))


def replace_file(source: Path, target: Path) -> None:
    """Move a written file into the place of another one in its folder."""
    with storing(f"write {target}"):
        os.replace(source, target)
        sync_folder(target.parent)


def encode_json(value: Any) -> bytes:
    """Return indented JSON with a line end; NaN is an error (use None)."""
    return encode_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_bytes(path: Path, *, sha256: str | None = None) -> bytes:
    """Return the file's bytes; ArtifactError: missing, unreadable, or of another ``sha256`` (hex)."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    if sha256 is not None and sha256_hex(data) != sha256:
        raise ArtifactError(f"{path} {DAMAGED}")
    return data


def sha256_hex(data: bytes) -> str:
    """Return the SHA-256 as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file of any size."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def encode_text(text: str) -> bytes:
    """Encode as UTF-8; lone surrogates, from file names that are not UTF-8, are escaped as in JSON."""
    return text.encode("utf-8", "backslashreplace")


def remove_partial_files(folder: Path) -> None:
    """Delete temporary files of killed processes below ``folder``; no other process may be writing there."""
    with storing(f"tidy {folder}"):
        for leftover in folder.rglob(f".*{PART}"):
            leftover.unlink(missing_ok=True)


def check_exists(path: Path, wanted: str = "a run folder or a folder with model.json") -> None:
    """Check that a path which the user gave exists.

    Raises:
        UsageError: it does not; names what is ``wanted``, and the nearest name beside it.
    """
    if not path.exists():
        nearest = nearest_name(path)  # ends its sentence
        raise UsageError(f"{path} does not exist{f'{nearest} Give' if nearest else '; give'} {wanted}")


def nearest_name(path: Path, others: Iterable[str] = ()) -> str:
    """Return ``"; did you mean 'photos'?"`` for a path that does not exist, by ``others`` and the names beside it; ""
    if none is near.
    """
    names = list(others)
    with contextlib.suppress(OSError):
        names += [each.name for each in itertools.islice(path.parent.iterdir(), _MAX_SIBLINGS)]
    return did_you_mean(path.name, names)


_MAX_SIBLINGS = 1000  # names beside a path that does not exist, among which the nearest is looked for


def _unreadable(path: Path, error: OSError) -> ArtifactError:
    return ArtifactError(f"cannot read {path}: {error.strerror or error}")


def _writable(path: Path) -> Path:
    # To rename something onto a link or a device (/dev/stdout) would replace that.
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "it is there, and no regular file")
    return target


def _temporary_path(path: Path) -> Path:
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


def _link_previous(path: Path, previous: Path) -> None:
    """Hard-link the file to a second name, replacing an existing file; copy it if links are not supported."""
    second = _temporary_path(previous)
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
    """Create a folder and its parents, and sync each: a power cut must not remove the folder of a synced file."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder)
    with contextlib.suppress(PermissionError):  # of the parent, which may belong to another user
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries of its files to the disk, where the system can."""
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


_DIGITS = 64
_TEXT = b"# SHA-256 of the lines below: "
_CHECKSUM_PREFIX, _CHECKSUM_SUFFIX, _END = b',\n  "checksum": "', b'"\n}\n', b"\n}\n"
_TAIL = len(_CHECKSUM_PREFIX) + _DIGITS + len(_CHECKSUM_SUFFIX)
_BY_HAND = " (editing it by hand breaks it too)"
_AGAIN = "; delete the file, and --resume writes it again"
_NO_CHECKSUM = "is damaged, or was written before potstill 0.1.0: it carries no SHA-256"


def write_checksummed(path: Path, content: bytes, *, keep_previous: bool = False) -> None:
    """Write 64 hex digits of SHA-256, a line break, and ``content``; the older file may stay as
    ``NAME-previous.SUFFIX``.
    """
    previous = path.with_name(f"{path.stem}-previous{path.suffix}") if keep_previous else None
    write_bytes(path, sha256_hex(content).encode(), b"\n", content, previous=previous)


def read_checksummed(path: Path) -> bytes:
    """Read what ``write_checksummed`` wrote, without the digest; ArtifactError names the newest intact older file."""
    content = _verified_content(read_bytes(path))
    if content is None:
        older = _newest_intact(path)
        way_out = f"; {older} is older and intact: rename it to {path.name} to go on from there" if older else ""
        raise ArtifactError(f"{path} {DAMAGED}{way_out}")
    return content


def write_checksummed_text(path: Path, text: str) -> None:
    """Write UTF-8 ``text`` after a first line ``# SHA-256 of the lines below: ...``."""
    content = encode_text(text)
    write_bytes(path, _TEXT, sha256_hex(content).encode(), b"\n", content)


def read_checksummed_text(path: Path) -> str:
    """Read what ``write_checksummed_text`` wrote, without the first line; ArtifactError: missing or changed."""
    data = read_bytes(path)
    if not data.startswith(_TEXT):
        raise ArtifactError(f"{path} {_NO_CHECKSUM}")
    content = _verified_content(data[len(_TEXT) :])
    if content is None:
        raise ArtifactError(f"{path} {DAMAGED}{_BY_HAND}")
    return content.decode("utf-8", "backslashreplace")


def write_checksummed_json(path: Path, value: dict[str, Any]) -> None:
    """Write an object as indented JSON with a last entry ``checksum``, the SHA-256 of the file without it."""
    body = encode_json(value)
    write_bytes(path, body.removesuffix(_END), _CHECKSUM_PREFIX, sha256_hex(body).encode(), _CHECKSUM_SUFFIX)


def read_checksummed_json(path: Path) -> dict[str, Any]:
    """Read what ``write_checksummed_json`` wrote, without the checksum; ArtifactError: missing or changed."""
    data = read_bytes(path)
    body, tail = data[:-_TAIL] + _END, data[-_TAIL:]
    if not (tail.startswith(_CHECKSUM_PREFIX) and tail.endswith(_CHECKSUM_SUFFIX)):
        raise ArtifactError(f"{path} {_NO_CHECKSUM}")
    if tail[len(_CHECKSUM_PREFIX) : -len(_CHECKSUM_SUFFIX)] != sha256_hex(body).encode():
        raise ArtifactError(f"{path} {DAMAGED}{_BY_HAND}")
    found: Any = None
    with contextlib.suppress(ValueError, RecursionError):  # of a file that was made up to fit
        found = json.loads(body)
    if not isinstance(found, dict):
        raise ArtifactError(f"{path} holds no JSON object")
    return found


def write_json_lines(path: Path, values: Iterable[Any]) -> list[str]:
    """Write one JSON value per line, the whole file anew; return 16 hex digits of each line's SHA-256."""
    lines = [encode_text(json.dumps(value, ensure_ascii=False, allow_nan=False)) for value in values]
    write_bytes(path, b"".join(line + b"\n" for line in lines))
    return [_short_digest(line) for line in lines]


def verify_json_lines(path: Path, digests: Sequence[str], *, more: bool = False) -> bytes:
    """Return the file's bytes after comparing each line with its digest; ``more``: further lines are allowed.

    ArtifactError names a line that is another one, missing, or too many.
    """
    data = read_bytes(path)
    *lines, rest = data.split(b"\n")
    for number, digest_then in enumerate(digests, start=1):
        if number > len(lines):
            raise ArtifactError(f"{path} is damaged: line {number} of {len(digests)} is missing{_AGAIN}")
        if _short_digest(lines[number - 1]) != digest_then:
            changed = f"line {number} is not the one that was written{_BY_HAND}"
            raise ArtifactError(f"{path} is damaged: {changed}{_AGAIN}")
    if not more and (rest or len(lines) > len(digests)):
        raise ArtifactError(f"{path} is damaged: there is more than the {len(digests)} lines that were written{_AGAIN}")
    return data


def _short_digest(line: bytes) -> str:
    return sha256_hex(line)[:16]


def _verified_content(data: bytes) -> bytes | None:
    """Return the content after a valid digest and line break."""
    content = data[_DIGITS + 1 :]
    return content if data[: _DIGITS + 1] == sha256_hex(content).encode() + b"\n" else None


def _newest_intact(path: Path) -> Path | None:
    def age(each: Path) -> int:
        return each.stat().st_mtime_ns

    with contextlib.suppress(OSError):
        for each in sorted(path.parent.glob(f"{path.stem}-*{path.suffix}"), key=age, reverse=True):
            if _verified_content(each.read_bytes()) is not None:
                return each
    return None


_FORMULA = re.compile(r"'*[=+\-@]")  # start of a cell that a spreadsheet runs as a formula, escaped or not


def as_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return comma-separated text, with escaped control characters; formulas of spreadsheets get an apostrophe, see
    ``unescape_cell``.
    """
    return "".join(csv_texts(header, rows))


def csv_texts(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    """Yield the text of ``as_csv`` in parts of up to 4096 lines."""
    lines = itertools.chain([header], rows)
    while part := list(itertools.islice(lines, 4096)):
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([_escape_cell(cell) for cell in row] for row in part)
        yield out.getvalue()


def _escape_cell(cell: Any) -> str:
    text = str(cell)
    if not text.isprintable():  # a name in UTF-8 that a process with another locale has read byte by byte
        with contextlib.suppress(UnicodeEncodeError):
            text = text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    text = text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return f"'{text}" if isinstance(cell, str) and _FORMULA.match(text) else text


def unescape_cell(cell: str) -> str:
    """Return the text that ``as_csv`` wrote as ``cell``.

    Example:
        >>> unescape_cell("'=1+1.jpg"), unescape_cell("'cat'.jpg")
        ('=1+1.jpg', "'cat'.jpg")
    """
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
