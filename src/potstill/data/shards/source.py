"""Shards as a data set: three splits of images that are read from their tar files by byte range."""

import hashlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from potstill.artifacts import digest
from potstill.cache import cache_folder
from potstill.data.bundled.options import Options, read_options
from potstill.data.decode import Pixels, decode_bytes
from potstill.data.images import ImageSet, Subset
from potstill.data.listing import name_problem, refuse
from potstill.data.settings import AugmentSettings, DataSettings
from potstill.data.shards.reading import Sample, Shard, read_shard
from potstill.data.shards.urls import expand, read_range
from potstill.data.splits import DataSplits, check_splits, fingerprint, stratified
from potstill.data.turns import one_process
from potstill.data.value_range import Range, range_of, ranged
from potstill.data.watcher import Watcher
from potstill.errors import DataError, UsageError


class ShardOptions(Options):
    """What stands beside the shards of train."""

    classes: str | list[str] | None = None  # names by number, or a text file of them, one a line
    val: str | None = None  # further shards; split from those of train where there are none
    test: str | None = None


class ShardSet:
    """Images in shards, each read by its byte range when asked for.

    Args:
        places: [N] (shard, sample).
        labels: [N] class ids.
    """

    def __init__(self, places: Sequence[tuple[str, Sample]], labels: Sequence[int]) -> None:
        self.places = [(url, each.offset, each.size) for url, each in places]
        self.names = tuple(_name(url, each) for url, each in places)
        self.labels: NDArray[np.int64] = np.asarray(labels, dtype=np.int64)
        digests = b"".join(bytes.fromhex(each.digest) for _, each in places)
        self.digests: NDArray[np.uint8] = np.frombuffer(digests, np.uint8).reshape(len(places), 32)
        self.contents = {
            name: f"{each.size} {each.digest} {each.span}".rstrip()
            for name, (_, each) in zip(self.names, places, strict=True)
        }
        self.range: Range | None = None  # as of a ``FileSet``

    def __len__(self) -> int:
        return len(self.places)

    def pixels(self, i: int) -> Pixels:
        """Image i, uint8 [H, W, 3].

        Raises:
            DataError: the shard cannot be read, or has changed since it was checked.
        """
        content = read_range(*self.places[i])
        if hashlib.sha256(content).digest() != self.digests[i].tobytes():
            raise DataError(f"{self.places[i][0]}: {self.names[i]} has changed since it was checked; start again")
        return decode_bytes(content, self.names[i], self.range)


def check_shards(settings: DataSettings) -> None:
    """What can be said before a shard is opened.

    Raises:
        UsageError: names or options that are wrong, or a shard on this machine that is not there.
    """
    options = read_options(settings, ShardOptions)
    if settings.skip_bad:
        raise UsageError(
            f"data {settings.source!r}: --skip-bad (data.skip_bad) takes folders and manifests; write the shards "
            "without the members that `potstill check` names"
        )
    for source in filter(None, (settings.source, options.val, options.test)):
        for url in expand(source):
            if "://" not in url and not Path(url).expanduser().is_file():
                raise UsageError(f"data {source!r}: there is no shard {url}")
    if isinstance(options.classes, str) and not Path(options.classes).expanduser().is_file():
        raise UsageError(f"option classes: no file {options.classes!r}; give one class name a line, or a list of names")


def from_shards(settings: DataSettings, augment: AugmentSettings, progress: Watcher | None = None) -> DataSplits:
    """Read every shard once, and check every image.

    Raises:
        UsageError: as ``check_shards``.
        DataError: shards, images or labels that cannot be trained on.
    """
    options = read_options(settings, ShardOptions)
    sources = {"train": settings.source, "val": options.val, "test": options.test}
    shards = {split: _read(source, progress) for split, source in sources.items() if source is not None}
    every = [shard for found in shards.values() for shard in found]
    refuse(settings.source, [problem for shard in every for problem in shard.problems])
    names, sets = _labelled(settings.source, shards, _class_names(options))
    origin = f"{len(every)} tar shard{'s' if len(every) != 1 else ''}"
    origin += _left_alone(every)
    parts: dict[str, ImageSet] = dict(sets)
    if shares := {s: share for s, share in (("val", settings.val), ("test", settings.test)) if s not in sets}:
        pool = sets["train"]
        made = stratified(pool.names, pool.labels, shares, settings.split_seed, names)
        parts |= {split: Subset(pool, index) for split, index in made.items()}
        origin += f"; {' and '.join(shares)} split from train here, stratified, split seed {settings.split_seed}"
    check_splits(names, parts, settings.source)
    digests = {name: each.tobytes().hex() for images in sets.values()
               for name, each in zip(images.names, images.digests, strict=True)}  # fmt: skip
    contents = {split: [digests[name] for name in images.names] for split, images in parts.items()}
    words = {name: word for images in sets.values() for name, word in images.contents.items()}
    ends = range_of(parts["train"].names, words, settings.range)
    for images in sets.values():
        images.range = ends
    return DataSplits(
        names, parts["train"], parts["val"], parts["test"], source=settings.source, origin=origin,
        fingerprint=ranged(fingerprint(parts, names, contents), ends), augment=augment, range=ends,
    )  # fmt: skip


