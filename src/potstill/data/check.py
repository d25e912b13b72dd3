"""Every image is read once before training, so that no run fails in its tenth hour; all problems at once."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from potstill.data.cores import threads
from potstill.data.decode import decode_bytes, read_file
from potstill.data.images import ImageSet
from potstill.data.listing import refuse
from potstill.errors import DataError


def check_files(root: Path, names: Sequence[str], source: str, *, decode: bool = True) -> dict[str, str]:
    """Read and decode files.

    Args:
        root: the folder that names are relative to.
        names: of the files.
        source: what messages call the data.
        decode: False: only read, for files that somebody else has verified.

    Returns:
        name -> size and SHA-256 of the content.

    Raises:
        DataError: files that cannot be decoded: path and reason of the first twenty, and their number.
    """

    def look(name: str) -> str:
        content = read_file(root / name)
        if decode:
            decode_bytes(content, str(root / name))
        return f"{len(content)} {hashlib.sha256(content).hexdigest()}"

    with ThreadPoolExecutor(threads()) as pool:
        found = list(pool.map(lambda name: _attempt(partial(look, name)), names))
    return dict(zip(names, _all_or_none(found, source), strict=True))


def check_images(images: ImageSet, source: str) -> list[str]:
    """Read every image of a set; for each, the shape and SHA-256 of its pixels.

    Raises:
        DataError: images that cannot be read, as ``check_files``.
    """

    def look(i: int) -> str:
        pixels = images.pixels(i)
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != "uint8" or 0 in pixels.shape:
            raise DataError(f"{images.names[i]}: pixels must be uint8 [H, W, 3], got {pixels.dtype} {pixels.shape}")
        return f"{pixels.shape} {hashlib.sha256(pixels.tobytes()).hexdigest()}"

    return _all_or_none([_attempt(partial(look, i)) for i in range(len(images))], source)


def _attempt(look: Callable[[], str]) -> str | DataError:
    try:
        return look()
    except DataError as error:
        return error


def _all_or_none(results: Iterable[str | DataError], source: str) -> list[str]:
    listed = list(results)
    refuse(source, [str(result) for result in listed if isinstance(result, DataError)], "unreadable image")
    return [result for result in listed if isinstance(result, str)]
