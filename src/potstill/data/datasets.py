"""Load data by name, path or from Python as three checked splits, and a target domain beside them.

Names are

digits, fashion-mnist       a module of ``data/builtin``: ``fashion_mnist.py`` has ``fashion_mnist(settings)``, which
                            returns ``DataSplits``, and may have ``check(settings)``: cheap checks before loading
NAME                        of the entry point group potstill.datasets in an installed package
package.module:callable     code of your own, also path/file.py:callable

The callables of the last two get ``data.options`` as keyword arguments, and ``settings`` if they have a parameter of
that name.  They return one torch data set of (image, label); or a mapping with ``train`` and, if it has them, ``val``,
``test`` and ``class_names``; or ``DataSplits``.
"""

import hashlib
import importlib
import inspect
import os
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from potstill.code_references import is_code_reference, is_permitted, load_reference
from potstill.data import builtin
from potstill.data.concurrency import ProgressReporter
from potstill.data.entries import name_problem, raise_problems
from potstill.data.file_datasets import (
    DEFAULT_AUGMENT,
    add_unlabeled,
    check_shards,
    check_unlabeled,
    check_without_labels,
    is_shards,
    load_files,
    load_shards,
    load_without_labels,
    split_from_train,
)
from potstill.data.image_io import ValueRange, fingerprint_with_range, resolve_range
from potstill.data.image_sets import (
    UNLABELED,
    FileSet,
    ImageSet,
    RelabeledSet,
    Subset,
    TorchSet,
    file_paths,
    read_item,
    read_labels,
    set_value_range,
)
from potstill.data.image_structure import has_image_suffix
from potstill.data.parquet_tables import check_table
from potstill.data.scan import check_files, check_images
from potstill.data.settings import DataSettings
from potstill.data.sources import MANIFEST_SUFFIXES, is_table
from potstill.data.splits import (
    SPLITS,
    DataSplits,
    check_splits,
    fingerprint,
    fold_splits,
    sort_by_hash,
)
from potstill.errors import DataError, PotstillError, UsageError, did_you_mean
from potstill.formatting import format_names
from potstill.io import nearest_name

if TYPE_CHECKING:
    from potstill.data.decoded_cache import StagedSquares

_MAX_NAMES = 20  # class names of a domain that a message lists


def target_settings(settings: DataSettings) -> DataSettings:
    """Return settings that load the target as the source, split by the same shares and seed."""
    if settings.target is None:
        raise UsageError("data.target is not given: name a folder of class folders, a manifest or a data set")
    own = {"source": settings.target, "options": settings.target_options, "unlabeled": None}
    return settings.model_copy(update={**own, "target": None, "target_options": {}, "target_labels": 0.0})


def add_target(data: DataSplits, target: DataSplits) -> DataSplits:
    """Return the source's splits with the target, whose classes get the source's ids by name."""
    _check_same_classes(data, target)
    _check_disjoint(data, target)
    ids = np.array([data.class_names.index(name) for name in target.class_names], dtype=np.int64)
    train, val, test = (target.split(split) for split in SPLITS)
    if (ids != np.arange(len(ids))).any():
        train, val, test = (RelabeledSet(images, ids[images.labels]) for images in (train, val, test))
    ends = data.range if data.range is not None else target.range  # the student works in both domains
    if ends is not None:
        for images in (data.train, data.val, data.test, train, val, test):
            set_value_range(images, ends)
    target = replace(target, class_names=data.class_names, train=train, val=val, test=test, range=ends)
    return replace(
        data,
        range=ends,
        target=target,
        origin=f"{data.origin}; target {target.source}: {target.origin}",
        fingerprint=combine_fingerprints(data.fingerprint, target.fingerprint),
    )


