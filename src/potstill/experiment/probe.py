"""Linear probe: the head of a network, fitted by logistic regression on the embeddings of a frozen encoder.

The encoder runs once over train and val, without augmentation; other runs read its embeddings from the teacher cache.
(Flipped images as further samples would double the cost for 0.4 points at most.)  The penalty is chosen by stratified
cross-validation on the training images, by the cross-entropy of the images left out; the heads of the folds answer the
training images in distillation (see ``distillation.teachers.FoldHeads``).
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from potstill import __version__
from potstill.config.recipe import Recipe, StageSettings
from potstill.data.image_sets import Subset
from potstill.data.loader import Loader
from potstill.data.splits import DataSplits
from potstill.distillation.teacher_inference import InferenceSettings, convert_for_inference
from potstill.distillation.teachers import ExtractionRequest, FeatureExtractor, FoldHeads
from potstill.errors import ArtifactError, NonFiniteError, UsageError
from potstill.evaluation.metrics import StreamingMetrics
from potstill.evaluation.predictions import MAX_VALUES_IN_MEMORY, check_complete, evaluation_mode
from potstill.experiment.builders import InitialNetwork, split_loader
from potstill.experiment.plan import PlannedStage, derive_seed
from potstill.experiment.teacher_cache import (
    names_digest,
    open_embedding_cache,
    open_prediction_cache,
    read_or_run,
)
from potstill.features.stages import find_stages
from potstill.formatting import format_count, format_duration, format_percent
from potstill.io import read_bytes, sha256_hex, write_bytes
from potstill.models.model_file import Classifier
from potstill.training.callbacks import Observer
from potstill.training.checkpointing import copy_state_dict
from potstill.training.devices import Compute
from potstill.training.trainer import balanced_class_weights

FOLDS = 5
CURVE_SHARES = (0.25, 0.5)  # of the images, for the learning curve; that of all is known
STRENGTHS = tuple(10.0 ** (exponent / 2) for exponent in range(-10, 5))  # of C, from 1e-5 to 100
_PATIENCE = 2  # weaker penalties that are still tried after the best so far
_MAX_ITERATIONS = 100  # of L-BFGS, for each strength; it starts from the solution of the one before
_TOLERANCE = 1e-4  # largest gradient entry of the mean loss at which it ends
_MAX_VALUES = 1 << 26  # logits that are held at a time
_SMALL = 1 << 23  # values of embeddings, of which threads would wait for each other longer than they compute
_MIN_SPREAD = 1e-3  # of an embedding's entry, in spreads of all: what hardly varies is not blown up


@dataclass(frozen=True)
class Probe:
    """A fitted probe; number f of its heads was fitted without fold f, the last one on all images."""

    weight: Tensor  # [F + 1, K, D] float32
    bias: Tensor  # [F + 1, K]
    fold: Tensor  # [N] int64, 0 to F - 1; F for images without a label
    C: float  # inverse strength of the penalty, as in scikit-learn, of standardised embeddings
    top1: float  # accuracy on the images left out, over all folds
    nll: float  # mean cross-entropy on them
    learning_curve: dict[int, float]  # images that the heads were fitted on -> accuracy on those left out

    @property
    def folds(self) -> int:
        """F."""
        return len(self.weight) - 1

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return the outputs [B, K] of the head of all images for embeddings [B, D]."""
        return F.linear(embeddings, self.weight[-1], self.bias[-1])


def check_probe_labels(labels: "np.ndarray[tuple[int], np.dtype[np.int64]]", class_names: Sequence[str]) -> None:
    """Refuse training labels by which no head can be fitted and cross-validated."""
    counts = np.bincount(labels[labels >= 0], minlength=len(class_names))
    for least, what in ((0, "no image"), (1, "one image")):
        found = [name for name, count in zip(class_names, counts, strict=True) if count == least]
        if found:
            names = ", ".join(map(repr, found[:5])) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
            raise UsageError(
                f"head: probe needs two training images of each class or more, one to fit and one to check, and there "
                f"is {what} of {names}: add images, or move some from val or test; or leave the class out.\n"
                "Without a probe: --set teacher.head=random, --set student.head=random"
            )


def stratified_folds(labels: Tensor, folds: int, seed: int) -> Tensor:
    """Return the fold of each image, [N] int64: each class is spread evenly, drawn by ``seed``.

    A class of two images or more is in two folds or more, so that no fold's complement lacks it.

    Example:
        >>> stratified_folds(torch.tensor([0, 0, 0, 0, 1, 1]), 2, seed=0).bincount()
        tensor([3, 3])
    """
    random = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    order = np.lexsort((random.numpy(), labels.cpu().numpy()))
    found = torch.empty(len(labels), dtype=torch.int64)
    found[torch.from_numpy(order)] = torch.arange(len(labels)) % folds
    return found


