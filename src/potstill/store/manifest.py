"""A store's manifest: what its records are answers to.  Its key is a digest of that, so nothing stale is ever found."""

import contextlib
import errno
import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.artifacts import read_bytes
from potstill.errors import ArtifactError, StorageError, UsageError
from potstill.sealed import read_sealed_json, write_sealed_json
from potstill.store.records import Record

FORMAT = 2
NAME = "manifest.json"
_BEGINNING = re.compile(rb'\{\s*"format": ([0-9]{1,9}),')
_MENDING = "Remove it with `potstill store rm {key}`; the next run records anew"


@dataclass(frozen=True)
class Manifest:
    """What a store is.

    Args:
        identity: all that decides the answers; plain JSON values.  Not the number of views: a store grows.
        record: how an answer is kept.
        samples: N, images of the split.
        facts: for people and for ``verify``; not part of the key.
    """

    identity: Mapping[str, Any]
    record: Record
    samples: int
    facts: Mapping[str, Any]

    @property
    def key(self) -> str:
        """16 hex digits: the beginning of the SHA-256 of everything but the facts, as canonical JSON."""
        return hashlib.sha256(canonical(self._content()).encode()).hexdigest()[:16]

    def write(self, folder: Path) -> None:
        """Make the store's folder with the manifest in it.

        The folder appears together with its manifest: a process that removes stores all the time never meets one that
        is half made.  A folder that is there already only gets the manifest.

        Raises:
            StorageError: it cannot be written.
        """
        content = {**self._content(), "key": self.key, "facts": dict(self.facts)}
        if folder.exists():
            write_sealed_json(folder / NAME, content)
            return
        new = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.new")
        try:
            write_sealed_json(new / NAME, content)
            with contextlib.suppress(FileExistsError):
                new.rename(folder)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:  # else another process made the same store
                raise StorageError(f"cannot make {folder}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(new, ignore_errors=True)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """What ``write`` wrote; not parsed before its SHA-256 is compared.

        Raises:
            ArtifactError: missing, damaged, of another format, or in a folder of another name than its key.
        """
        path, mending = folder / NAME, _MENDING.format(key=folder.name)
        try:
            value = read_sealed_json(path)
        except ArtifactError as error:
            older = _BEGINNING.match(read_bytes(path))  # the first format carried its digest elsewhere
            if older is not None and 1 <= int(older[1]) < FORMAT:
                raise ArtifactError(_other_format(path, int(older[1]), mending)) from error
            raise ArtifactError(f"{error}. {mending}") from error
        damaged = f"{path} is damaged. {mending}"
        try:
            if value["format"] != FORMAT and isinstance(value["format"], int):
                raise ArtifactError(_other_format(path, value["format"], mending))
            record = Record(**{name: value["record"][name] for name in ("kind", "classes", "embedding")})
            found = cls(value["identity"], record, value["samples"], value["facts"])
            written = {name: value[name] for name in found._content()}
        except (ValueError, TypeError, KeyError, UsageError) as error:  # of a file that was made up to fit
            raise ArtifactError(damaged) from error
        plain = isinstance(found.identity, dict) and isinstance(found.facts, dict) and type(found.samples) is int
        if not plain or written != found._content() or found.key != folder.name or found.samples < 1:
            raise ArtifactError(damaged)
        return found

    def _content(self) -> dict[str, Any]:
        record = self.record
        return {
            "format": FORMAT,
            "identity": self.identity,
            "samples": self.samples,
            "record": {
                "kind": record.kind,
                "classes": record.classes,
                "embedding": record.embedding,
                "nbytes": record.nbytes,
                "byte_order": "little",
            },
        }


def canonical(value: Any) -> str:
    """JSON that is the same for the same values: keys sorted, no spaces, ASCII alone.

    Raises:
        UsageError: values that JSON does not have.

    Example:
        >>> canonical({"b": (1, 2.0), "a": None})
        '{"a":null,"b":[1,2.0]}'
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"a store is identified by plain JSON values: {error}") from error


def _other_format(path: Path, found: int, mending: str) -> str:
    return f"{path} is of format {found}, and this version of potstill reads {FORMAT}. {mending}"
