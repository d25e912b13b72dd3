"""Names of shards: `train-{0000..0146}.tar`, on this machine or behind any protocol that fsspec knows."""

import re
from collections.abc import Iterator
from itertools import product
from typing import Any
from urllib.parse import urlsplit

from potstill.errors import DataError, UsageError

MOST = 100_000  # shards; a slip of the keyboard in a range is not tried for hours
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_COMPRESSED = re.compile(r"\.(tgz|tar\.\w+)$", re.IGNORECASE)
_PACKAGES = {  # protocol -> what fsspec reads it with
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "az": "adlfs",
    "http": "aiohttp",
    "https": "aiohttp",
}


def is_shards(source: str) -> bool:
    """Whether a source names tar files, compressed ones (which are refused later) among them.

    Example:
        >>> is_shards("s3://bucket/train-{000..019}.tar"), is_shards("photos"), is_shards("a.tar.gz")
        (True, False, True)
    """
    return source.lower().endswith(".tar") or _COMPRESSED.search(source) is not None


def expand(source: str) -> list[str]:
    """Every shard that a name stands for, in its order.

    Args:
        source: with any number of ``{000..146}`` (as many digits as are written) and ``{a,b}``.

    Raises:
        UsageError: compressed files, a password, a range that is none, or more than 100,000 shards.

    Example:
        >>> expand("s-{08..10}-{a,b}.tar")[:3]
        ['s-08-a.tar', 's-08-b.tar', 's-09-a.tar']
    """
    if _COMPRESSED.search(source):
        raise UsageError(
            f"{source}: a compressed tar file cannot be read image by image; images hardly shrink, so use .tar"
        )
    if "://" in source and "@" in urlsplit(source).netloc:
        raise UsageError(
            "a recipe is kept and shared, so an address of shards must carry no user or password: set the environment "
            "variables that the storage's own client reads"
        )
    pieces = _BRACES.split(source)
    choices = [[piece] if at % 2 == 0 else list(_values(piece, source)) for at, piece in enumerate(pieces)]
    count = 1
    for each in choices:
        count *= len(each)
    if count > MOST:
        raise UsageError(f"{source} stands for {count:,} shards; {MOST:,} are the most")
    found = ["".join(parts) for parts in product(*choices)]
    if len(set(found)) < len(found):
        raise UsageError(f"{source} names a shard twice")
    return found


def _values(text: str, source: str) -> Iterator[str]:
    if "," in text:
        yield from text.split(",")
        return
    match = _RANGE.fullmatch(text)
    if match is None or int(match[2]) < int(match[1]) or int(match[2]) - int(match[1]) >= MOST:
        raise UsageError(f"{source}: {{{text}}} is neither a range such as {{000..146}} nor a list such as {{a,b}}")
    width = len(match[1]) if match[1].startswith("0") else 0
    for number in range(int(match[1]), int(match[2]) + 1):
        yield str(number).zfill(width)


def opened(url: str) -> tuple[Any, str]:
    """The file system of a shard, as fsspec has it, and the shard's name there.

    Raises:
        UsageError: an unknown protocol, or one whose package is not installed.
    """
    import fsspec  # 0.1 s that other data need not wait for

    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        protocol = url.partition("://")[0]
        package = _PACKAGES.get(protocol)
        remedy = f"install it with: pip install {package}" if package else "see fsspec's list of protocols"
        raise UsageError(f"{url}: {protocol}:// cannot be read here ({_first_line(error)}); {remedy}") from error
    return system, path


def read_range(url: str, start: int, size: int) -> bytes:
    """So many bytes of a shard.

    Raises:
        DataError: it cannot be read, or is shorter than it was.
    """
    system, path = opened(url)
    try:
        content: bytes = system.cat_file(path, start=start, end=start + size)
    except Exception as error:  # each storage raises its own; all mean that the bytes are not to be had
        raise DataError(f"{url}: cannot be read at byte {start}: {_first_line(error)}") from error
    if len(content) != size:
        raise DataError(f"{url}: {len(content)} of {size} bytes at byte {start}; the shard has changed or is cut off")
    return content


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