def combine_fingerprints(*parts: str) -> str:
    """Return the SHA-256 of several fingerprints, in order."""
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def _check_same_classes(data: DataSplits, target: DataSplits) -> None:
    ours, theirs = data.class_names, target.class_names
    if set(ours) == set(theirs):
        return
    lines = [f"source {data.source} and target {target.source} must have the same classes, by name:"]
    for where, one, other in (("source", ours, theirs), ("target", theirs, ours)):
        lacking = [f"{name!r}{did_you_mean(name, one)}" for name in other if name not in one]
        lines.append(
            f"  {where}, {len(one)}: {format_names(one, _MAX_NAMES)}"
            + (f"; no {', '.join(lacking[:5])}" if lacking else "")
        )
    raise DataError("\n".join([*lines, "Rename the class folders of one of them, or leave classes out of the other"]))


def _check_disjoint(data: DataSplits, target: DataSplits) -> None:
    """Refuse files that are in both domains: one could be in train of one and in test of the other."""
    ours, theirs = (
        {path.resolve() for images in _all_sets(each) for path in file_paths(images)} for each in (data, target)
    )
    if shared := sorted(ours & theirs):
        raise DataError(
            f"source {data.source} and target {target.source} share {len(shared):,} files, for example {shared[0]}.\n"
            "The domains must have no images in common: one could be in train of the one and in test of the other"
        )


def _all_sets(data: DataSplits) -> list[ImageSet]:
    return [data.split(split) for split in SPLITS] + ([] if data.unlabeled is None else [data.unlabeled])


def load_data(
    settings: DataSettings,
    data: DataSplits | None = None,
    *,
    progress: ProgressReporter | None = None,
    staged: "StagedSquares | None" = None,
) -> DataSplits:
    """Load, split and check the data of a recipe; every file that is new or has changed is read once.

    Args:
        settings: source and split.
        data: splits from Python, which are only checked.
        progress: receives the progress of checking files.
        staged: receives squares of the images of a folder, a manifest or tables, so that loaders need not decode them.

    Raises:
        UsageError: an unknown name or option; or folds, none of which is named.
        DataError: images, classes or splits that cannot be trained on.
    """
    check_unlabeled(settings)
    if not settings.labeled:
        if data is not None:
            raise UsageError("data.labeled: false is for a folder of images; data from Python has labels")
        check_source(settings)
        return load_without_labels(settings, progress, staged)
    for each in (data, None if data is None else data.target):
        if each is not None:
            check_splits(each.class_names, {split: each.split(split) for split in SPLITS}, each.source)
    found = data if data is not None else _load_labeled(settings, progress, staged)
    if settings.folds is not None:
        found = fold_splits(found, settings)
    target = _load_target(settings, data, progress)
    if target is None:
        return hide_labels(settings, add_unlabeled(settings, found, progress, staged))
    # Unlabeled images belong to the target domain.
    return add_target(found, add_unlabeled(settings, target, progress))


def hide_labels(settings: DataSettings, data: DataSplits) -> DataSplits:
    """Return the data with ``settings.labels_per_class`` labels a class, chosen by name and ``split_seed``."""
    kept = settings.labels_per_class
    if kept is None:
        return data
    if data.unlabeled is not None:
        raise UsageError(
            "data.labels_per_class makes unlabeled images of the training images, and there are others already: leave "
            "out one of data.labels_per_class and data.unlabeled"
        )
    labels = np.asarray(data.train.labels)
    order = sort_by_hash(data.train.names, np.arange(len(labels)), settings.split_seed)
    labeled = np.sort(np.concatenate([order[labels[order] == k][:kept] for k in range(len(data.class_names))]))
    hidden = np.setdiff1d(order, labeled)
    if not len(hidden):
        most = np.bincount(labels).max()
        raise DataError(f"data.labels_per_class: {kept} keeps all labels, as no class has more than {most} in train")
    shown = f"{kept}" if np.bincount(labels).min() >= kept else f"up to {kept}"
    return replace(
        data,
        train=Subset(data.train, labeled),
        unlabeled=RelabeledSet(Subset(data.train, hidden), np.full(len(hidden), UNLABELED, dtype=np.int64)),
        origin=f"{data.origin}; in train, {shown} labels a class are used, and {len(hidden):,} images without theirs",
        fingerprint=combine_fingerprints(data.fingerprint, f"labels_per_class {kept} {settings.split_seed}"),
    )


