"""One pass over a shard: what is in it, where, and whether every image can be decoded."""

import hashlib
import json
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from tarfile import SOLARIS_XHDTYPE, XGLTYPE, XHDTYPE, HeaderError, ReadError
from typing import Any, Self

from potstill.cache import cache_folder
from potstill.data.decode import FORMATS, decoder, read_image
from potstill.data.shards.urls import opened
from potstill.errors import ArtifactError, DataError, StorageError
from potstill.sealed import read_sealed_json, write_sealed_json

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "heic", "heif")
NO_FILE, OTHER, BESIDE, NO_IMAGE = (
    "links and devices",
    "members that are neither image nor label",
    "further images of a sample, whose names end in more than one part (KEY.seg.png beside KEY.jpg)",
    "labels without an image",
)
_LARGEST = 64 * 2**20  # bytes of an image
_LARGEST_LABEL = 2**20
_LARGEST_HEADER = 2**20
_LONGEST_CLASS = 255  # characters
GNU_LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_STATE = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "md5")  # by which storages tell changes


@dataclass
class Sample:
    """An image of a shard, and what its companions say of it."""

    key: str  # its name below the shard, without any suffix
    name: str  # with the image's own
    offset: int = -1  # of the image's bytes in the shard
    size: int = 0
    digest: str = ""  # SHA-256 of the image's bytes
    span: str = ""  # of its values, where it has more than 8 bits; as a ``value_range.Span`` is written
    label: str | None = None  # text of .cls, or "label" or "class" of .json


@dataclass
class Shard:
    """What stands in one tar file."""

    url: str
    samples: list[Sample] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    left: dict[str, list[str]] = field(default_factory=dict)  # why members are left alone -> their names


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
            return Shard(url, [Sample(**each) for each in found["samples"]], found["problems"], found["left"])
        except (ArtifactError, KeyError, TypeError):
            pass  # damaged, or of another version: it is read anew
    shard = Shard(url)
    for member, content in _members(shard):
        _note(shard, member, content)
    for sample in shard.samples:
        if sample.offset < 0:
            shard.left.setdefault(NO_IMAGE, []).append(sample.name)
    shard.samples = [sample for sample in shard.samples if sample.offset >= 0]
    if remembered is not None:
        try:
            remembered.parent.mkdir(parents=True, exist_ok=True)
            write_sealed_json(remembered, asdict(shard))
        except (StorageError, OSError):
            pass  # a cache that cannot be written costs time, not the run
    return shard


class _Header(tarfile.TarInfo):
    """A member's header; one that cannot be is an error, where tarfile takes it for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        """Read the next header."""
        try:
            found = super().fromtarfile(tarfile)
        except HeaderError as error:
            if type(error).__name__ in ("InvalidHeaderError", "TruncatedHeaderError"):  # others: the archive's end
                raise ReadError(f"at byte {tarfile.offset:,}: {error}") from error
            raise
        return found

    def _proc_member(self, tarfile: tarfile.TarFile) -> Any:
        if self.size < 0:
            raise ReadError(f"{self.name}: a size of {self.size:,} bytes")
        if self.size > _LARGEST_HEADER and self.type in (XHDTYPE, XGLTYPE, SOLARIS_XHDTYPE, *GNU_LONG):
            raise ReadError(f"{self.name}: a header of {self.size:,} bytes; at most {_LARGEST_HEADER:,} are read")
        return super()._proc_member(tarfile)  # type: ignore[misc] # where tarfile itself tells the kinds apart


class _Bounded:
    """A file that may be read to its end, and not again and again behind it, as for a member of 2**80 bytes."""

    def __init__(self, file: Any) -> None:
        self.file, self.ends = file, 0

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes."""
        found: bytes = self.file.read(size)
        self.ends += not found
        if self.ends > 2:
            raise ReadError("unexpected end of data")
        return found


