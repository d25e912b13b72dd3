"""Linear probe: the head of a network, fitted by logistic regression on the embeddings of a frozen encoder.

The encoder runs once over train and val, without augmentation, at the network's own size; other runs with the same
encoder and images read the embeddings from the teacher cache.  Flipped images as further samples would double the cost
for 0.4 points of accuracy at most (EfficientNet-Lite0, 1,000 images of CIFAR-10).
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from potstill import __version__
from potstill.config.recipe import Recipe, StageSettings
from potstill.data.image_sets import Subset
from potstill.data.loader import Loader
from potstill.data.splits import DataSplits
from potstill.distillation.feature_extractor import ExtractionRequest, FeatureExtractor
from potstill.distillation.teacher_cache.cache import TeacherCache
from potstill.distillation.teacher_inference import InferenceSettings, convert_for_inference
from potstill.distillation.teachers import FoldHeads
from potstill.distributed.group import ProcessGroup
from potstill.errors import ArtifactError, NonFiniteError, StorageError, UsageError
from potstill.evaluation.metrics import StreamingMetrics
from potstill.evaluation.predictions import check_complete, evaluation_mode
from potstill.experiment.builders import InitialNetwork, split_loader
from potstill.experiment.plan import PlannedStage, derive_seed
from potstill.experiment.teacher_cache import names_digest, open_embedding_cache
from potstill.features.stages import find_stages
from potstill.formatting import format_count, format_duration, format_percent
from potstill.io import read_bytes, sha256_hex, write_bytes
from potstill.models.model_file import Classifier
from potstill.training.callbacks import Observer
from potstill.training.checkpointing import copy_state_dict
from potstill.training.devices import Compute
from potstill.training.probe import Probe, check_probe_labels, fit_probe
from potstill.training.trainer import balanced_class_weights

FOLD_HEADS_FILE = "fold_heads.safetensors"
_MAX_DIFFERENCE = 0.03  # relative difference of embeddings in bf16, above which they are computed in float32


@dataclass(frozen=True)
class ProbedTeacher:
    """The result of a linear probe, besides the network's head.

    Attributes:
        heads: cross-fitted heads, for the teacher's outputs on training images.
        val: its metrics on val.
        state: a copy of the network's weights.
    """

    heads: FoldHeads
    val: dict[str, Any]
    state: dict[str, Tensor]


def fits_head(network: StageSettings) -> bool:
    """Return whether the settings of a network ask for a probe, as its head or to begin with."""
    return network.head in ("probe", "finetune")


def probes_by_default(network: StageSettings, start: InitialNetwork, role: str) -> bool:
    """Return whether a network gets a probe by default: a teacher with weights of other classes."""
    return role == "teacher" and network.head is None and network.weights is not None and not start.ready


def check_probe(network: StageSettings, start: InitialNetwork, data: DataSplits, key: str) -> str:
    """Check that a head can be fitted; return the path of the network's last linear layer.

    Args:
        network: the settings of a teacher or student, with ``head``.
        start: the network as it was built.
        data: of the run.
        key: of the settings, for messages.

    Raises:
        UsageError: weights of the data's classes, a network without linear head, a class with fewer than two training
            images.
    """
    if start.ready:
        raise UsageError(
            f"{key}.head: {network.weights} already has a head for these {len(data.class_names)} classes: set "
            f"{key}.head=null, or give weights of other classes"
        )
    example = torch.randn(2, 3, start.input.size, start.input.size, generator=torch.Generator().manual_seed(0))
    device = next(start.module.parameters()).device
    head = find_stages(start.module, example.to(device)).head
    if head is None or getattr(start.module.get_submodule(head), "bias", None) is None:
        raise UsageError(
            f"{key}.head: {network.head or 'probe'} needs a last linear layer with bias, and {start.architecture} has "
            f"none: set {key}.head=random to train the whole network, or choose another network"
        )
    check_probe_labels(np.asarray(data.train.labels), data.class_names)
    return head


def probe_teacher(
    stage: PlannedStage,
    model: Classifier,
    layer: str,
    *,
    recipe: Recipe,
    data: DataSplits,
    compute: Compute,
    folder: Path,
    observer: Observer,
) -> ProbedTeacher:
    """Fit the head of ``model`` in place and write the cross-fitted heads to ``folder``; the model is not saved.

    Args:
        stage: that of the network.
        model: its network; ``facts`` receives ``head``, ``val`` and the facts of every trained model.
        layer: path of its last linear layer.
        recipe: of the run.
        data: of the stage.
        compute: device, precision and process group.
        folder: of the stage.
        observer: its methods are called with progress and result.

    Raises:
        NonFiniteError: an embedding is NaN or infinite.
    """
    started = time.monotonic()
    settings = recipe.stage_training(stage.name)
    model.module.to(compute.device).to(memory_format=compute.memory_format)
    network, inference = _convert(stage, model, layer, recipe, data, compute)
    embeddings, labels, cached = dict[str, Tensor](), dict[str, Tensor](), True
    # Of a cross-validation, all images are embedded at once, and every fold reads its own from the cache.
    whole = data if data.pool is None else replace(data, train=data.pool.images, fingerprint=data.pool.fingerprint)
    for split in ("train", "val") if data.pool is None else ("train",):
        loader = split_loader(whole, split, model.input, recipe, settings, compute)
        cache = open_embedding_cache(
            model,
            layer,
            inference,
            loader,
            split,
            batch_size=settings.batch_size,
            recipe=recipe,
            data=whole,
            folder=folder,
            observer=observer,
        )
        label = f"{stage.name}: embeddings of {split if data.pool is None else 'all images'}"
        run = partial(_embed, network, inference, layer, loader, label, observer, compute)
        embeddings[split], found = _read_or_run(cache, run, observer, compute)
        labels[split], cached = loader.labels, cached and found
    if data.pool is not None:
        for split in ("val", "train"):  # train last, which holds all images until then
            images = data.split(split)
            assert isinstance(images, Subset)
            index = torch.from_numpy(images.index)
            embeddings[split], labels[split] = embeddings["train"][index], labels["train"][index]
    balance = recipe.data.class_balance != "none" if data.draws is None else False
    labeled = labels["train"][labels["train"] >= 0]
    probe = fit_probe(
        embeddings["train"].to(compute.device),
        labels["train"],
        len(data.class_names),
        seed=derive_seed(recipe.seed, f"{stage.seed}/folds"),  # baseline and distilled start from one probe
        class_weights=balanced_class_weights(labeled.bincount(minlength=len(data.class_names))) if balance else None,
    )
    probe = compute.processes.share(probe)
    _set_head(model.module, layer, probe)
    val = StreamingMetrics(len(data.class_names))
    val.update(probe.logits(embeddings["val"]), labels["val"])
    figures = val.compute()
    heads = FoldHeads(layer, probe.weight, probe.bias, probe.fold)
    content = safetensors.torch.save(dict(heads.state_dict()))
    if compute.processes.first:
        write_bytes(folder / FOLD_HEADS_FILE, content)
    seconds = time.monotonic() - started
    model.facts |= {
        "stage": stage.name,
        "seed": recipe.seed,
        "head": {
            "kind": "probe",
            "layer": layer,
            "C": float(f"{probe.C:.3g}"),
            "folds": probe.folds,
            "images": len(labeled),
            "embedding": embeddings["train"].shape[1],
            "cross_validated": {"top1": probe.top1, "nll": probe.nll},
            "val_top1": figures["top1"],
            "seconds": round(seconds, 3),
            "fold_heads": {"sha256": sha256_hex(content), "train": _train_digest(data)},
        },
        "val": figures,
        "data": {"source": data.source, "fingerprint": data.fingerprint},
        "potstill": __version__,
    }
    observer.note(
        f"{stage.name}: a linear probe on {format_count(len(labeled))} embeddings of {probe.weight.shape[2]:,} numbers"
        f"{' from the cache' if cached else ''}: "
        f"C {probe.C:.2g} by {probe.folds}-fold cross-validation on train (top-1 {format_percent(probe.top1)}), "
        f"val top-1 {format_percent(figures['top1'])}, {format_duration(seconds)}"
    )
    return ProbedTeacher(heads, figures, copy_state_dict(model.module))


def load_fold_heads(folder: Path, facts: dict[str, Any], data: DataSplits) -> FoldHeads | None:
    """Return the cross-fitted heads of a probe for these training images; None if there are none.

    Args:
        folder: of the model.
        facts: of its model.json.
        data: with these training images.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    known = facts["head"] if isinstance(facts.get("head"), dict) else {}
    described = known.get("fold_heads")
    if not isinstance(described, dict) or described.get("train") != _train_digest(data):
        return None
    path = folder / FOLD_HEADS_FILE
    try:
        tensors = safetensors.torch.load(read_bytes(path, sha256=str(described["sha256"])))
        return FoldHeads(str(known["layer"]), tensors["weight"], tensors["bias"], tensors["fold"])
    except (KeyError, SafetensorError) as error:
        raise ArtifactError(f"{path} has no cross-fitted heads: {error}") from error


