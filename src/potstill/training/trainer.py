"""The training loop of teacher, baseline and distilled student, with its label loss.

The label loss is cross-entropy with class weights, label smoothing, mixed labels and images without a label.  The
teacher's outputs are computed for each batch, cached in memory, or read from a teacher cache.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from potstill.distillation.distiller import Distiller
from potstill.distillation.teacher_views import TeacherViews
from potstill.errors import Stopped, StorageError, UsageError
from potstill.evaluation.metrics import StreamingMetrics
from potstill.features.stages import find_stages
from potstill.io import write_json_lines
from potstill.training import checkpointing as ckpt
from potstill.training.averaging import ModelEma
from potstill.training.callbacks import Observer, SignalHandler
from potstill.training.checkpointing import Checkpointer
from potstill.training.compile import StudentCompiler
from potstill.training.ddp import DistributedDistiller, check_distributed_support
from potstill.training.devices import Compute
from potstill.training.optim import GradientAccumulator, create_optimizer, layer_lr_scales, lr_factor
from potstill.training.qat import plain_epochs, simulated_int8
from potstill.training.settings import TrainingSettings
from potstill.training.state import EpochRecord, EpochState, History, TermAverages
from potstill.types import Batch, Outputs, Step

if TYPE_CHECKING:
    from potstill.data.loader import Loader


class LabelLoss(nn.Module):
    r"""Cross-entropy in which a class weight multiplies the loss of a whole image.

    .. math::
        \ell_i = -\sum_k \Big( (1 - \epsilon) \, q_{ik} + \frac{\epsilon}{K} \Big) \log p_{ik}, \qquad
        L = \frac{\sum_i w_i \ell_i}{\sum_i w_i}, \qquad w_i = \sum_k q_{ik} w_k

    q is the image's label as a one-hot vector, or its shares of the classes where images are mixed.  Smoothing spreads
    epsilon over all classes alike.  ``nn.CrossEntropyLoss`` instead multiplies the smoothed (or mixed) mass of class k
    by the weight of class k: with rare classes of large weight, the best answer to every image is then a rare class.
    Without smoothing and mixing both are the same.

    Args:
        weight: [K], of each class; all 1 where None.
        label_smoothing: epsilon, the share of the label that is spread over all classes.

    Example:
        >>> logits, labels = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1])
        >>> # by hand: -log p of image 0: 0.1269 and 2.1269; smoothed by 0.2: 0.9 * 0.1269 + 0.1 * 2.1269 = 0.3269;
        >>> # image 1: 0.6931; (1 * 0.3269 + 3 * 0.6931) / 4
        >>> LabelLoss(torch.tensor([1.0, 3.0]), label_smoothing=0.2)(logits, labels)
        tensor(0.6016)
        >>> LabelLoss()(logits, torch.tensor([-100, -100])).item()  # no label: 0, and not torch's NaN
        0.0
    """

    weight: Tensor | None

    def __init__(self, weight: Tensor | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Logits [B, K] and labels [B], -100 where unknown, or shares of the classes [B, K] -> a scalar."""
        losses = F.cross_entropy(logits, target, label_smoothing=self.label_smoothing, reduction="none")
        weights = self._of_images(target).to(losses.dtype)
        return (weights * losses).sum() / weights.sum().clamp(min=torch.finfo(losses.dtype).tiny)

    def _of_images(self, target: Tensor) -> Tensor:
        if target.is_floating_point():  # no matrix product, which autocast would round to bfloat16
            return target.sum(dim=1) if self.weight is None else (target * self.weight).sum(dim=1)
        known = target >= 0
        return known if self.weight is None else self.weight[target.clamp(min=0)] * known


def balanced_class_weights(counts: Tensor) -> Tensor:
    """N / (K n) for a class of n images among N of K classes: the mean weight over all images is 1.

    A class without images (it may have some in val) weighs as one with a single image.

    Example:
        >>> balanced_class_weights(torch.tensor([600, 6]))
        tensor([ 0.5050, 50.5000])
    """
    return (counts.sum() / (len(counts) * counts.clamp(min=1))).float()