def fit_probe(
    embeddings: Tensor,
    labels: Tensor,
    classes: int,
    *,
    seed: int,
    class_weights: Tensor | None = None,
    folds: int = FOLDS,
    strengths: Sequence[float] = STRENGTHS,
) -> Probe:
    r"""Fit the heads of all folds, and that of all images, at the strength with the best cross-validated cross-entropy.

    .. math::
        \min_{W, b} \; \frac{1}{2} \lVert W \rVert^2 + C \sum_i w_{y_i} \, \mathrm{CE}(W x_i + b, y_i)

    Args:
        embeddings: [N, D] float32, on the device where it is to be computed.
        labels: [N] int64; below 0 where there is none.
        classes: K; each has two images or more (``check_probe_labels``).
        seed: of the folds.
        class_weights: [K], w, with a mean of about 1 over the images; all 1 where None.
        folds: F.
        strengths: values of C, rising.

    Example:
        >>> points = torch.tensor([[-2.0], [-1.5], [-1.0], [1.0], [1.5], [2.0]])
        >>> probe = fit_probe(points, torch.tensor([0, 0, 0, 1, 1, 1]), 2, seed=0, folds=3)
        >>> probe.top1, probe.logits(torch.tensor([[-1.2], [0.9]])).argmax(dim=1)
        (1.0, tensor([0, 1]))
    """
    device, known = embeddings.device, labels >= 0
    rows, targets = embeddings[known.to(device)], labels[known].to(device)
    folds = min(folds, int(targets.bincount(minlength=classes).max()))
    fold = torch.full((len(labels),), folds, dtype=torch.int64)
    fold[known.cpu()] = stratified_folds(targets, folds, seed)
    own = fold[known.cpu()].to(device)
    mean, spread = rows.mean(dim=0), rows.std(dim=0, correction=0)
    typical = spread.square().mean().sqrt().clamp(min=torch.finfo(spread.dtype).tiny)
    spread = spread.clamp(min=_MIN_SPREAD * typical)
    rows = (rows - mean) / spread
    heads = torch.arange(folds + 1, device=device)
    share = (own[:, None] != heads).float()  # [N, F + 1]: which images a head is fitted on; the last one on all
    if class_weights is not None:
        share = share * class_weights.to(device)[targets][:, None]
    solver = _Solver(rows, targets, share, classes)
    best: tuple[float, float, float, Tensor, Tensor] | None = None  # nll, top1, C, weight, bias
    since = 0
    for strength in strengths:
        with _threads(1 if rows.numel() <= _SMALL else None):
            solver.solve(strength)
            top1, nll = solver.evaluate(rows, targets, own)
        since += 1
        if best is None or nll < best[0]:
            best, since = (nll, top1, strength, solver.weight.detach().clone(), solver.bias.detach().clone()), 0
        elif since >= _PATIENCE:
            break
    assert best is not None  # there is a strength
    nll, top1, strength, weight, bias = best
    curve = _learning_curve(rows, targets, own, folds, strength, classes, seed, class_weights)
    weight = weight / spread
    bias = bias - weight @ mean
    # Softmax does not feel what all classes have in common, but rounding does.
    weight, bias = weight - weight.mean(dim=1, keepdim=True), bias - bias.mean(dim=1, keepdim=True)
    return Probe(weight.cpu(), bias.cpu(), fold, strength, top1, nll, curve | {len(targets): top1})


