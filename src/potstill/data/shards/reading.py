"""One pass over a shard: what is in it, where, and whether every image can be decoded."""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from potstill.cache import cache_folder
from potstill.data.decode import FORMATS, decode_bytes, decoder
from potstill.data.shards.urls import opened
from potstill.errors import ArtifactError, DataError, StorageError
from potstill.sealed import read_sealed_json, write_sealed_json

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "heic", "heif")
_LARGEST = 64 * 2**20  # bytes of an image
_LARGEST_LABEL = 2**20
_STATE = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "md5")  # by which storages tell changes


@dataclass
class Sample:
    """An image of a shard, and what its companions say of it."""

    key: str  # its name below the shard, without any suffix
    name: str  # with the image's own
    offset: int = -1  # of the image's bytes in the shard
    size: int = 0
    digest: str = ""  # SHA-256 of the image's bytes
    label: str | None = None  # text of .cls, or "label" or "class" of .json


@dataclass
class Shard:
    """What stands in one tar file."""

    url: str
    samples: list[Sample] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    ignored: int = 0  # members that are no files: links, devices


def read_shard(url: str) -> Shard:
    """Read a shard from its beginning to its end, once; what was found is remembered until the shard changes.

    Raises:
        DataError: it is not there, or no tar file.
        UsageError: its protocol cannot be read here.
    """
    remembered = _remembered(url)
    if remembered is not None and remembered.exists():
        try:
            found = read_sealed_json(remembered)
            return Shard(url, [Sample(**each) for each in found["samples"]], found["problems"], found["ignored"])
        except (ArtifactError, KeyError, TypeError):
            pass  # damaged, or of another version: it is read anew
    shard = Shard(url)
    for sample, content in _members(shard):
        _note(shard, sample, content)
    shard.samples = [sample for sample in shard.samples if sample.offset >= 0]
    if remembered is not None:
        try:
            remembered.parent.mkdir(parents=True, exist_ok=True)
            write_sealed_json(remembered, asdict(shard))
        except (StorageError, OSError):
            pass  # a cache that cannot be written costs time, not the run
    return shard


def _members(shard: Shard) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Files of a shard that belong to samples, with their content."""
    system, path = opened(shard.url)
    try:
        with system.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r|") as tar:
            for member in tar:
                if not member.isfile() or member.issparse():
                    shard.ignored += not member.isdir()
                    continue
                suffix = _split(member.name)[1]
                if suffix not in IMAGES and suffix not in ("cls", "json"):
                    continue
                most = _LARGEST if suffix in IMAGES else _LARGEST_LABEL
                if member.size > most:
                    shard.problems.append(
                        f"{shard.url}/{member.name}: {member.size:,} bytes; at most {most:,} are read"
                    )
                    continue
                stream = tar.extractfile(member)
                content = b"" if stream is None else stream.read()
                if len(content) != member.size:
                    raise tarfile.ReadError("unexpected end of data")
                yield member, content
    except FileNotFoundError as error:
        raise DataError(f"{shard.url}: there is no such shard") from error
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{shard.url}: damaged or no tar file ({' '.join(str(error).split())})") from error
    except OSError as error:
        raise DataError(f"{shard.url}: cannot be read: {' '.join(str(error).split())[:200]}") from error


def _note(shard: Shard, member: tarfile.TarInfo, content: bytes) -> None:
    key, suffix = _split(member.name)
    if not shard.samples or shard.samples[-1].key != key:
        shard.samples.append(Sample(key, member.name))
    sample, where = shard.samples[-1], f"{shard.url}/{member.name}"
    if suffix in IMAGES:
        if sample.offset >= 0:
            shard.problems.append(f"{where}: a second image under the key {key!r}")
            return
        try:
            decode_bytes(content, where)
        except DataError as error:
            shard.problems.append(str(error))
        sample.name, sample.offset, sample.size = member.name, member.offset_data, len(content)
        sample.digest = hashlib.sha256(content).hexdigest()
    else:
        sample.label = _label(content, suffix, where, shard) or sample.label


def _label(content: bytes, suffix: str, where: str, shard: Shard) -> str | None:
    try:
        text = content.decode("utf-8").strip()
        found: Any = text
        if suffix == "json":
            said = json.loads(text)
            found = said.get("label", said.get("class")) if isinstance(said, dict) else None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        shard.problems.append(f"{where}: neither text nor JSON")
        return None
    return None if found is None or isinstance(found, (dict, list, bool, float)) else str(found)


def _split(name: str) -> tuple[str, str]:
    """Key and suffix as WebDataset has them: the key ends before the first dot of the last part.

    Example:
        >>> _split("a.b/000.seg.png"), _split("./x/1.JPG")
        (('a.b/000', 'seg.png'), ('x/1', 'jpg'))
    """
    path = PurePosixPath(name)
    stem, _, suffix = path.name.partition(".")
    return str(path.parent / stem), suffix.lower()


def _remembered(url: str) -> Path | None:
    """Where a shard's contents are remembered; None where its storage does not tell one state from another."""
    system, path = opened(url)
    try:
        info = system.info(path)
    except Exception:  # whatever is wrong is said when it is read
        return None
    state = [str(info[key]) for key in _STATE if info.get(key) is not None]
    if not state or info.get("size") is None:
        return None
    word = "\n".join([url, str(system.protocol), str(path), str(info["size"]), *state, decoder(), *FORMATS])
    return cache_folder() / "shards" / f"{hashlib.sha256(word.encode('utf-8', 'surrogateescape')).hexdigest()}.json"
