"""Read tar shards in WebDataset's layout: their names, and one pass over each.

Names are such as ``train-{0000..0146}.tar``, on this machine or behind any protocol that fsspec reads.  The pass finds
the images of a shard, their byte ranges and labels, and checks that every image can be decoded.
"""

import hashlib
import json
import re
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path, PurePosixPath
from tarfile import SOLARIS_XHDTYPE, XGLTYPE, XHDTYPE, HeaderError, ReadError
from typing import Any, Self
from urllib.parse import urlsplit

from potstill.data.image_io import decoder_version, read_image
from potstill.data.image_structure import FORMATS, TEXT_HEAD, begins_as_image, foreign_file_hint, has_image_suffix
from potstill.errors import ArtifactError, DataError, StorageError, UsageError, first_line
from potstill.io import cache_folder, read_checksummed_json, write_checksummed_json

MAX_SHARDS = 100_000  # guards against a typing error in a range
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
COMPRESSED_SUFFIX = re.compile(r"\.(tgz|tar\.\w+)$", re.IGNORECASE)
_PACKAGES = {  # protocol -> package that fsspec needs
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "az": "adlfs",
    "http": "aiohttp",
    "https": "aiohttp",
}


def expand_shards(source: str) -> list[str]:
    """Return the URLs of all shards of a pattern with any number of ``{000..146}`` (digits as written) and ``{a,b}``.

    Compressed files, passwords, wrong ranges and more than 100,000 shards raise UsageError.

    Example:
        >>> expand_shards("s-{08..10}-{a,b}.tar")[:3]
        ['s-08-a.tar', 's-08-b.tar', 's-09-a.tar']
    """
    if COMPRESSED_SUFFIX.search(source):
        raise UsageError(
            f"{source}: a compressed tar file cannot be read image by image; images hardly shrink, so use .tar"
        )
    if "://" in source and "@" in urlsplit(source).netloc:
        raise UsageError(
            "a recipe is kept and shared, so an address of shards must carry no user or password: set the environment "
            "variables that the storage's own client reads"
        )
    pieces = _BRACES.split(source)
    choices = [[piece] if at % 2 == 0 else list(_brace_values(piece, source)) for at, piece in enumerate(pieces)]
    count = 1
    for each in choices:
        count *= len(each)
    if count > MAX_SHARDS:
        raise UsageError(f"{source} stands for {count:,} shards; {MAX_SHARDS:,} are the most")
    found = ["".join(parts) for parts in product(*choices)]
    if len(set(found)) < len(found):
        raise UsageError(f"{source} names a shard twice")
    return found


def _brace_values(text: str, source: str) -> Iterator[str]:
    if "," in text:
        yield from text.split(",")
        return
    match = _RANGE.fullmatch(text)
    if match is None or int(match[2]) < int(match[1]) or int(match[2]) - int(match[1]) >= MAX_SHARDS:
        raise UsageError(f"{source}: {{{text}}} is neither a range such as {{000..146}} nor a list such as {{a,b}}")
    width = len(match[1]) if match[1].startswith("0") else 0
    for number in range(int(match[1]), int(match[2]) + 1):
        yield str(number).zfill(width)


def open_filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a shard, and the shard's path in it."""
    import fsspec  # takes 0.1 s to import

    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        protocol = url.partition("://")[0]
        package = _PACKAGES.get(protocol)
        remedy = f"install it with: pip install {package}" if package else "see fsspec's list of protocols"
        raise UsageError(f"{url}: {protocol}:// cannot be read here ({first_line(error)}); {remedy}") from error
    return system, path


def read_byte_range(url: str, start: int, size: int) -> bytes:
    """Return ``size`` bytes of a shard from ``start`` on; DataError if it is shorter than it was."""
    system, path = open_filesystem(url)
    try:
        content: bytes = system.cat_file(path, start=start, end=start + size)
    except Exception as error:  # each storage raises its own errors
        raise DataError(f"{url}: cannot be read at byte {start}: {first_line(error)}") from error
    if len(content) != size:
        raise DataError(f"{url}: {len(content)} of {size} bytes at byte {start}; the shard has changed or is cut off")
    return content


IMAGE_EXTENSIONS = (
    "jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "dib", "gif", "tif", "tiff", "avif", "heic", "heif", "hif",
)  # fmt: skip
NOT_A_FILE, UNKNOWN_TYPE, FURTHER_IMAGE, LABEL_WITHOUT_IMAGE = (
    "links and devices",
    "members that are neither image nor label",
    "further images of a sample, whose names end in more than one part (KEY.seg.png beside KEY.jpg)",
    "labels without an image",
)
_MAX_IMAGE_BYTES = 64 * 2**20  # bytes of an image
_MAX_LABEL_BYTES = 2**20
_MAX_HEADER_BYTES = 2**20
MAX_CLASS_LENGTH = 255  # characters
GNU_LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_VERSION_KEYS = (
    "ETag",
    "etag",
    "mtime",
    "LastModified",
    "last_modified",
    "updated",
    "md5",
)  # by which storages identify a version