def _learning_curve(
    rows: Tensor,
    targets: Tensor,
    fold: Tensor,
    folds: int,
    strength: float,
    classes: int,
    seed: int,
    class_weights: Tensor | None,
) -> dict[int, float]:
    """Return the cross-validated accuracy by number of images, without shares that leave out a class."""
    random = torch.rand(len(targets), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cell = (targets * folds + fold).cpu()
    order = torch.from_numpy(np.lexsort((random.numpy(), cell.numpy())))
    sizes = cell.bincount(minlength=classes * folds)
    rank = torch.empty(len(cell), dtype=torch.int64)
    rank[order] = torch.arange(len(cell)) - (sizes.cumsum(0) - sizes)[cell[order]]
    found: dict[int, float] = {}
    for share in CURVE_SHARES:
        chosen = (rank < (share * sizes).round()[cell]).to(fold.device)
        fitted = torch.stack([chosen & (fold != each) for each in range(folds)], dim=1)
        if any(int(targets[column].bincount(minlength=classes).min()) == 0 for column in fitted.T):
            continue
        weights = fitted.float() if class_weights is None else fitted * class_weights.to(fold.device)[targets][:, None]
        solver = _Solver(rows[chosen], targets[chosen], weights[chosen], classes)
        with _threads(1 if rows.numel() <= _SMALL else None):
            solver.solve(strength)
            found[int(chosen.sum())] = solver.evaluate(rows, targets, fold)[0]
    return found


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Within the block torch computes in so many threads; None: in as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Solver:
    """All heads at once: their problems are apart, but read the same rows, weighted by ``share`` [N, H]."""

    def __init__(self, rows: Tensor, targets: Tensor, share: Tensor, classes: int) -> None:
        self.rows, self.targets, self.share = rows, targets, share
        self.count, self.classes = share.shape[1], classes
        self.images = (share > 0).sum(dim=0)  # [H]
        self.weight = torch.zeros(self.count, classes, rows.shape[1], device=rows.device, requires_grad=True)
        self.bias = torch.zeros(self.count, classes, device=rows.device, requires_grad=True)
        self.block = max(1, _MAX_VALUES // (self.count * classes))

    def solve(self, strength: float) -> None:
        """Go on from the present solution to that of C ``strength``."""
        optimizer = torch.optim.LBFGS(
            [self.weight, self.bias],
            max_iter=_MAX_ITERATIONS,
            history_size=20,
            tolerance_grad=_TOLERANCE,
            tolerance_change=1e-9,
            line_search_fn="strong_wolfe",
        )

        def loss() -> float:
            optimizer.zero_grad()
            total = (self.weight.square().sum(dim=(1, 2)) / (2 * strength * self.images)).sum()
            total.backward()  # type: ignore[no-untyped-call]
            value = total.detach()
            for at in range(0, len(self.rows), self.block):
                part = slice(at, at + self.block)
                losses = self._cross_entropies(part)
                mean = (self.share[part] * losses / self.images).sum()
                mean.backward()  # type: ignore[no-untyped-call]
                value = value + mean.detach()
            return float(value)

        optimizer.step(loss)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def evaluate(self, rows: Tensor, targets: Tensor, fold: Tensor) -> tuple[float, float]:
        """Accuracy and cross-entropy of images [N, D] by the heads that have not seen them; ``fold``: [N]."""
        right, total = 0, 0.0
        for at in range(0, len(rows), self.block):
            part = slice(at, at + self.block)
            logits = self._logits(rows[part])[torch.arange(len(fold[part]), device=fold.device), fold[part]]
            right += int((logits.argmax(dim=1) == targets[part]).sum())
            total += float(F.cross_entropy(logits, targets[part], reduction="sum"))
        return right / len(rows), total / len(rows)

    def _logits(self, rows: Tensor) -> Tensor:
        found = F.linear(rows, self.weight.view(-1, rows.shape[1]), self.bias.view(-1))
        return found.view(len(rows), self.count, self.classes)

    def _cross_entropies(self, part: slice) -> Tensor:
        """[B, H]."""
        logits = self._logits(self.rows[part])
        targets = self.targets[part, None].expand(-1, self.count)
        return F.cross_entropy(logits.permute(0, 2, 1), targets, reduction="none")


FOLD_HEADS_FILE = "fold_heads.safetensors"
_MAX_DIFFERENCE = 0.03  # relative difference of embeddings in bf16, above which they are computed in float32


@dataclass(frozen=True)
class ProbedTeacher:
    """The result of a linear probe, besides the network's head."""

    heads: FoldHeads  # cross-fitted, for the teacher's outputs on training images
    val: dict[str, Any]  # its metrics on val
    state: dict[str, Tensor]  # a copy of the network's weights


def fits_head(network: StageSettings) -> bool:
    """Return whether the settings of a network request a probe, as its head or to begin with."""
    return network.head in ("probe", "finetune")


def probes_by_default(network: StageSettings, start: InitialNetwork, role: str) -> bool:
    """Return whether a network gets a probe by default: a teacher with weights of other classes."""
    return role == "teacher" and network.head is None and network.weights is not None and not start.ready


def check_probe(network: StageSettings, start: InitialNetwork, data: DataSplits, key: str) -> str:
    """Check that a head can be fitted; return the path of the network's last linear layer."""
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

    ``model.facts`` receives ``head``, ``val`` and the facts of every trained model.
    """
    started = time.monotonic()
    settings = recipe.stage_training(stage.name)
    compute.place(model.module, stage.name)
    model.module.to(memory_format=compute.memory_format)
    network, inference = _convert(stage, model, layer, recipe, data, compute)
    embeddings, labels, cached = dict[str, Tensor](), dict[str, Tensor](), True  # embeddings in the first process only
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
        run = partial(embed_images, network, inference, layer, loader, label, observer, compute)
        read, found = read_or_run(cache, run, observer.warn, compute)
        embeddings |= {} if read is None else {split: read}
        labels[split], cached = loader.labels, cached and found
    if data.pool is not None:
        for split in ("val", "train"):  # train last, which holds all images until then
            images = data.split(split)
            assert isinstance(images, Subset)
            index = torch.from_numpy(images.index)
            embeddings |= {split: embeddings["train"][index]} if embeddings else {}
            labels[split] = labels["train"][index]
    balance = recipe.data.class_balance != "none" if data.draws is None else False
    labeled = labels["train"][labels["train"] >= 0]
    fitted: tuple[Probe, dict[str, Any]] | None = None
    if compute.processes.first:
        weights = balanced_class_weights(labeled.bincount(minlength=len(data.class_names))) if balance else None
        probe = fit_probe(
            embeddings["train"].to(compute.device),
            labels["train"],
            len(data.class_names),
            seed=derive_seed(recipe.seed, f"{stage.seed}/folds"),  # baseline and distilled start from one probe
            class_weights=weights,
        )
        val = StreamingMetrics(len(data.class_names))
        val.update(probe.logits(embeddings["val"]), labels["val"])
        fitted = probe, val.compute()
    fitted = compute.processes.share(fitted)
    assert fitted is not None  # the first process has fitted it
    probe, figures = fitted
    _set_head(model.module, layer, probe)
    if recipe.network(stage.name).head != "finetune" and inference.dtype == torch.float32:  # else others, or rounded
        for split in ("train", "val"):  # for the evaluation, which would run the encoder again
            if len(labels[split]) * len(data.class_names) <= MAX_VALUES_IN_MEMORY:
                rows = probe.logits(embeddings[split]).softmax(dim=1) if embeddings else None
                loader = split_loader(data, split, model.input, recipe, settings, compute, network=model.module)
                predictions = open_prediction_cache(
                    model, loader, split, stage=stage.name, recipe=recipe, data=data, folder=folder, compute=compute,
                    warn=observer.warn,
                )  # fmt: skip
                read_or_run(predictions, lambda rows=rows: rows, observer.warn, compute)  # type: ignore[misc]
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
            "embedding": probe.weight.shape[2],
            "cross_validated": {"top1": probe.top1, "nll": probe.nll},
            "learning_curve": [{"images": count, "top1": top1} for count, top1 in probe.learning_curve.items()],
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
    """Return the cross-fitted heads of a probe for these training images; None if there are none."""
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


def embed_images(
    network: nn.Module,
    inference: InferenceSettings,
    layer: str,
    loader: Loader,
    label: str,
    observer: Observer,
    compute: Compute,
) -> Tensor | None:
    """Return embeddings [N, D] float32 of all images, on the CPU, in the order of their ids; in the first process only.

    Not finite ones (NonFiniteError) or missing images (DataError) are raised in all processes.
    """
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
    own = [torch.cat(column) for column in zip(*parts, strict=True)]
    gathered = compute.processes.collect(own) or []
    return compute.processes.run_on_first(
        lambda: _in_order([columns for columns in gathered if columns], loader, label)
    )


def _in_order(gathered: list[list[Tensor]], loader: Loader, label: str) -> Tensor:
    """Return embeddings in the order of their ids, from embeddings and ids of each process that has images."""
    embeddings, index = (torch.cat(column) for column in zip(*gathered, strict=True))
    check_complete(index.numpy(), loader.count)
    embeddings = embeddings[index.argsort()]
    if not (finite := embeddings.isfinite().all(dim=1)).all():
        first = int((~finite).nonzero()[0])
        raise NonFiniteError(f"{label}: that of {loader.images.names[first]} is NaN or infinite")
    return embeddings


@torch.no_grad()
def _set_head(module: nn.Module, layer: str, probe: Probe) -> None:
    head = module.get_submodule(layer)
    assert isinstance(head, nn.Linear)  # see check_probe
    head.weight.copy_(probe.weight[-1])
    assert head.bias is not None
    head.bias.copy_(probe.bias[-1])
