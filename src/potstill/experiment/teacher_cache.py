"""The teacher cache of a run: how many views are drawn in turn, what is kept of the teacher's outputs, and the open
caches of one stage.

The views and the kind of record follow from recipe and data alone, so that no weight depends on the free disk: that
only decides whether the records are kept on disk, or made anew in every step from the live teacher's outputs. A cache
is keyed by everything that determines the teacher's outputs.
"""

import contextlib
import dataclasses
import hashlib
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from potstill.config import stage_role
from potstill.config.recipe import Recipe, dump_recipe, load_recipe
from potstill.data.loader import Loader
from potstill.data.splits import DataSplits
from potstill.distillation.cached_outputs import AnyTeacherCache, CachedTeacherOutputs, NullTeacherCache
from potstill.distillation.distiller import Distiller
from potstill.distillation.teacher_cache.cache import TeacherCache, copy_from_wider
from potstill.distillation.teacher_cache.record_format import FEW_CLASSES, RecordFormat, RecordKind
from potstill.distillation.teacher_inference import InferenceSettings
from potstill.distillation.teachers import TeacherViews
from potstill.distributed.group import SINGLE_PROCESS, ProcessGroup
from potstill.errors import ArtifactError, StorageError, UsageError
from potstill.formatting import format_many, format_scaled
from potstill.input_spec import InputSpec
from potstill.io import cache_folder
from potstill.methods import describe_method
from potstill.methods.base import Method
from potstill.models.families.opaque_models import FunctionNetwork, find_opaque
from potstill.models.families.own_models import is_own_network
from potstill.models.model_file import Classifier, outputs_of_fixed_images
from potstill.training.callbacks import Observer
from potstill.training.devices import Compute

_PACKAGE = Path(__file__).parents[1]
MIN_VIEWS = 8  # views, where there are as many epochs
EPOCHS_PER_VIEW = 4  # one view for so many epochs, where there are many
TOP16_FROM_BYTES = (
    10e9  # bytes of one seed's float16 records, from which the 16 largest logits are kept where they suffice
)
MANY_CLASSES = 500  # from which they are kept in any case: 72 bytes an answer in place of 2 a class
MAX_DISK_FRACTION = 0.25  # of what is free, that stores may take
_ASSUMED_WIDTH = 2048  # of embeddings, before the teacher is loaded

Views = int | Literal["all"]


@dataclass(frozen=True)
class ViewPlan:
    """What a run does about views and their answers."""

    views: Views  # drawn in turn, by baseline and distilled alike
    record: RecordKind | None  # what is kept of logits; None: the method trains on live outputs
    use_cache: bool  # whether the records are stored on disk
    note: str = ""  # for people; empty if there is nothing to report


def cache_root(recipe: Recipe) -> Path:
    """Where the recipe's stores stand."""
    return Path(recipe.teacher_cache.folder).expanduser() if recipe.teacher_cache.folder else cache_folder("teachers")


def is_cacheable(method: Method) -> bool:
    """Whether all outputs of the teacher that the method needs can be kept."""
    return method.needs.storable and not method.teacher_taps


def plan_views(recipe: Recipe, method: Method, data: DataSplits) -> ViewPlan:
    """How many views are drawn in turn, and whether and how answers are kept."""
    views = count_views(recipe)
    if recipe.teacher_cache.mode == "off" or not is_cacheable(method):
        return ViewPlan(views, None, False)
    classes = len(data.class_names)
    kind = record_kind(recipe, method, classes)
    size = _bytes_of_seed(recipe, method, data, kind)
    large = size > TOP16_FROM_BYTES or classes >= MANY_CLASSES
    if recipe.teacher_cache.record == "auto" and large and top16_suffices(method, classes):
        kind = "top16"
        size = _bytes_of_seed(recipe, method, data, kind)
    needed, room = recipe.seeds * size, MAX_DISK_FRACTION * _free_bytes(cache_root(recipe))
    if needed <= room:
        return ViewPlan(views, kind, True)
    seeds = f" of {recipe.seeds} seeds" if recipe.seeds > 1 else ""
    note = (
        f"teacher outputs are not cached: those of {format_many(_views_shown(recipe), 'view')}{seeds} take "
        f"{format_scaled(needed, 'B')}, more than a quarter of the free disk of {cache_root(recipe)}; the teacher runs "
        "in every step, on the same views"
    )
    if kind != "top16" and top16_suffices(method, classes):
        smaller = recipe.seeds * _bytes_of_seed(recipe, method, data, "top16")
        if smaller <= room:
            note += f" (--set teacher_cache.record=top16 takes {format_scaled(smaller, 'B')})"
    return ViewPlan(views, kind, False, note)