def copy_fold_heads(source: Path, target: Path) -> None:
    """Copy the file of ``load_fold_heads``, if there is one."""
    if (source / FOLD_HEADS_FILE).is_file() and source.resolve() != target.resolve():
        target.mkdir(parents=True, exist_ok=True)
        write_bytes(target / FOLD_HEADS_FILE, read_bytes(source / FOLD_HEADS_FILE))


def _train_digest(data: DataSplits) -> str:
    """Return a digest of the training images in their order, which determines the folds."""
    return sha256_hex(f"{data.fingerprint}/{names_digest(data.train.names)}".encode())


def _convert(
    stage: PlannedStage, model: Classifier, layer: str, recipe: Recipe, data: DataSplits, compute: Compute
) -> tuple[nn.Module, InferenceSettings]:
    """Return the encoder with folded BatchNorm, in bf16 if its embeddings agree, and its settings."""
    settings = recipe.stage_training(stage.name)
    loader = split_loader(data, "train", model.input, recipe, settings, compute, shared=False)
    ids = np.linspace(0, loader.samples - 1, min(16, loader.samples)).round().astype(np.int64)
    images = loader.view(torch.from_numpy(ids), 0)
    plain = InferenceSettings(memory_format=compute.memory_format)
    extractor = FeatureExtractor(ExtractionRequest(embedding=layer))
    with evaluation_mode(model.module):
        exact = extractor.run(model.module, images, plain).embedding
        assert exact is not None
        if compute.teacher_in_bf16 and recipe.network(stage.name).precision == "auto":
            with contextlib.suppress(Exception):  # other people's networks may fail in bf16 with any error
                network, inference = convert_for_inference(model.module, torch.bfloat16, compute.memory_format, images)
                rounded = extractor.run(network, images, inference).embedding
                if rounded is not None and (rounded - exact).norm() <= _MAX_DIFFERENCE * exact.norm():
                    return network, inference
        return convert_for_inference(model.module, torch.float32, compute.memory_format, images)