def _load_target(
    settings: DataSettings, data: DataSplits | None, progress: ProgressReporter | None
) -> DataSplits | None:
    given = None if data is None else data.target
    if settings.target is None:
        return given
    if given is not None:
        raise UsageError("the target comes from data.target or with the data from Python, not from both")
    return _load_labeled(target_settings(settings), progress)


def _load_labeled(
    settings: DataSettings, progress: ProgressReporter | None, staged: "StagedSquares | None" = None
) -> DataSplits:
    check_source(settings)
    if is_dataset(settings.source):
        return _load_by_name(settings, progress)
    if is_shards(settings.source):
        return load_shards(settings, DEFAULT_AUGMENT, progress)
    return load_files(settings, progress, staged)


def _load_by_name(settings: DataSettings, progress: ProgressReporter | None) -> DataSplits:
    """Load a data set by its name; a folder of the same name in the working directory is mentioned."""
    name = settings.source
    hint = f"{name} is a known data set; for the images of the folder {name}, give ./{name}"
    try:
        found = load_known_dataset(settings, progress)
    except PotstillError as error:
        if Path(name).is_dir():
            raise type(error)(f"{error}\n{hint}") from error
        raise
    return replace(found, notes=(*found.notes, hint)) if Path(name).is_dir() else found


def load_known_dataset(settings: DataSettings, progress: ProgressReporter | None = None) -> DataSplits:
    """Return the splits of a data set given by name or by code; see ``call_dataset``."""
    found = call_dataset(settings)
    if isinstance(found, DataSplits):
        check_splits(found.class_names, {split: found.split(split) for split in SPLITS}, settings.source)
        return replace(found, source=settings.source)
    names = found.get("class_names")
    if names is not None and (isinstance(names, str) or not isinstance(names, Sequence)):
        raise DataError(f"{settings.source}: class_names must be a list of names, got {type(names).__name__}")
    splits = (found["train"], found.get("test"), found.get("val"))
    try:
        return from_torch(*splits, class_names=names, settings=settings, source=settings.source, progress=progress)
    except DataError as error:
        own = str(error).removeprefix(settings.source).lstrip(":, ")
        raise DataError(f"{settings.source}: {own}") from error


def check_source(settings: DataSettings) -> None:
    """Check that the source exists, without reading an image or importing torch."""
    name = settings.source
    if not settings.labeled:
        check_without_labels(settings)
        return
    if is_dataset(name) or is_shards(name):
        _check_grouping(settings)
    if is_dataset(name):
        check_dataset(settings)
        return
    if not name.strip():
        raise UsageError("no data is named: give a folder, a .csv or .jsonl manifest, or a name")  # "" would be here
    if is_shards(name):
        check_shards(settings)
        return
    if is_table(name):
        check_table(settings)
        _check_shares(settings)
        return
    path = Path(name).expanduser()
    if not path.is_dir() and not (path.is_file() and path.suffix.lower() in MANIFEST_SUFFIXES):
        if path.exists():
            image = "; for an image, give the folder that holds the class folders" if has_image_suffix(name) else ""
            raise UsageError(
                f"data {name!r}: a file of data is a manifest ({', '.join(MANIFEST_SUFFIXES)}): a list of images whose "
                f"first line is path,label or path,label,split{image}"
            )
        near = nearest_name(path, dataset_names())
        raise UsageError(
            f"no data set, folder or manifest {name!r}{near}\n"
            f"Known names: {', '.join(dataset_names())}; or give a folder of class folders, a .csv or .jsonl "
            "manifest, Parquet files, .tar shards, hf://datasets/USER/NAME, or code: path/file.py:callable"
        )
    if settings.options:
        raise UsageError(f"data {name!r}: folders and manifests take no options, got {', '.join(settings.options)}")
    _check_shares(settings)


