"""Files that carry their own SHA-256, which is compared before any parser sees a byte.

Each file for itself: two files that must agree cannot be replaced at one instant, and a run can be killed at any.
People read them as before: the digest is the first line of a text, a comment, and the last entry of a JSON object.

Tables (CSV, JSON lines) have no place for it, so the digests of those stand in a sealed file beside them that is
written after them.  Of a table that grows line by line, each line has its own.
"""

import contextlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from potstill.artifacts import DAMAGED, as_json, digest, encoded, read_bytes, write_bytes
from potstill.errors import ArtifactError

_DIGITS = 64
_TEXT = b"# SHA-256 of the lines below: "
_BEFORE, _BEHIND, _END = b',\n  "checksum": "', b'"\n}\n', b"\n}\n"
_TAIL = len(_BEFORE) + _DIGITS + len(_BEHIND)
_BY_HAND = " (editing it by hand breaks it too)"
_AGAIN = "; delete the file, and --resume writes it again"
_UNSEALED = "is damaged, or was written before potstill 0.1.0: it carries no SHA-256"


def write_sealed(path: Path, content: bytes, *, keep_previous: bool = False) -> None:
    """Write 64 hex digits of SHA-256, a line break, and ``content``.

    Args:
        path: of a file that ``read_sealed`` reads.
        content: any bytes.
        keep_previous: the older file stays as ``NAME-previous.SUFFIX``.

    Raises:
        StorageError: as ``write_bytes``.
    """
    previous = path.with_name(f"{path.stem}-previous{path.suffix}") if keep_previous else None
    write_bytes(path, digest(content).encode(), b"\n", content, previous=previous)


def read_sealed(path: Path) -> bytes:
    """What ``write_sealed`` wrote, without the digest.

    Raises:
        ArtifactError: missing, cut short or changed; names the newest intact older file of this name, if there is one.
    """
    content = _opened(read_bytes(path))
    if content is None:
        older = _newest_intact(path)
        way_out = f"; {older} is older and intact: rename it to {path.name} to go on from there" if older else ""
        raise ArtifactError(f"{path} {DAMAGED}{way_out}")
    return content


def write_sealed_text(path: Path, text: str) -> None:
    """Put UTF-8 ``text`` behind a first line ``# SHA-256 of the lines below: ...``.

    Raises:
        StorageError: as ``write_bytes``.
    """
    content = encoded(text)
    write_bytes(path, _TEXT, digest(content).encode(), b"\n", content)


def read_sealed_text(path: Path) -> str:
    """What ``write_sealed_text`` wrote, without the first line.

    Raises:
        ArtifactError: missing, cut short or changed, be it by hand.
    """
    data = read_bytes(path)
    if not data.startswith(_TEXT):
        raise ArtifactError(f"{path} {_UNSEALED}")
    content = _opened(data[len(_TEXT) :])
    if content is None:
        raise ArtifactError(f"{path} {DAMAGED}{_BY_HAND}")
    return content.decode("utf-8", "backslashreplace")


def write_sealed_json(path: Path, value: dict[str, Any]) -> None:
    """Put an object that is not empty at ``path`` as indented JSON, with a last entry ``checksum``: the SHA-256 of the
    file without this entry.

    Raises:
        StorageError: as ``write_bytes``.
    """
    body = as_json(value)
    write_bytes(path, body.removesuffix(_END), _BEFORE, digest(body).encode(), _BEHIND)


def read_sealed_json(path: Path) -> dict[str, Any]:
    """What ``write_sealed_json`` wrote, without the checksum.

    Raises:
        ArtifactError: missing, cut short or changed, be it by hand.
    """
    data = read_bytes(path)
    body, tail = data[:-_TAIL] + _END, data[-_TAIL:]
    if not (tail.startswith(_BEFORE) and tail.endswith(_BEHIND)):
        raise ArtifactError(f"{path} {_UNSEALED}")
    if tail[len(_BEFORE) : -len(_BEHIND)] != digest(body).encode():
        raise ArtifactError(f"{path} {DAMAGED}{_BY_HAND}")
    found: Any = None
    with contextlib.suppress(ValueError, RecursionError):  # of a file that was made up to fit
        found = json.loads(body)
    if not isinstance(found, dict):
        raise ArtifactError(f"{path} holds no JSON object")
    return found


def write_json_lines(path: Path, values: Iterable[Any]) -> list[str]:
    """Put one JSON value a line at ``path``; written anew each time, so that no reader ever sees half a line.

    Returns:
        16 hex digits for each line, the beginning of its SHA-256; for ``check_lines``.

    Raises:
        StorageError: as ``write_bytes``.
    """
    lines = [encoded(json.dumps(value, ensure_ascii=False, allow_nan=False)) for value in values]
    write_bytes(path, b"".join(line + b"\n" for line in lines))
    return [_short(line) for line in lines]


def check_lines(path: Path, digests: Sequence[str], *, more: bool = False) -> bytes:
    """The file's bytes, each line compared with its digest.

    Args:
        path: of what ``write_json_lines`` wrote.
        digests: what it returned then.
        more: lines may have come since; they are not looked at.

    Raises:
        ArtifactError: missing or unreadable, or a line is another one, missing, or too many; says which.
    """
    data = read_bytes(path)
    *lines, rest = data.split(b"\n")
    for number, digest_then in enumerate(digests, start=1):
        if number > len(lines):
            raise ArtifactError(f"{path} is damaged: line {number} of {len(digests)} is missing{_AGAIN}")
        if _short(lines[number - 1]) != digest_then:
            changed = f"line {number} is not the one that was written{_BY_HAND}"
            raise ArtifactError(f"{path} is damaged: {changed}{_AGAIN}")
    if not more and (rest or len(lines) > len(digests)):
        raise ArtifactError(f"{path} is damaged: there is more than the {len(digests)} lines that were written{_AGAIN}")
    return data


def _short(line: bytes) -> str:
    return digest(line)[:16]


def _opened(data: bytes) -> bytes | None:
    """The content behind 64 digits and a line break, where they are its digest."""
    content = data[_DIGITS + 1 :]
    return content if data[: _DIGITS + 1] == digest(content).encode() + b"\n" else None


def _newest_intact(path: Path) -> Path | None:
    def age(each: Path) -> int:
        return each.stat().st_mtime_ns

    with contextlib.suppress(OSError):
        for each in sorted(path.parent.glob(f"{path.stem}-*{path.suffix}"), key=age, reverse=True):
            if _opened(each.read_bytes()) is not None:
                return each
    return None