@dataclass
class ShardSample:
    """An image of a shard, with its label."""

    key: str  # path in the shard without suffixes
    name: str  # path in the shard
    offset: int = -1  # of the image's bytes in the shard
    size: int = 0
    digest: str = ""  # SHA-256 of the image's bytes
    span: str = ""  # ``str`` of its ``image_io.ValueSpan``; empty: 8 bits
    label: str | None = None  # text of .cls, or "label" or "class" of .json


@dataclass
class Shard:
    """The samples of one tar file."""

    url: str
    samples: list[ShardSample] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    left: dict[str, list[str]] = field(default_factory=dict)  # reason -> names of ignored members
    # Of these, images by content or suffix -> what to do about each; not of a cached index.
    unread: dict[str, str] = field(default_factory=dict)


def read_shard(url: str) -> Shard:
    """Read a shard from beginning to end; the result is cached until the shard changes."""
    index = _index_path(url)
    if index is not None and index.exists():
        try:
            found = read_checksummed_json(index)
            return Shard(url, [ShardSample(**each) for each in found["samples"]], found["problems"], found["left"])
        except (ArtifactError, KeyError, TypeError):
            pass  # damaged, or of another version: it is read anew
    shard = Shard(url)
    for member, content in _members(shard):
        _add_member(shard, member, content)
    shard.problems += _lost_images(shard)
    for sample in shard.samples:
        if sample.offset < 0:
            shard.left.setdefault(LABEL_WITHOUT_IMAGE, []).append(sample.name)
    shard.samples = [sample for sample in shard.samples if sample.offset >= 0]
    if index is not None:
        try:
            index.parent.mkdir(parents=True, exist_ok=True)
            write_checksummed_json(index, asdict(shard))
        except (StorageError, OSError):
            pass  # a cache that cannot be written costs time, not the run
    return shard


def _lost_images(shard: Shard) -> Iterator[str]:
    """Yield a problem for each ignored member that is an image, and the only one of its sample."""
    keys = {sample.key for sample in shard.samples if sample.offset >= 0}
    for name, reason in shard.unread.items():
        if split_member_name(name)[0] not in keys:
            yield f"{shard.url}/{name}: {reason}"


class _Header(tarfile.TarInfo):
    """A member's header; an invalid one is an error, while tarfile takes it for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
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
        if self.size > _MAX_HEADER_BYTES and self.type in (XHDTYPE, XGLTYPE, SOLARIS_XHDTYPE, *GNU_LONG):
            raise ReadError(f"{self.name}: a header of {self.size:,} bytes; at most {_MAX_HEADER_BYTES:,} are read")
        return super()._proc_member(tarfile)  # type: ignore[misc] # a private method, which handles all types of members


class _Bounded:
    """A file that raises if it is read repeatedly beyond its end, as for a member of 2**80 bytes."""

    def __init__(self, file: Any) -> None:
        self.file, self.ends = file, 0

    def read(self, size: int) -> bytes:
        """Read at most ``size`` bytes."""
        found: bytes = self.file.read(size)
        self.ends += not found
        if self.ends > 2:
            raise ReadError("unexpected end of data")
        return found


def _members(shard: Shard) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Yield the members of a shard that belong to samples, with their contents."""
    system, path = open_filesystem(shard.url)
    try:
        with (
            system.open(path, "rb") as file,
            tarfile.open(fileobj=_Bounded(file), mode="r|", tarinfo=_Header) as tar,  # type: ignore[call-overload]
        ):
            yield from _sample_members(tar, shard, system.info(path).get("size"))
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
        # Raised by tarfile for invalid numbers and names.
        if program := _compressor(system, path):
            raise DataError(
                f"{shard.url}: compressed by {program}, and images are read at their places in a tar file: unpack it "
                "first"
            ) from error
        raise DataError(f"{shard.url}: damaged or no tar file ({first_line(error)})") from error
    except OSError as error:
        raise DataError(f"{shard.url}: cannot be read: {first_line(error)}") from error


_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}


def _compressor(system: Any, path: str) -> str | None:
    """Return the program that compressed a file, by its first bytes; None if it is not compressed."""
    try:
        with system.open(path, "rb") as file:
            head = file.read(8)
    except OSError:
        return None
    return next((program for start, program in _COMPRESSED.items() if head.startswith(start)), None)