def _check_grouping(settings: DataSettings) -> None:
    for key, default in (("keep_splits", "all"), ("class_folder", 1)):
        if (value := getattr(settings, key)) != default:
            raise UsageError(f"data.{key}: {value} is for folders and lists of files; {settings.source} has its own")


def _check_shares(settings: DataSettings) -> None:
    if settings.val + settings.test >= 1:
        raise UsageError(f"val {settings.val:g} and test {settings.test:g} leave no images for train")


def check_target(settings: DataSettings) -> None:
    """Check that the target exists, if there is one."""
    if settings.target is not None:
        check_source(target_settings(settings))


def from_torch(
    train: Any,
    test: Any = None,
    val: Any = None,
    *,
    class_names: Sequence[str] | None = None,
    settings: DataSettings | None = None,
    source: str = "python",
    progress: ProgressReporter | None = None,
) -> DataSplits:
    """Return splits from torch or torchvision data sets of (image, label).

    Images are paths of files, PIL images, uint8 arrays or tensors, or float tensors in [0, 1], without random
    transforms and without normalisation; see ``potstill.data.image_sets.TorchSet``.  Labels are class ids or class
    names.

    Args:
        train: training images; val and test are split off from them if they are None.
        test: test images.
        val: images that select the best epoch.
        class_names: class id -> name; None: ``train.classes``, or the sorted labels if they are names, or "0", "1"
            and so on.
        settings: shares and seed of the split.
        source: named in messages and in the run.
        progress: receives progress.

    Raises:
        DataError: images, classes or splits that cannot be used; every image is read once.
    """
    settings = settings or DataSettings()
    label = "data from Python" if source == "python" else source
    given = {s: each for s, each in (("train", train), ("val", val), ("test", test)) if each is not None}
    items = {s: _Items.read(each, s) for s, each in given.items()}
    names = _class_names(train, class_names, items)
    root = _common_folder([path for each in items.values() for path in each.paths])
    sets = {s: each.as_images(names, root) for s, each in items.items()}
    contents: dict[str, str] = {}  # of files, by name
    for images in sets.values():
        if isinstance(images, FileSet):
            found = check_files(root, images.names, label, progress=progress)
            images.expect(found)
            contents |= found
    parts: dict[str, ImageSet] = dict(sets)
    origin = "data sets from Python" if source == "python" else "splits of the code"
    pool = sets["train"]
    if not len(pool.labels):
        raise DataError(f"{label}: train has no images")
    if pool.labels.max() >= len(names):
        check_splits(names, {"train": pool}, label)
    origin += split_from_train(parts, names, settings)
    check_splits(names, parts, label)

    def describe() -> dict[str, list[str]]:
        return {
            split: [contents[name] for name in images.names] if images.names[0] in contents
            else check_images(images, f"{label}, {split}")
            for split, images in parts.items()
        }  # fmt: skip

    ends: ValueRange | None = None if settings.range == "auto" else settings.range
    if isinstance(sets["train"], FileSet):
        ends = resolve_range(parts["train"].names, contents, settings.range)
    _set_range(sets, ends)
    words = describe()
    if ends is None and (ends := _measured_range(sets, parts["train"].names)) is not None:
        _set_range(sets, ends)
        words = describe()
    return DataSplits(
        names, parts["train"], parts["val"], parts["test"], source=source, origin=origin, augment=DEFAULT_AUGMENT,
        fingerprint=fingerprint_with_range(fingerprint(parts, names, words), ends), range=ends,
    )  # fmt: skip


def _set_range(sets: Mapping[str, ImageSet], ends: ValueRange | None) -> None:
    if ends is not None:
        for images in sets.values():
            set_value_range(images, ends)


