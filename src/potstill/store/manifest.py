"""A store's manifest: what its records are answers to.  Its key is a digest of that, so nothing stale is ever found."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.artifacts import read_bytes, write_text
from potstill.errors import ArtifactError, UsageError
from potstill.store.records import Record

FORMAT = 1
NAME = "manifest.json"
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
        """Put it into the store's folder, whole or not at all.

        Raises:
            StorageError: it cannot be written.
        """
        write_text(folder / NAME, _render(self._content(), self.key, dict(self.facts)))

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """What ``write`` wrote, checked byte by byte.

        Raises:
            ArtifactError: missing, damaged, of another format, or in a folder of another name than its key.
        """
        path, mending = folder / NAME, _MENDING.format(key=folder.name)
        text = read_bytes(path)
        damaged = f"{path} is damaged. {mending}"
        try:
            value = json.loads(text)
            if value["format"] != FORMAT and isinstance(value["format"], int):
                raise ArtifactError(
                    f"{path} is of format {value['format']}, and this version of potstill reads {FORMAT}. {mending}"
                )
            record = Record(**{name: value["record"][name] for name in ("kind", "classes", "embedding")})
            found = cls(value["identity"], record, value["samples"], value["facts"])
            expected = _render(found._content(), found.key, found.facts)
        except (ValueError, TypeError, KeyError, RecursionError, UsageError) as error:
            raise ArtifactError(damaged) from error
        if expected.encode() != text or found.key != folder.name or found.samples < 1:
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


def _render(content: Mapping[str, Any], key: str, facts: Mapping[str, Any]) -> str:
    """The file's text; the digest at its end is of all before it."""
    value = {**content, "key": key, "facts": facts}
    digest = hashlib.sha256(canonical(value).encode()).hexdigest()
    return json.dumps({**value, "sha256": digest}, indent=2, allow_nan=False) + "\n"