def _read_or_run(
    cache: TeacherCache | None, run: Callable[[], Tensor], observer: Observer, compute: Compute
) -> tuple[Tensor, bool]:
    """Return embeddings [N, D] from the cache if it has all of them, else from ``run``; and whether they were cached.

    ``run``: called by all processes, or by none.
    """
    embeddings: Tensor | None = None
    try:
        if cache is not None:
            with contextlib.suppress(StorageError):  # an unreadable file: the encoder runs
                records, present = cache.read(0, np.arange(cache.samples, dtype=np.int64))
                found = cache.record.decode(records)[1]
                embeddings = torch.from_numpy(found) if found is not None and present.all() else None
        (missing,) = compute.processes.highest(int(embeddings is None))
        if embeddings is not None and not missing:
            return embeddings, True
        embeddings = run()
        if cache is not None and compute.processes.first:
            try:
                values = embeddings.numpy()
                records = cache.record.encode(np.zeros((len(values), 0), np.float32), values)
                cache.write(0, np.arange(len(values), dtype=np.int64), records)
                cache.flush()
            except StorageError as error:
                observer.warn(f"embeddings are not cached: {error}")
        return embeddings, False
    finally:
        if cache is not None:
            cache.close()


def _embed(
    network: nn.Module,
    inference: InferenceSettings,
    layer: str,
    loader: Loader,
    label: str,
    observer: Observer,
    compute: Compute,
) -> Tensor:
    """Return embeddings [N, D] float32 of all images, on the CPU, in the order of their ids."""
    extractor = FeatureExtractor(ExtractionRequest(embedding=layer))
    parts: list[tuple[Tensor, Tensor]] = []
    done = 0
    with evaluation_mode(network):
        for batch in loader.epoch():
            embedding = extractor.run(network, batch.images, inference).embedding
            assert embedding is not None  # requested
            assert batch.index is not None  # set by every loader
            parts.append((embedding.cpu(), batch.index.cpu()))
            compute.processes.progress()
            done += len(batch)
            observer.wait(label, min(done * compute.processes.count, loader.count), loader.count)
    embeddings, index = _gather(parts, compute.processes)
    check_complete(index.numpy(), loader.count)
    embeddings = embeddings[index.argsort()]
    if not (finite := embeddings.isfinite().all(dim=1)).all():
        first = int((~finite).nonzero()[0])
        raise NonFiniteError(f"{label}: that of {loader.images.names[first]} is NaN or infinite")
    return embeddings


def _gather(parts: list[tuple[Tensor, Tensor]], processes: ProcessGroup) -> list[Tensor]:
    own = [torch.cat(column) for column in zip(*parts, strict=True)]
    gathered = [columns for columns in processes.gather(own) if columns]  # processes without images have none
    return [torch.cat(column) for column in zip(*gathered, strict=True)]


@torch.no_grad()
def _set_head(module: nn.Module, layer: str, probe: Probe) -> None:
    head = module.get_submodule(layer)
    assert isinstance(head, nn.Linear)  # see check_probe
    head.weight.copy_(probe.weight[-1])
    assert head.bias is not None
    head.bias.copy_(probe.bias[-1])