def _left_alone(shards: Sequence[Shard]) -> str:
    """What of the shards is not used, counted and with examples."""
    found = ""
    for why in dict.fromkeys(why for shard in shards for why in shard.left):
        names = [name for shard in shards for name in shard.left.get(why, [])]
        examples = ", ".join(name if name.isprintable() else repr(name) for name in names[:3])
        found += f"; {len(names):,} {why} are left alone ({examples}{', ...' if len(names) > 3 else ''})"
    return found


def _read(source: str, progress: Watcher | None) -> list[Shard]:
    urls, found = expand(source), []
    lock = cache_folder("locks", f"{digest(source.encode('utf-8', 'surrogateescape'))[:16]}.lock")
    with one_process(lock, "reads these shards", progress):
        for at, url in enumerate(urls):
            found.append(read_shard(url))
            if progress is not None:
                progress.wait("reading shards", at + 1, len(urls))
    return found


def _labelled(
    source: str, shards: dict[str, list[Shard]], given: Sequence[str] | None
) -> tuple[tuple[str, ...], dict[str, ShardSet]]:
    """Class names, and a set for each split; a class is what .cls or .json says, or else the directory."""
    places = {
        split: [(shard.url, each) for shard in found for each in shard.samples] for split, found in shards.items()
    }
    everything = [place for found in places.values() for place in found]
    if not everything:
        raise DataError(f"{source}: no image in any shard; a sample is KEY.jpg (or png, ...) with KEY.cls beside it")
    said = [each.label is not None for _, each in everything]
    if any(said) and not all(said):
        without = _name(*everything[said.index(False)])
        raise DataError(f"{source}: {said.count(False)} of {len(said)} images have no class, for example {without}")
    texts = {split: [each.label or _directory(each) for _, each in found] for split, found in places.items()}
    used = {text for found in texts.values() for text in found}
    names = tuple(given) if given is not None else _names_of(used, source)
    ids = {name: at for at, name in enumerate(names)}
    if all(text.isdecimal() for text in used) and not used <= set(names):
        ids = {str(at): at for at in range(len(names))}
    strange = sorted(used - set(ids))
    refuse(source, [f"class {text!r} is none of the {len(names)} names" for text in strange])
    refuse(source, _bad_names(everything, names))
    return names, {split: ShardSet(found, [ids[text] for text in texts[split]]) for split, found in places.items()}


def _names_of(used: set[str], source: str) -> tuple[str, ...]:
    if not all(text.isdecimal() for text in used):
        return tuple(sorted(used))
    most = max(map(int, used))
    if most >= 10 * len(used) + 1000:
        raise DataError(
            f"{source}: the largest class is {most}, of {len(used)} that are used: name them by options.classes"
        )
    return tuple(str(at) for at in range(most + 1))


def _class_names(options: ShardOptions) -> list[str] | None:
    if not isinstance(options.classes, str):
        return options.classes
    try:
        lines = Path(options.classes).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"option classes: {options.classes} cannot be read: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def _bad_names(places: Sequence[tuple[str, Sample]], class_names: Sequence[str]) -> list[str]:
    problems = [f"class {name!r}: {why}" for name in class_names if (why := name_problem(name))]
    seen: set[str] = set()
    for url, sample in places:
        name = _name(url, sample)
        if why := name_problem(name):
            problems.append(f"{name!r}: {why}")
        elif name in seen:
            problems.append(f"{name}: there twice")
        seen.add(name)
    return problems


def _directory(sample: Sample) -> str:
    return PurePosixPath(sample.key).parent.name or "."


def _name(url: str, sample: Sample) -> str:
    return f"{url.rpartition('/')[2]}/{sample.name.removeprefix('./')}"
