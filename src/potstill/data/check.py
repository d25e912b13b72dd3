"""Every image is read once before training, so that no run fails in its tenth hour; all problems at once."""

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from potstill.cache import cache_folder
from potstill.data.cores import in_turn
from potstill.data.decode import read_file, read_image
from potstill.data.doctor.large import MOST_BYTES, MOST_PIXELS, header, one_at_a_time
from potstill.data.images import ImageSet
from potstill.data.known_files import KnownFiles, State, state_of, trusted
from potstill.data.listing import refuse
from potstill.data.turns import one_process
from potstill.data.watcher import Watcher
from potstill.errors import DataError

_Result = TypeVar("_Result")

_PIECE = 64  # files; fewer would make more of handing them to threads than of reading them

_Read = tuple[State | None, str]  # a file's state and its content, as ``KnownFiles.keep`` takes them


def check_files(
    root: Path,
    names: Sequence[str],
    source: str,
    *,
    decode: bool = True,
    progress: Watcher | None = None,
    bad: dict[str, str] | None = None,
    hints: Sequence[str] = (),
) -> dict[str, str]:
    """Read and decode files; those that were found good before, and have not changed since, are not read again.

    Args:
        root: the folder that names are relative to.
        names: of the files.
        source: what messages call the data.
        decode: False: only read, for files that somebody else has verified.
        progress: is told how much is done.
        bad: receives name -> reason of files that cannot be decoded; None: these are an error.
        hints: lines at the end of that error.

    Returns:
        name -> size and SHA-256 of the content, and where it has more than 8 bits the span of its values; of the good
        files.

    Raises:
        DataError: files that cannot be decoded: path and reason of the first twenty, and their number.
    """
    known = KnownFiles.below(root, decoded=decode)
    unchanged = known.unchanged(root, names)
    found: list[_Read | DataError] = []
    new: list[str] = []
    good: dict[str, _Read] = {}
    if not all(name in unchanged for name in names):
        with one_process(cache_folder("locks", f"{known.path.stem}.lock"), "checks these images", progress):
            known = KnownFiles.below(root, decoded=decode)  # another process may have checked them just now
            unchanged = known.unchanged(root, names)
            new = [name for name in names if name not in unchanged]
            pieces = [new[start : start + _PIECE] for start in range(0, len(new), _PIECE)]
            for results in in_turn(partial(_look, root, decode), pieces):
                found += results
                if progress is not None:
                    progress.wait("checking images", len(found), len(new))
            good = {name: each for name, each in zip(new, found, strict=True) if not isinstance(each, DataError)}
            if new:
                known.keep(root, good)
    if bad is None:
        _all_or_none(found, source, hints)
    else:
        bad |= {
            name: str(each).removeprefix(f"{root / name}: ")
            for name, each in zip(new, found, strict=True)
            if isinstance(each, DataError)
        }
    return {name: unchanged.get(name) or good[name][1] for name in names if bad is None or name not in bad}


def _look(root: Path, decode: bool, names: list[str]) -> list[_Read | DataError]:
    return [_attempt(partial(_read, root / name, decode)) for name in names]


def _read(path: Path, decode: bool) -> _Read:
    read_at, before = time.time_ns(), state_of(path)
    span = None
    with one_at_a_time(before[0] > MOST_BYTES):
        content = read_file(path)
        if decode:
            with one_at_a_time(header(content)[2] > MOST_PIXELS):
                span = read_image(content, str(path)).span
    word = f"{len(content)} {hashlib.sha256(content).hexdigest()}"
    return trusted(before, state_of(path), read_at), word if span is None else f"{word} {span}"


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


def _attempt(look: Callable[[], _Result]) -> _Result | DataError:
    try:
        return look()
    except DataError as error:
        return error


def _all_or_none(results: Iterable[_Result | DataError], source: str, hints: Sequence[str] = ()) -> list[_Result]:
    listed = list(results)
    refuse(source, [str(result) for result in listed if isinstance(result, DataError)], "unreadable image", hints)
    return [result for result in listed if not isinstance(result, DataError)]