def _sample_members(tar: tarfile.TarFile, shard: Shard, total: int | None) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    for member in tar:
        if member.isdir():
            continue
        _, suffix = split_member_name(member.name)
        image = suffix.rpartition(".")[2] in IMAGE_EXTENSIONS
        if not member.isfile():
            shard.left.setdefault(NOT_A_FILE, []).append(member.name)
            continue
        if total is not None and not 0 <= member.size <= total - member.offset_data:
            raise ReadError(f"{member.name[:200]!a}: {member.size:,} bytes, more than the file has")
        if not image and suffix not in ("cls", "json"):
            shard.left.setdefault(UNKNOWN_TYPE, []).append(member.name)
            head = _content(tar, member, TEXT_HEAD)
            if begins_as_image(head):
                shard.unread[member.name] = (
                    "an image whose name does not end in .jpg, .png, ...; rename it in the shard"
                )
            elif has_image_suffix(member.name):
                shard.unread[member.name] = f"no image of the formats {', '.join(FORMATS)}{foreign_file_hint(head)}"
            continue
        if member.issparse():
            shard.problems.append(f"{shard.url}/{member.name}: a sparse member; write the shard without --sparse")
            continue
        most = _MAX_IMAGE_BYTES if image else _MAX_LABEL_BYTES
        if member.size > most:
            shard.problems.append(f"{shard.url}/{member.name}: {member.size:,} bytes; at most {most:,} are read")
            continue
        content = _content(tar, member, member.size)
        if len(content) != member.size:
            raise ReadError("unexpected end of data")
        yield member, content


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, size: int) -> bytes:
    stream = tar.extractfile(member)
    return b"" if stream is None else stream.read(size)


def _expect_end(file: Any) -> None:
    """Require only zeros after the archive's end: concatenated archives would lose all but the first."""
    while rest := file.read(2**20):
        if rest.strip(b"\0"):
            raise ReadError("there is more behind the archive's end; join tar files with: tar --concatenate")


def _add_member(shard: Shard, member: tarfile.TarInfo, content: bytes) -> None:
    key, suffix = split_member_name(member.name)
    if not shard.samples or shard.samples[-1].key != key:
        shard.samples.append(ShardSample(key, member.name))
    sample, where = shard.samples[-1], f"{shard.url}/{member.name}"
    if PurePosixPath(member.name).name.startswith(".") and begins_as_image(content):  # its key would be the folder
        shard.problems.append(f"{where}: a hidden image, whose name has no key before the first dot; rename it")
    if suffix in ("cls", "json"):
        sample.label = _label(content, suffix, where, shard) or sample.label
        return
    if sample.offset >= 0:
        known = split_member_name(sample.name)[1]
        if ("." in known) == ("." in suffix):
            shard.problems.append(
                f"{where}: a second image under the key {key!r}; its name up to the first dot must differ"
            )
            return
        shard.left.setdefault(FURTHER_IMAGE, []).append(member.name if "." in suffix else sample.name)
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
            value = json.loads(text, object_pairs_hook=unique_keys)
            pair = (value.get("label"), value.get("class")) if isinstance(value, dict) else ()
            found = next((each for each in pair if each is not None), None)
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, thousands of digits, or nested too deeply
        why = f": {error}" if str(error) == KEY_TWICE else ""
        shard.problems.append(f"{where}: neither text nor JSON that can be read{why}")
        return None
    if isinstance(found, (dict, list, bool, float)):
        shard.problems.append(f"{where}: a class is a name or a whole number, got {str(found)[:40]}")
        return None
    name = None if found is None else str(found)
    if name is not None and len(name) > MAX_CLASS_LENGTH:
        shard.problems.append(
            f"{where}: a class of {len(name):,} characters ({name[:20]}...); at most {MAX_CLASS_LENGTH}"
        )
        return None
    return name


KEY_TWICE = "a key is given twice"


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, as ``object_pairs_hook``; ValueError if a key is given twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(KEY_TWICE)
    return found


def split_member_name(name: str) -> tuple[str, str]:
    """Split a name into key and suffix like WebDataset: the key ends before the first dot of the last part.

    Example:
        >>> split_member_name("a.b/000.seg.png"), split_member_name("./x/1.JPG")
        (('a.b/000', 'seg.png'), ('x/1', 'jpg'))
    """
    path = PurePosixPath(name)
    stem, _, suffix = path.name.partition(".")
    return str(path.parent / stem), suffix.lower()


def _index_path(url: str) -> Path | None:
    """Return the path of a shard's cached index; None if its storage does not identify versions."""
    system, path = open_filesystem(url)
    try:
        info = system.info(path)
    except Exception:  # reading the shard reports the error
        return None
    state = [str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None]
    if not state or info.get("size") is None:
        return None
    version = ("3", decoder_version(), *FORMATS)  # of this reader, and of what decides whether an image is one
    word = "\n".join([url, str(system.protocol), str(path), str(info["size"]), *state, *version])
    return cache_folder() / "shards" / f"{hashlib.sha256(word.encode('utf-8', 'surrogateescape')).hexdigest()}.json"
