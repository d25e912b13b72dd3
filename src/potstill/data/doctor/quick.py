"""The quick form, for ``potstill run``: the same picture twice, by the content of files that was hashed anyway."""

import shlex
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from potstill.data.doctor.duplicates import Pictures, find_repeats
from potstill.data.doctor.findings import KINDS, Finding
from potstill.data.doctor.kept import Short, keep, kept, shorten
from potstill.data.doctor.looks import Look, images_looker
from potstill.data.doctor.report import in_order
from potstill.data.image_files import are_arrays, digests_of
from potstill.data.images import ImageSet
from potstill.data.splits import SPLITS, DataSplits

UNUSED = ("beside-classes", "hidden")  # kinds of images that a run does not use


def findings_of(data: DataSplits) -> tuple[Short, ...]:
    """What ``potstill check`` has found in this very data, else what can be found without reading a file again.

    That is kept by the data's fingerprint, so that the next run need not look.

    Args:
        data: that was checked.

    Returns:
        By kind; errors first, images that are not used last.
    """
    found = kept(data.fingerprint)
    if found is None:
        found = shorten(find_repeated(data))
        keep(data.fingerprint, found)
    # What is not used is no part of the fingerprint, and may have changed.
    return (*(each for each in found if each.kind not in UNUSED), *shorten(data.doubts))


def find_repeated(data: DataSplits) -> list[Finding]:
    """The same content within and across splits and labels: of files, and of arrays in memory.

    Nothing where the images are neither: only their owner knows what reading them costs.
    """
    sets = [data.split(split) for split in SPLITS]
    digests = [_digests(images) for images in sets]
    whole = [each for each in digests if each is not None]
    if len(whole) < len(digests) or len({each.shape[1] for each in whole}) > 1:
        return []
    content = np.concatenate(whole)
    pictures = Pictures(
        names=[name for images in sets for name in images.names],
        class_names=data.class_names,
        labels=np.concatenate([images.labels for images in sets]),
        splits=np.repeat(np.arange(len(SPLITS), dtype=np.int8), [len(images) for images in sets]),
        content=content if not are_arrays(sets[0]) else np.zeros((len(content), 32), np.uint8),
        pixels=content,
    )
    return in_order([*find_repeats(pictures).findings, *_among_unlabeled(data)])


def _among_unlabeled(data: DataSplits) -> Iterator[Finding]:
    """Unlabeled images that are also in val or test: the teacher's answers to them would be learned."""
    unlabeled = None if data.unlabeled is None else digests_of(data.unlabeled)
    if data.unlabeled is None or unlabeled is None:
        return
    names = dict(zip(map(bytes, unlabeled), data.unlabeled.names, strict=True))
    for split in ("val", "test"):
        digests = digests_of(data.split(split))
        for name, digest in zip(data.split(split).names, [] if digests is None else map(bytes, digests), strict=False):
            if digest in names:
                reason = f"in {split}, the same file as {names[digest]} of the unlabeled images; take it out of these"
                yield Finding("across-splits", name, reason, (names[digest],))


def sentences(found: Sequence[Short], source: str) -> tuple[list[str], list[str]]:
    """For people: one warning for each kind of error, and at most one note for all the others.

    Args:
        found: of ``findings_of``.
        source: as `potstill check` takes it.
    """
    command = f"`potstill check {shlex.quote(source)}`"
    warnings = [
        f"{source}: {each.count:,} x {KINDS[each.kind].what} ({KINDS[each.kind].why}), such as "
        f"{each.example}; {command} shows all"
        for each in found
        if KINDS[each.kind].severity == "error"
    ]
    others = [
        f"{each.count:,} x {KINDS[each.kind].what}" + (f" ({each.example})" if each.kind in UNUSED else "")
        for each in found
        if KINDS[each.kind].severity == "warning"
    ]
    return warnings, [f"{source}: {', '.join(others)}; {command} says which"] if others else []


def _digests(images: ImageSet) -> NDArray[np.uint8] | None:
    if not are_arrays(images):
        return digests_of(images)
    look = images_looker(images)
    found = [each.pixels for each in map(look, range(len(images))) if isinstance(each, Look)]
    return np.frombuffer(b"".join(found), np.uint8).reshape(-1, 16)