def count_views(recipe: Recipe) -> Views:
    """Return how many views are drawn in turn; "auto": a quarter of the student's epochs, at least eight, at most all.

    Example:
        >>> [count_views(load_recipe("quickstart", [f"training.epochs={epochs}"])) for epochs in (5, 12, 32, 240)]
        [5, 8, 8, 60]
    """
    wish, epochs = recipe.teacher_cache.views, recipe.stage_training("student").epochs
    return min(epochs, max(MIN_VIEWS, math.ceil(epochs / EPOCHS_PER_VIEW))) if wish == "auto" else wish


def record_kind(recipe: Recipe, method: Method, classes: int) -> RecordKind:
    """What the recipe keeps of a teacher's logits; float16 where it leaves that open."""
    kind = recipe.teacher_cache.record
    if kind != "top16":
        return "float16" if kind == "auto" else kind
    if classes <= FEW_CLASSES:
        raise UsageError(
            f"teacher_cache.record top16 is for more than {FEW_CLASSES} classes, and there are {classes}: use float16"
        )
    if not top16_suffices(method, classes):
        raise UsageError(
            "teacher_cache.record top16 keeps the 16 largest logits and the mass of the others, which "
            "suffices for kd; method "
            f"{describe_method(recipe.method)} reads all of them: use float16"
        )
    return kind


def top16_suffices(method: Method, classes: int) -> bool:
    """Whether the 16 largest logits and the mass of the others are enough for a method."""
    return classes > FEW_CLASSES and method.soft_temperature is not None and not method.needs.embedding


def apply_view_plan(recipe: Recipe, plan: ViewPlan) -> Recipe:
    """The recipe with what "auto" means here, so that its file in the run folder records what was done."""
    decided = {"views": plan.views} | ({"record": plan.record} if plan.record is not None else {})
    return recipe.model_copy(update={"teacher_cache": recipe.teacher_cache.model_copy(update=decided)})


def restore_view_plan(path: Path, recipe: Recipe) -> Recipe:
    """For a run that goes on: "auto" means what it meant when the run began, whatever the number of epochs now."""
    before = load_recipe(path, data_needed=False, recorded=True).teacher_cache
    kept = {
        key: getattr(before, key)
        for key in ("views", "record")
        if getattr(recipe.teacher_cache, key) == "auto" and getattr(before, key) != "auto"
    }
    return recipe.model_copy(update={"teacher_cache": recipe.teacher_cache.model_copy(update=kept)}) if kept else recipe


def _views_shown(recipe: Recipe) -> int:
    """How many views are shown to a student in the end."""
    views, epochs = count_views(recipe), recipe.stage_training("student").epochs
    return epochs if views == "all" else min(views, epochs)


def _bytes_of_seed(recipe: Recipe, method: Method, data: DataSplits, kind: RecordKind) -> int:
    """Of all records that the student of one seed trains on."""
    classes = len(data.class_names)
    distinct = method.needs.second != "none" or not (recipe.data.augment or data.augment).changes_nothing
    data = data.measured  # of a target more may be stored than the teacher will be sure of
    images = len(data.train) + (0 if data.unlabeled is None else len(data.unlabeled))
    record = RecordFormat(kind, classes, _ASSUMED_WIDTH if method.needs.embedding else 0)
    stores = max(1, len(recipe.teacher_list)) * (1 if method.needs.second == "none" else 2)
    return (_views_shown(recipe) if distinct else 1) * images * record.nbytes * stores


def _free_bytes(folder: Path) -> int:
    """Bytes free where the folder is or will be."""
    try:
        existing = next(each for each in (folder.resolve(), *folder.resolve().parents) if each.exists())
        return shutil.disk_usage(existing).free
    except OSError:
        return 0