class TeacherOutputs(Protocol):
    """What the teacher says of the batches of one split; the images are those that the student sees."""

    def start_epoch(self, epoch: int, step: int = 0) -> None:
        """The batches of epoch number ``epoch``, from 0, come next, the first ``step`` of them left out."""

    def __call__(self, batch: Batch) -> Outputs | None:
        """The teacher's outputs for a batch; None: the Distiller shall ask the teacher itself."""

    def flush(self) -> None:
        """Make what has been said so far last: before a checkpoint, and at the end of an epoch."""


class LiveTeacher:
    """The teacher runs for each batch.

    Args:
        distiller: whose teacher it is.
        views: the split's images for teachers of another size than the student's; None: there are none such, and the
            Distiller asks the teacher itself.
        autocast: in which the teacher runs.
    """

    def __init__(
        self,
        distiller: Distiller,
        views: TeacherViews | None = None,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.distiller, self.views, self.autocast, self.position = distiller, views, autocast, -1

    def start_epoch(self, epoch: int, step: int = 0) -> None:
        """The batches of epoch number ``epoch``, from 0, come next, the first ``step`` of them left out."""
        self.position = step - 1
        if self.views is not None:
            self.views.start_epoch(epoch, step)

    def __call__(self, batch: Batch) -> Outputs | None:
        """The outputs for the next batch; None where the Distiller is to ask."""
        self.position += 1
        if self.views is None:
            return None
        with self.autocast():
            own = self.views.of(self.position, batch)
            index = batch.index if self.distiller.training else None
            return self.distiller.run_teacher(batch.images, batch.second, own, index)

    def flush(self) -> None: ...


class CachedTeacher:
    """The same batches in every epoch, without augmentation: the teacher is asked once and its logits are kept.

    Feature maps are too large to keep, and methods that live on the training images do not ask at all.

    Args:
        distiller: whose teacher it is.
        views: the split's images for teachers of another size than the student's; None: there are none such.
    """

    def __init__(self, distiller: Distiller, views: TeacherViews | None = None) -> None:
        needs = distiller.method.needs
        self.distiller, self.live = distiller, LiveTeacher(distiller, None if needs.training_only else views)
        self.keeps = not (
            distiller.teacher is None or needs.features or distiller.method.teacher_taps or needs.training_only
        )
        self.known: list[Outputs] = []
        self.position = 0

    def start_epoch(self, epoch: int, step: int = 0) -> None:
        """Back to the first batch; of val and test none is ever left out."""
        self.position = 0
        self.live.start_epoch(0)

    def __call__(self, batch: Batch) -> Outputs | None:
        """The outputs for the next batch."""
        if not self.keeps:
            return self.live(batch)
        if self.position == len(self.known):
            answer = self.live(batch) or self.distiller.run_teacher(batch.images)
            assert answer is not None  # there is a teacher
            self.known.append(answer)
        self.position += 1
        return self.known[self.position - 1]

    def flush(self) -> None: ...


class Trainer:
    """One stage's training: ``Training(...).run()`` leaves the student with the weights of its best epoch.

    Args:
        distiller: on the compute's device.
        train, val: loaders; val picks the best epoch.
        folder: receives ``metrics.jsonl`` and ``checkpoints/``.
        test: evaluated each epoch for its curve only, never for a choice; None: left alone.
        answers: by split, where the teacher's answers come from; where not given, it is asked: for each training batch
            anew, on val and test once.
        teacher_views: by split, the images for teachers of another size than the student's, where there are such.
        stopping: is looked at after each step; None: nothing stops it.
    """

    def __init__(
        self,
        distiller: Distiller,
        train: "Loader",
        val: "Loader",
        settings: TrainingSettings,
        compute: Compute,
        *,
        folder: Path,
        observer: Observer,
        classes: int,
        test: "Loader | None" = None,
        answers: Mapping[str, TeacherOutputs] | None = None,
        teacher_views: Mapping[str, TeacherViews] | None = None,
        stopping: SignalHandler | None = None,
    ) -> None:
        self.distiller, self.settings, self.compute, self.observer = distiller, settings, compute, observer
        self.train, self.classes = train, classes
        self.others = {"val": val} | ({"test": test} if test is not None else {})
        self.folder, self.history = folder, History()
        self.plain_epochs = plain_epochs(settings.epochs, settings.qat_fraction)
        steps = -(-train.steps // settings.gradient_accumulation_steps)
        check_distributed_support(distiller.method, settings.optimizer, compute.processes)
        self.sharing = DistributedDistiller(distiller, compute.processes)
        named = distiller.trained_parameters()
        scales = {} if settings.layer_decay is None else layer_lr_scales(distiller.student, settings.layer_decay)
        self.optimizer = create_optimizer(named, settings, {f"student.{name}": scale for name, scale in scales.items()})
        self.head = _head_path(distiller.student, train.spec.size) if settings.freeze else None
        self.gradients = GradientAccumulator(self.optimizer, [parameter for _, parameter in named])
        self.compiling = StudentCompiler(distiller, self.optimizer, settings, compute, observer)
        self.schedule = LambdaLR(self.optimizer, lr_factor(settings, steps))
        self.average = None
        if settings.ema_decay is not None:
            self.average = ModelEma(distiller.student, settings.ema_decay)
        self.saving = Checkpointer(
            folder / "checkpoints",
            settings,
            compute,
            distiller,
            self.optimizer,
            self.schedule,
            self.average,
            self.history,
        )
        views = teacher_views or {}
        self.answers: dict[str, TeacherOutputs] = {
            "train": LiveTeacher(distiller, views.get("train"), compute.autocast),
            **{name: CachedTeacher(distiller, views.get(name)) for name in self.others},
            **(answers or {}),
        }
        self.stopping = stopping or SignalHandler()

    def run(self, *, resume: bool = False) -> History:
        """Train to the last epoch, or until val has not improved for ``early_stopping_patience`` epochs.

        Raises:
            NonFiniteError: a loss term or a weight is NaN or infinite.
            ArtifactError: ``resume`` with a damaged checkpoint.
            Stopped: a signal came; the step was finished, and all that has been done is saved.
        """
        with self.stopping.deferred():
            try:
                history = self._run(resume)
            except BaseException:
                with suppress(StorageError):  # the first error is the one to show
                    self.saving.wait()
                raise
            self.saving.wait()
            return history

    def _run(self, resume: bool) -> History:
        under_way = self._new_epoch_state()
        done = self.saving.resume(under_way) if resume else 0
        if under_way.step == 0:
            under_way = self._new_epoch_state()  # with the learning rate that was loaded
        self._write_records()
        for number in range(done, self.settings.epochs):
            if under_way.step == 0 and self._should_stop_early(number):
                self.observer.note(
                    f"stopped early: val has not improved for {self.settings.early_stopping_patience} epochs"
                )
                break
            try:
                self._epoch(number, under_way)
            except Stopped:
                self._save(number, under_way)
                raise
            asked, due = self._sync_requests()
            last = number + 1 == self.settings.epochs
            if last or due or asked:
                self.saving.save(number + 1, beside=not (last or asked))
            self.stopping.check()
            under_way = self._new_epoch_state()
        if self.history.records[-1]["epoch"] != self.settings.epochs:
            self.saving.save(self.history.records[-1]["epoch"])
        self.distiller.student.load_state_dict(self.saving.best)
        return self.history

    # one epoch

    def _new_epoch_state(self) -> EpochState:
        """Of an epoch: nothing is done."""
        metrics = StreamingMetrics(self.classes, device=self.compute.device)
        return EpochState(metrics, TermAverages(), lr=float(self.optimizer.param_groups[0]["lr"]))

    def _epoch(self, number: int, under_way: EpochState) -> None:
        self.observer.epoch_start(number + 1, self.settings.epochs, self.train.steps, self.train.count)
        if under_way.step == 0:
            self.distiller.start_epoch(number, self.settings.epochs)
        else:  # that has been done, and is part of what was loaded
            self.observer.step(sum(self.train.sizes_of(number)[: under_way.step]))
        if left := self.train.steps - under_way.step:
            after = left + self.train.steps * (self.settings.epochs - number - 1)
            with self.compiling.epoch(left, after), self._int8_context(number), self._frozen_encoder(number):
                self._train_epoch(number, under_way)
        figures = self._figures(under_way, f"epoch {number + 1}, training", self.train, number)
        trained = under_way.seconds
        with _EvaluationWeights(self.distiller, self.average):
            splits = {name: self._evaluate(number, name, loader) for name, loader in self.others.items()}
            value = selection_value(self.settings.selection_metric, splits["val"])
            # Weights that have not met int8's rounding are no candidates, however good they are without it.
            best = value > self.history.best_value or number == self.plain_epochs
            if best:
                self.history.best_epoch, self.history.best_value = number + 1, value
                self.saving.keep_best()
        seconds = under_way.seconds
        record = {
            "epoch": number + 1,
            "seconds": round(seconds, 3),
            "lr": under_way.lr,
            "images_per_second": round(self.train.count / trained, 1),
            "best": best,
            "train": figures,
            **splits,
        }
        self.history.seconds += seconds
        self.history.records.append(record)
        self._write_records()
        self.observer.epoch_end(record)

    def _train_epoch(self, number: int, under_way: EpochState) -> None:
        self.distiller.train()
        if number < self.settings.freeze:
            self.distiller.student.eval()  # BatchNorm statistics belong to the encoder; dropout rests with it
        group, answers, begin = self.settings.gradient_accumulation_steps, self.answers["train"], under_way.step
        sizes = self.train.sizes_of(number)
        answers.start_epoch(number, begin)
        for position, batch in enumerate(self.train.epoch(number, begin), start=begin):
            if position == begin:
                self.compiling.begin(batch.images)
            first = position - position % group
            complete = (position + 1) % group == 0 or position + 1 == self.train.steps
            with self.compute.processes.stepping():
                with self.sharing.step(complete):
                    step = self._ask(batch, answers, self.sharing.call, self.compute.autocast())
                    self.compute.processes.mark()
                    share = self.sharing.loss_weight(len(batch), sizes[position])
                    self.gradients.add(step, min(group, self.train.steps - first), share)
                if complete:
                    self._update()
                under_way.metrics.update(step.logits.detach(), batch.labels)
                under_way.averages.update(step.terms, len(batch), position + 1)
            self.observer.step(sizes[position])
            if complete:
                under_way.step = position + 1
                _, due = self._sync_requests()
                self.stopping.check()
                if due and self.settings.checkpoint_seconds != 0:
                    self._save(number, under_way, beside=True)
        answers.flush()

    def _int8_context(self, number: int) -> AbstractContextManager[None]:
        return nullcontext() if number < self.plain_epochs else simulated_int8(self.distiller.student)

    @contextmanager
    def _frozen_encoder(self, number: int) -> Iterator[None]:
        """In the first ``freeze`` epochs the student's head alone gets gradients."""
        frozen = []
        if number < self.settings.freeze and self.head is not None:
            frozen = [
                parameter
                for name, parameter in self.distiller.student.named_parameters()
                if parameter.requires_grad and not name.startswith(f"{self.head}.")
            ]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)

    def _sync_requests(self) -> tuple[bool, bool]:
        """Whether any process was asked to stop, and whether a checkpoint is due in any: the same for all."""
        asked, due = self.compute.processes.highest(self.stopping.requested or 0, int(self.saving.is_due))
        self.stopping.requested = asked or None
        return asked > 0, due > 0

    def _write_records(self) -> None:
        if self.compute.processes.first:
            self.history.lines = write_json_lines(self.folder / "metrics.jsonl", self.history.records)

    def _save(self, number: int, under_way: EpochState, *, beside: bool = False) -> None:
        """In the midst of an epoch."""
        metrics, averages = self.sharing.figures(under_way.metrics, under_way.averages)
        # A loss that is not finite leaves no checkpoint.
        averages.compute(f"epoch {number + 1}, training", partial(self.train.names_at, number))
        self.answers["train"].flush()
        self.saving.save(number, replace(under_way, metrics=metrics, averages=averages), beside=beside)

    def _ask(
        self, batch: Batch, answers: TeacherOutputs, distiller: nn.Module, precision: AbstractContextManager[object]
    ) -> Step:
        batch = replace(batch, images=self._laid_out(batch.images))
        if batch.second is not None:
            batch = replace(batch, second=self._laid_out(batch.second))
        known = answers(batch)
        with precision:
            step: Step = distiller(
                batch.images,
                batch.labels,
                index=batch.index,
                view=batch.view,
                second=batch.second,
                soft_labels=batch.soft_labels,
                teacher=known,
            )
        return step

    def _laid_out(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=self.compute.memory_format)

    def _update(self) -> None:
        if self.settings.max_grad_norm is not None:
            self.gradients.clip(self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self.sharing.settle()
        if self.average is not None:
            self.average.update_parameters(self.distiller.student)

    @torch.no_grad()
    def _evaluate(self, epoch: int, split: str, loader: "Loader") -> EpochRecord:
        """In float32, as the final figures are: what picks an epoch is what is reported of it."""
        self.distiller.eval()
        metrics, averages = StreamingMetrics(self.classes, device=self.compute.device), TermAverages()
        answers = self.answers[split]
        answers.start_epoch(0)
        for position, batch in enumerate(loader.epoch(0)):
            number, common = self.sharing.place(loader, position)
            if common:
                self._sync_requests()
                self.stopping.check()
            with self.compute.processes.stepping():
                step = self._ask(batch, answers, self.distiller, nullcontext())
                metrics.update(step.logits, batch.labels)
                averages.update(step.terms, len(batch), number)
        answers.flush()
        return self._figures(EpochState(metrics, averages, lr=0.0), f"epoch {epoch + 1}, {split}", loader, 0)

    def _figures(self, found: EpochState, where: str, loader: "Loader", epoch: int) -> EpochRecord:
        metrics, averages = self.sharing.figures(found.metrics, found.averages)
        terms = averages.compute(where, partial(loader.names_at, epoch))
        return {**metrics.compute(), "loss": sum(terms.values()), "terms": terms}

    def _should_stop_early(self, number: int) -> bool:
        patience = self.settings.early_stopping_patience
        return patience is not None and number > 0 and number - self.history.best_epoch >= patience


def _head_path(network: nn.Module, size: int) -> str:
    device = next(network.parameters()).device
    example = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    head = find_stages(network, example).head
    if head is None:
        raise UsageError(
            f"training.freeze trains the linear layer that puts out the logits alone, and {type(network).__name__} "
            "ends in none: leave it out"
        )
    return head


class _EvaluationWeights:
    """Within the block, the student has its averaged weights, where there are such."""

    def __init__(self, distiller: Distiller, average: ModelEma | None) -> None:
        self.student, self.average = distiller.student, average

    def __enter__(self) -> None:
        if self.average is not None:
            self.trained = ckpt.copy_state_dict(self.student)
            self.student.load_state_dict(self.average.module.state_dict())

    def __exit__(self, *_: object) -> None:
        if self.average is not None:
            self.student.load_state_dict(self.trained)


def selection_value(metric: str, figures: EpochRecord) -> float:
    """The picking metric as a number of which more is better; undefined (AUC of one class) counts as worst."""
    value = figures[metric]
    if value is None:
        return -1e300
    return -value if metric == "nll" else float(value)