def _measured_range(sets: Mapping[str, ImageSet], train: Sequence[str]) -> ValueRange | None:
    """Return the range of PIL images of more than 8 bits, all of which were read; None if there are none."""
    spans = {name: "" for images in sets.values() for name in images.names}
    for images in sets.values():
        if isinstance(images, TorchSet):
            spans |= {images.names[i]: f"0 - {span}" for i, span in images.spans.items()}  # as a file's content
    return resolve_range(train, spans, "auto")


@dataclass
class _Items:
    dataset: Any
    labels: Sequence[int | str]
    names: list[str]
    paths: list[str]

    @classmethod
    def read(cls, dataset: Any, split: str) -> "_Items":
        """Read all labels and paths, but no pixels of files."""
        try:
            count = len(dataset)
        except Exception as error:  # the user's data set may raise anything
            raise DataError(
                f"{split}: a data set has a length and items (image, label), got {dataset!r:.60}"
            ) from error
        names = [f"{split}/{i:05d}" for i in range(count)]
        labels = read_labels(dataset, names)
        paths = list[str]()
        if count and isinstance(read_item(dataset, 0, names[0])[0], (str, os.PathLike)):
            for i, name in enumerate(names):
                image = read_item(dataset, i, name)[0]
                if not isinstance(image, (str, os.PathLike)):
                    kind = type(image).__name__
                    raise DataError(f"{name}: images must be all paths or all none, got an object of type {kind}")
                paths.append(os.path.abspath(os.path.expanduser(os.fspath(image))))
        raise_problems(split, (f"{path} is listed {n} times" for path, n in Counter(paths).items() if n > 1))
        return cls(dataset, labels, names, paths)

    def as_images(self, class_names: Sequence[str], root: Path) -> ImageSet:
        known = {name: i for i, name in enumerate(class_names)}
        ids: list[int] = []
        for name, label in zip(self.names, self.labels, strict=True):
            if isinstance(label, str) and label not in known:
                near = did_you_mean(label, class_names)
                raise DataError(f"{name}: the label {label!r} is not one of {len(class_names)} class names{near}")
            ids.append(known[label] if isinstance(label, str) else int(label))
        if self.paths:
            return FileSet(root, [Path(path).relative_to(root).as_posix() for path in self.paths], ids)
        return TorchSet(self.dataset, labels=ids, names=self.names)


def _common_folder(paths: Sequence[str]) -> Path:
    if not paths:
        return Path()
    try:
        return Path(os.path.commonpath([os.path.dirname(path) for path in paths]))
    except ValueError as error:  # on several drives of Windows
        raise DataError(f"the files have no folder in common: {error}") from error


def _class_names(train: Any, given: Sequence[str] | None, items: Mapping[str, _Items]) -> tuple[str, ...]:
    known = given if given is not None else getattr(train, "classes", None)
    labels = [label for each in items.values() for label in each.labels]
    if known is None and any(isinstance(label, str) for label in labels):
        known = sorted({str(label) for label in items["train"].labels})
    elif known is None:
        known = range(max((int(label) for label in labels), default=-1) + 1)
    names = tuple(str(name) for name in known)
    if len(set(names)) < len(names):
        raise DataError(f"class names must differ, got {', '.join(names[:20])}")
    raise_problems("class_names", (why for name in names if (why := name_problem(name))))
    return names


ENTRY_POINTS = "potstill.datasets"
DATASETS = tuple(sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(builtin.__path__)))
KEYS = ("train", "val", "test", "class_names")  # of the mapping that a callable returns
_RETURNS = (
    "one data set of (image, label), or a mapping with train and, if it has them, val, test and class_names, or "
    "DataSplits"
)


def dataset_names() -> list[str]:
    """Return the names of the built-in data sets and those of installed packages."""
    return [*DATASETS, *_plugins()]


def is_dataset(name: str) -> bool:
    """Return whether ``call_dataset`` takes a name; a file or folder of the same name hides code."""
    return name in dataset_names() or (not Path(name).exists() and is_code_reference(name))


def check_dataset(settings: DataSettings) -> None:
    """Check name and options without loading images; code is imported."""
    name = settings.source
    if name not in DATASETS:
        _arguments(_find(name), settings)
    elif check := getattr(_module(name), "check", None):
        check(settings)