@dataclass
class StageCaches:
    """A stage's answers by split, as records; nothing where the method trains on the live answers."""

    by_split: dict[str, CachedTeacherOutputs] = field(default_factory=dict)
    kept: bool = False  # on disk

    def close(self) -> None:
        """Make everything last; other processes may write then."""
        for recorded in self.by_split.values():
            recorded.close()

    def counts(self, processes: ProcessGroup = SINGLE_PROCESS) -> dict[str, int]:
        """Return the number of training images whose outputs were computed and read, over all processes."""
        if not self.kept:
            return {}
        counts = processes.gather(self.by_split["train"].counts)
        return {"computed": sum(each.computed for each in counts), "read": sum(each.read for each in counts)}


@dataclass(frozen=True)
class StageTeacher:
    """A teacher, its model folder, and its inference settings."""

    classifier: Classifier  # as trained, in float32
    folder: Path | None  # None where nothing is stored
    weights: str  # digest of the classifier's
    inference_settings: InferenceSettings | None = None  # they determine rounding; None: under autocast
    fold_heads: str | None = None  # digest of its cross-fitted heads, where it has such


def open_caches(
    distiller: Distiller,
    loaders: dict[str, Loader],
    teachers: Sequence[StageTeacher],
    *,
    stage: str,
    student: InputSpec,
    recipe: Recipe,
    data: DataSplits,
    compute: Compute,
    observer: Observer,
    use_cache: bool = True,
    views: Mapping[str, TeacherViews] | None = None,
) -> StageCaches:
    """Return caches of the teachers' outputs for each split, with the data's fingerprint in the keys.

    Where a cache cannot be used, or with ``use_cache=False``, the live teacher's outputs are rounded as its records
    would be, so that the weights are the same.  ``views``: by split, the images for teachers of another size.
    """
    method, classes = distiller.method, len(data.class_names)
    kind = record_kind(recipe, method, classes)
    failed: StorageError | ArtifactError | None = None
    described = [describe_teacher(teacher) for teacher in teachers]
    recipe_text = dump_recipe(recipe)
    widths = embedding_widths(distiller) if method.needs.embedding else [0] * len(teachers)
    opened: list[TeacherCache] = []

    def shelves_of(split: str, loader: Loader, kept: bool) -> dict[bool, list[AnyTeacherCache]]:
        caches: dict[bool, list[AnyTeacherCache]] = {False: [], True: []}
        for second in (False, True) if split == "train" and method.needs.second == "strong" else (False,):
            for teacher, description, width in zip(teachers, described, widths, strict=True):
                record = RecordFormat(kind, classes, width)
                if kept:
                    facts = {
                        "teacher": teacher.classifier.architecture,
                        "folder": str((teacher.folder or Path()).resolve()),
                        "data": data.source,
                        "stage": stage,
                        "student input": dataclasses.asdict(student),
                        "recipe": recipe_text,
                    }
                    key = cache_key(description, loader, split, data, second=second)
                    opened.append(TeacherCache.open(cache_root(recipe), key, record, loader.samples, facts))
                    if compute.processes.first:
                        copy_from_wider(opened[-1])
                    caches[second].append(opened[-1])
                else:
                    caches[second].append(NullTeacherCache(record))
        return caches

    # If the method uses the teacher in training only, val has no outputs.
    answered = {split: each for split, each in loaders.items() if split == "train" or not method.needs.training_only}
    try:
        caches = {split: shelves_of(split, loader, use_cache) for split, loader in answered.items()}
    except (StorageError, ArtifactError) as error:
        failed = error
        observer.warn(f"the teacher cache cannot be used, so the teacher runs in every step: {error}")
    kept = use_cache and not any(compute.processes.highest(int(failed is not None)))  # all processes record, or none
    if not kept:
        for store in opened:
            store.close()
        caches = {split: shelves_of(split, loader, False) for split, loader in answered.items()}
    return StageCaches(
        {
            split: CachedTeacherOutputs(
                distiller,
                loader,
                caches[split][False],
                caches[split][True],
                autocast=compute.autocast,
                warn=observer.warn,
                training=split == "train",
                processes=compute.processes,
                views=(views or {}).get(split),
            )
            for split, loader in answered.items()
        },
        kept,
    )


