"""What was found in the files below a folder, kept for as long as they stay as they were.

Whether a file stayed as it was is seen by its size, its times of change (of content and of inode; no program can set
the second one) and its inode, as git does.  A file that changed less than two seconds before it was read may change
again within the same tick of the file system's clock: it is not trusted, and read again the next time.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from potstill.artifacts import digest, read_bytes, write_bytes
from potstill.cache import cache_folder
from potstill.data.decode import decoder
from potstill.data.value_range import KINDS, span_of
from potstill.errors import ArtifactError, StorageError

FORMAT = 2
RACY = 2_000_000_000  # nanoseconds; FAT has the coarsest clock, of two seconds
_STATE = 4  # numbers
_SHA256 = 32  # bytes
_SPAN = 3  # numbers

State = tuple[int, int, int, int]  # size, mtime_ns, ctime_ns, inode
_NOWHERE: State = (-1, 0, 0, 0)


@dataclass
class KnownFiles:
    """Files below one folder, by name.

    Args:
        path: the file that this is kept in.
        names: [N].
        states: int64 [N, 4], as ``state_of``.
        digests: uint8 [N, 32], SHA-256 of the content.
        spans: float64 [N, 3]: number of the kind in ``value_range.KINDS``, 0 for images of 8 bits, low and high.
    """

    path: Path
    names: Sequence[str] = ()
    states: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, _STATE), np.int64))
    digests: NDArray[np.uint8] = field(default_factory=lambda: np.empty((0, _SHA256), np.uint8))
    spans: NDArray[np.float64] = field(default_factory=lambda: np.empty((0, _SPAN), np.float64))

    @classmethod
    def below(cls, root: Path, *, decoded: bool) -> "KnownFiles":
        """What is known of a folder; nothing where that is missing, damaged, or of another version.

        Args:
            root: the folder.
            decoded: of files that this decoder could decode; False: of files that were only read.
        """
        subject = json.dumps([FORMAT, str(root.resolve()), decoder() if decoded else None])
        path = cache_folder("known-files", f"{digest(os.fsencode(subject))[:16]}.bin")
        try:
            return cls(path, *_parse(read_bytes(path)))
        except (ArtifactError, ValueError):
            return cls(path)

    def unchanged(self, root: Path, names: Sequence[str]) -> dict[str, str]:
        """Of those files that are known and have not changed since: name -> the word that ``keep`` was given."""
        if not self.names:
            return {}
        places = {name: i for i, name in enumerate(self.names)}
        asked = [(name, places[name]) for name in names if name in places]
        now = np.array([state_of(os.path.join(root, name)) for name, _ in asked], np.int64).reshape(-1, _STATE)
        same = (now == self.states[[place for _, place in asked]]).all(axis=1)
        return {
            name: f"{size} {self.digests[place].tobytes().hex()}{_span_word(self.spans[place])}"
            for (name, place), kept, size in zip(asked, same.tolist(), now[:, 0].tolist(), strict=True)
            if kept
        }

    def keep(self, root: Path, read: Mapping[str, tuple[State | None, str]]) -> None:
        """Add files that were read, and forget those that are gone; where nothing can be written, nothing is kept.

        Args:
            root: the folder.
            read: name -> state, None where it must not be trusted, and size, SHA-256 and span of the content as
                ``check.check_files`` has them.
        """
        new = {name: (state, word) for name, (state, word) in read.items() if state is not None}
        old = [i for i, name in enumerate(self.names) if name not in read and os.path.exists(os.path.join(root, name))]
        if not new and len(old) == len(self.names):
            return
        hexed = "".join(word.split()[1] for _, word in new.values())
        digests = np.frombuffer(bytes.fromhex(hexed), np.uint8).reshape(-1, _SHA256)
        states = np.array([state for state, _ in new.values()], np.int64).reshape(-1, _STATE)
        self.names = [*(self.names[i] for i in old), *new]
        self.states = np.concatenate([self.states[old], states])
        self.digests = np.concatenate([self.digests[old], digests])
        spans = np.array([_span_row(word) for _, word in new.values()], np.float64).reshape(-1, _SPAN)
        self.spans = np.concatenate([self.spans[old], spans])
        content = _render(self.names, self.states, self.digests, self.spans)
        with contextlib.suppress(StorageError):
            write_bytes(self.path, hashlib.sha256(content).digest(), content)


def state_of(path: str | Path) -> State:
    """What tells a file from its changed self; all negative or zero where there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return _NOWHERE
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino & (2**63 - 1)


def trusted(before: State, after: State, read_at: int) -> State | None:
    """The state of a file that was read, or None where it may have changed unseen.

    Args:
        before: its state before it was read.
        after: and afterwards.
        read_at: nanoseconds since 1970, when ``before`` was taken.
    """
    _, modified, changed, _ = before
    return before if before == after != _NOWHERE and read_at - max(modified, changed) >= RACY else None


def _span_row(word: str) -> tuple[float, float, float]:
    span = span_of(word)
    return (0.0, 0.0, 0.0) if span is None else (KINDS.index(span.kind) + 1.0, span.low, span.high)


def _span_word(row: NDArray[np.float64]) -> str:
    kind, low, high = row.tolist()
    return f" {KINDS[int(kind) - 1]} {low!r} {high!r}" if kind else ""


def _render(
    names: Sequence[str], states: NDArray[np.int64], digests: NDArray[np.uint8], spans: NDArray[np.float64]
) -> bytes:
    joined = os.fsencode("\0".join(names))
    count = np.int64(len(names)).astype("<i8").tobytes()
    return b"".join((count, states.astype("<i8").tobytes(), digests.tobytes(), spans.astype("<f8").tobytes(), joined))


def _parse(data: bytes) -> tuple[list[str], NDArray[np.int64], NDArray[np.uint8], NDArray[np.float64]]:
    content = memoryview(data)[_SHA256:]
    if hashlib.sha256(content).digest() != data[:_SHA256]:
        raise ValueError("damaged")
    count = int(np.frombuffer(content, "<i8", 1)[0])
    states = np.frombuffer(content, "<i8", _STATE * count, 8).reshape(count, _STATE).astype(np.int64)
    start = 8 * (1 + _STATE * count)
    digests = np.frombuffer(content, np.uint8, _SHA256 * count, start).reshape(count, _SHA256)
    start += _SHA256 * count
    spans = np.frombuffer(content, "<f8", _SPAN * count, start).reshape(count, _SPAN).astype(np.float64)
    names = os.fsdecode(bytes(content[start + 8 * _SPAN * count :])).split("\0")
    if len(names) != count:
        raise ValueError("damaged")
    return names, states, digests, spans