def call_dataset(settings: DataSettings) -> DataSplits | Mapping[str, Any]:
    """Return the data set as splits, or as a mapping with some of ``KEYS``, ``train`` among them."""
    name = settings.source
    if name in DATASETS:
        found: DataSplits = getattr(_module(name), name.replace("-", "_"))(settings)
        return found
    function = _find(name)
    arguments = _arguments(function, settings)
    try:
        returned = function(**arguments)
    except PotstillError:
        raise
    except Exception as error:  # whatever foreign code raises
        raise DataError(f"{name} raised {_describe(error)}") from error
    if isinstance(returned, DataSplits):
        return returned
    if not isinstance(returned, Mapping):
        if not (hasattr(returned, "__len__") and hasattr(returned, "__getitem__")) or isinstance(returned, str | tuple):
            raise DataError(f"{name} returned an object of type {type(returned).__name__}; it must return {_RETURNS}")
        return {"train": returned}
    unknown = [key for key in returned if key not in KEYS]
    if unknown or returned.get("train") is None:
        problem = f"the key {unknown[0]!r}" if unknown else "no key 'train'"
        near = did_you_mean(str(unknown[0]), KEYS) if unknown else ""
        raise DataError(f"{name} returned a mapping with {problem}{near}; its keys are {', '.join(KEYS)}")
    return returned


def _module(name: str) -> Any:
    return importlib.import_module(f"{builtin.__name__}.{name.replace('-', '_')}")


@cache
def _plugins() -> dict[str, EntryPoint]:
    return {each.name: each for each in entry_points(group=ENTRY_POINTS)}


def _find(name: str) -> Callable[..., Any]:
    if name in _plugins():
        point = _plugins()[name]
        try:
            found = point.load()
        except Exception as error:  # whatever a foreign package raises
            package = point.value.partition(":")[0]
            raise UsageError(
                f"the data set {name!r} of the installed package {package} cannot be loaded: {_describe(error)}"
            ) from error
    else:
        if not is_permitted(name):
            raise UsageError(
                f"the data {name} is code that would run on this machine\n"
                "Read that code; if you trust it, add --allow-code (from Python: allow_code=True)"
            )
        found = load_reference(name)
    if not callable(found):
        raise UsageError(f"{name} is an object of type {type(found).__name__}; it must be a callable that returns "
                         f"{_RETURNS}")  # fmt: skip
    return found  # type: ignore[no-any-return]


def _arguments(function: Callable[..., Any], settings: DataSettings) -> dict[str, Any]:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a built-in without a signature
        return dict(settings.options)
    own = {"settings": settings} if "settings" in parameters else {}
    allowed = {key: each for key, each in parameters.items() if key != "settings" and each.kind in _BY_NAME}
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    problems = [
        f"unknown option {key!r} (allowed: {', '.join(allowed) or 'none'}){did_you_mean(key, allowed)}"
        for key in settings.options
        if key not in allowed and not takes_all
    ]
    required = [key for key, each in parameters.items() if each.default is each.empty and each.kind in _REQUIRED]
    problems += [
        f"option {key} is required: --set data.options.{key}=VALUE"
        for key in required
        if key not in settings.options and key not in own
    ]
    if problems:
        raise UsageError(f"data set {settings.source!r}: {'; '.join(problems)}")
    return {**settings.options, **own}


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_REQUIRED = (*_BY_NAME, inspect.Parameter.POSITIONAL_ONLY)


def _describe(error: Exception) -> str:
    """What foreign code raised, and in which of its lines."""
    frame, place = sys.exc_info()[2], ""
    while frame is not None:
        if frame.tb_frame.f_code.co_filename != __file__:
            place = f" ({frame.tb_frame.f_code.co_filename}, line {frame.tb_lineno})"
        frame = frame.tb_next
    message = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}{f': {message}' if message else ''}{place}"