def describe_teacher(teacher: StageTeacher) -> dict[str, Any]:
    """All that determines a teacher's outputs for an image."""
    network = teacher.classifier
    return {
        "architecture": network.architecture,
        "weights": teacher.weights,
        "remodelled": network.remodelled,
        **({} if network.output_groups is None else {"output_groups": network.output_groups.as_dict()}),
        **({} if network.pruned is None else {"pruned": network.pruned}),
        "input": dataclasses.asdict(network.input),
        "inference": None if teacher.inference_settings is None else teacher.inference_settings.facts(),
        **({} if teacher.fold_heads is None else {"fold heads": teacher.fold_heads}),
        **({} if (code := _code_digest(network.module)) is None else {"code": code}),
        **({"outputs": _outputs_digest(network)} if is_own_network(network.architecture) else {}),
    }


def _code_digest(module: nn.Module) -> str | None:
    """SHA-256 over the files of a network's own code, which can change beside the same weights; None without such."""
    found = hashlib.sha256()
    codes = {getattr(getattr(type(each), "forward", None), "__code__", None) for each in module.modules()}
    files = sorted({code.co_filename for code in codes if code is not None and "site-packages" not in code.co_filename})
    own = [Path(file) for file in files if not Path(file).is_relative_to(_PACKAGE) and Path(file).is_file()]
    for file in own:
        found.update(file.read_bytes())
    return found.hexdigest() if own else None


def _outputs_digest(network: Classifier) -> str:
    """SHA-256 over a network's rounded outputs for four fixed images.

    What a network of somebody's own computes can change beside the same weights and code: a factor that is a plain
    attribute, the slope of a LeakyReLU, code that was typed into a notebook.
    """
    outputs = outputs_of_fixed_images(network.module, network.input.size)
    # In steps of a thousandth of the largest: other numbers of threads round otherwise.
    step = 2.0 ** (np.frexp(float(outputs.abs().max()))[1] - 10)
    rounded = np.nan_to_num((outputs / step).round().numpy()) + 0.0  # no -0.0
    return hashlib.sha256(f"{step}\0".encode() + rounded.tobytes()).hexdigest()


def cache_key(teacher: dict[str, Any], loader: Loader, split: str, data: DataSplits, *, second: bool) -> dict[str, Any]:
    """All that decides a store's records; any change of it is another key."""
    own_size = {"resolution": "own"} if teacher["input"]["size"] != loader.spec.size else {}  # else: the student's
    # The fingerprint does not depend on their order, ids do; it lacks unlabeled images that came from Python.
    names = [*data.split(split).names, *(loader.unlabeled.names if loader.unlabeled is not None else ())]
    return {
        "teacher": teacher,
        **own_size,
        "classes": list(data.class_names),
        "data": data.fingerprint,
        "split": split,
        "names": names_digest(names),
        "views": loader.describe_views(second=second),
    }


def names_digest(names: Sequence[str]) -> str:
    """SHA-256 over the names of images, in their order."""
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()


def open_embedding_cache(
    encoder: Classifier,
    layer: str,
    how: InferenceSettings,
    loader: Loader,
    split: str,
    *,
    batch_size: int,
    recipe: Recipe,
    data: DataSplits,
    folder: Path,
    observer: Observer,
) -> TeacherCache | None:
    """Return the cache of an encoder's embeddings, float32, of the images of a split without augmentation (view 0).

    They depend on all weights but those of the head ``layer``, so that runs with other seeds, heads and classes share
    them, and on the batch size, by which sums are rounded.  None if it is off or cannot be used.
    """
    if recipe.teacher_cache.mode == "off":
        return None
    head = encoder.module.get_submodule(layer)
    assert isinstance(head, nn.Linear)
    teacher = describe_teacher(StageTeacher(encoder, None, module_digest(encoder.module, without=layer), how))
    key = cache_key(teacher, loader, split, data, second=False) | {"embedding": layer, "batch_size": batch_size}
    key.pop("classes")
    what = f"embeddings of {split}"
    return _open_rows(
        encoder, what, key, head.in_features, loader, recipe=recipe, data=data, folder=folder, warn=observer.warn
    )