def _members(shard: Shard) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Files of a shard that belong to samples, with their content."""
    system, path = opened(shard.url)
    try:
        with (
            system.open(path, "rb") as file,
            tarfile.open(fileobj=_Bounded(file), mode="r|", tarinfo=_Header) as tar,  # type: ignore[call-overload]
        ):
            yield from _wanted(tar, shard, system.info(path).get("size"))
            _expect_end(file)
    except FileNotFoundError as error:
        raise DataError(f"{shard.url}: there is no such shard") from error
    except (
        tarfile.TarError,
        EOFError,
        ValueError,
        ArithmeticError,
        LookupError,
        struct.error,
        RecursionError,
    ) as error:
        # What tarfile raises on numbers and names that cannot be.
        raise DataError(f"{shard.url}: damaged or no tar file ({_one_line(error)})") from error
    except OSError as error:
        raise DataError(f"{shard.url}: cannot be read: {_one_line(error)}") from error


def _wanted(tar: tarfile.TarFile, shard: Shard, total: int | None) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    for member in tar:
        if member.isdir():
            continue
        _, suffix = split(member.name)
        image = suffix.rpartition(".")[2] in IMAGES
        if not member.isfile():
            shard.left.setdefault(NO_FILE, []).append(member.name)
            continue
        if total is not None and not 0 <= member.size <= total - member.offset_data:
            raise ReadError(f"{member.name[:200]!a}: {member.size:,} bytes, more than the file has")
        if not image and suffix not in ("cls", "json"):
            shard.left.setdefault(OTHER, []).append(member.name)
            continue
        if member.issparse():
            shard.problems.append(f"{shard.url}/{member.name}: a sparse member; write the shard without --sparse")
            continue
        most = _LARGEST if image else _LARGEST_LABEL
        if member.size > most:
            shard.problems.append(f"{shard.url}/{member.name}: {member.size:,} bytes; at most {most:,} are read")
            continue
        stream = tar.extractfile(member)
        content = b"" if stream is None else stream.read()
        if len(content) != member.size:
            raise ReadError("unexpected end of data")
        yield member, content


def _expect_end(file: Any) -> None:
    """Behind the archive's end there is nothing but zeros: joined archives would lose all but the first."""
    while rest := file.read(2**20):
        if rest.strip(b"\0"):
            raise ReadError("there is more behind the archive's end; join tar files with: tar --concatenate")


def _note(shard: Shard, member: tarfile.TarInfo, content: bytes) -> None:
    key, suffix = split(member.name)
    if not shard.samples or shard.samples[-1].key != key:
        shard.samples.append(Sample(key, member.name))
    sample, where = shard.samples[-1], f"{shard.url}/{member.name}"
    if suffix in ("cls", "json"):
        sample.label = _label(content, suffix, where, shard) or sample.label
        return
    if sample.offset >= 0:
        known = split(sample.name)[1]
        if ("." in known) == ("." in suffix):
            shard.problems.append(
                f"{where}: a second image under the key {key!r}; its name up to the first dot must differ"
            )
            return
        shard.left.setdefault(BESIDE, []).append(member.name if "." in suffix else sample.name)
        if "." in suffix:
            return
    try:
        span = read_image(content, where).span
    except DataError as error:
        shard.problems.append(str(error))
        span = None
    sample.span = "" if span is None else str(span)
    sample.name, sample.offset, sample.size = member.name, member.offset_data, len(content)
    sample.digest = hashlib.sha256(content).hexdigest()


def _label(content: bytes, suffix: str, where: str, shard: Shard) -> str | None:
    found: Any
    try:
        text = found = content.decode("utf-8").strip()
        if suffix == "json":
            said = json.loads(text)
            found = said.get("label", said.get("class")) if isinstance(said, dict) else None
        found = None if found is None or isinstance(found, (dict, list, bool, float)) else str(found)
    except (ValueError, RecursionError):  # no UTF-8, no JSON, thousands of digits, or nested too deeply
        shard.problems.append(f"{where}: neither text nor JSON that can be read")
        return None
    if isinstance(found, str) and len(found) > _LONGEST_CLASS:
        shard.problems.append(
            f"{where}: a class of {len(found):,} characters ({found[:20]}...); at most {_LONGEST_CLASS}"
        )
        return None
    return None if found is None else str(found)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def split(name: str) -> tuple[str, str]:
    """Key and suffix as WebDataset has them: the key ends before the first dot of the last part.

    Example:
        >>> split("a.b/000.seg.png"), split("./x/1.JPG")
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