def open_prediction_cache(
    model: Classifier,
    loader: Loader,
    split: str,
    *,
    stage: str,
    recipe: Recipe,
    data: DataSplits,
    folder: Path,
    compute: Compute,
    warn: Callable[[str], None],
) -> TeacherCache | None:
    """Return the cache of the probabilities, float32, that a stage's network has for a split without augmentation.

    For teachers that the run does not train: later runs read them.  None for others, for functions and tables, and if
    the cache is off or cannot be used.
    """
    trained = stage_role(stage) != "teacher" or "training" in model.facts
    if recipe.teacher_cache.mode == "off" or trained or find_opaque(model.module) is not None:
        return None
    teacher = describe_teacher(StageTeacher(model, None, module_digest(model.module), None))
    key = cache_key(teacher, loader, split, data, second=False)
    key |= {"predictions": compute.device.type, "batch_size": recipe.stage_training(stage).batch_size}
    what = f"predictions of {split}"
    return _open_rows(
        model, what, key, len(model.class_names), loader, recipe=recipe, data=data, folder=folder, warn=warn
    )


def _open_rows(
    model: Classifier,
    what: str,
    key: dict[str, Any],
    width: int,
    loader: Loader,
    *,
    recipe: Recipe,
    data: DataSplits,
    folder: Path,
    warn: Callable[[str], None],
) -> TeacherCache | None:
    """Open a cache of ``width`` numbers, float32, for each image."""
    record, root = RecordFormat("float32", 0, width), cache_root(recipe)
    size, room = record.nbytes * loader.samples, MAX_DISK_FRACTION * _free_bytes(root)
    if size > room:
        takes = format_scaled(size, "B")
        warn(f"{what} are not cached: they take {takes}, more than a quarter of the free disk of {root}")
        return None
    facts = {
        "teacher": f"{model.architecture}, {what.partition(' ')[0]}",
        "folder": str(folder.resolve()),
        "data": data.source,
        "recipe": dump_recipe(recipe),
    }
    try:
        return TeacherCache.open(root, key, record, loader.samples, facts)
    except (StorageError, ArtifactError) as error:
        warn(f"{what} are not cached: {error}")
        return None


def read_or_run(
    cache: TeacherCache | None, run: Callable[[], Tensor | None], warn: Callable[[str], None], compute: Compute
) -> tuple[Tensor | None, bool]:
    """Return rows [N, D] from the cache, else from ``run``, and whether they were cached; in one process."""
    rows: Tensor | None = None
    try:
        if cache is not None and compute.processes.first:
            with contextlib.suppress(StorageError):  # an unreadable file: the network runs
                records, present = cache.read(0, np.arange(cache.samples, dtype=np.int64))
                found = cache.record.decode(records)[1]
                rows = torch.from_numpy(found) if found is not None and present.all() else None
        (missing,) = compute.processes.highest(int(compute.processes.first and rows is None))
        if not missing:
            return rows, True
        rows = run()
        if cache is not None and rows is not None:
            try:
                values = rows.numpy()
                records = cache.record.encode(np.zeros((len(values), 0), np.float32), values)
                cache.write(0, np.arange(len(values), dtype=np.int64), records)
                cache.flush()
            except StorageError as error:
                warn(f"a teacher's outputs are not cached: {error}")
        return rows, False
    finally:
        if cache is not None:
            cache.close()


def embedding_widths(distiller: Distiller) -> list[int]:
    """D of each teacher: what its last linear layer reads."""
    assert distiller.teacher is not None
    found = []
    for network, extractor in zip(distiller.teacher.networks, distiller.teacher.extractors, strict=True):
        assert extractor.request.embedding is not None  # the method needs it
        layer = network.get_submodule(extractor.request.embedding)
        assert isinstance(layer, nn.Linear)
        found.append(layer.in_features)
    return found


def module_digest(module: nn.Module, without: str | None = None) -> str:
    """SHA-256 over names, kinds, shapes and bytes of a network's tensors, and the outputs of a plain function."""
    found = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if without is not None and name.rpartition(".")[0] == without:
            continue
        plain = tensor.detach().cpu().contiguous()
        found.update(f"{name}\0{plain.dtype}\0{tuple(plain.shape)}\0".encode())
        found.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    if isinstance(function := find_opaque(module), FunctionNetwork):
        found.update(function.fingerprint())
    return found.hexdigest()
