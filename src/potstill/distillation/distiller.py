"""The Distiller: one student, frozen teachers if the method needs any, and the method that computes the loss terms."""

import copy
import json
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from potstill.distillation.output_router import (
    LayerPaths,
    OutputRouter,
    attach_second_outputs,
    build_output_router,
    network_info,
)
from potstill.distillation.teachers import CombineMode, TeacherImages, Teachers, TeacherViews
from potstill.errors import UsageError
from potstill.input_spec import InputSpec
from potstill.methods.base import Method, NetworkInfo, Scaling, TrainingInfo
from potstill.methods.wrappers import wrap_per_teacher
from potstill.types import UNLABELED, Batch, InputConverter, Outputs, Step, are_probabilities, widest_float

# At the start of an epoch; each costs a backward pass for each term on hidden layers, and one more.
MEASURED_STEPS = 4
STEPS_BETWEEN = 40  # at least, from one measurement to the next: epochs of a few steps are not all measured
LOGIT_BOUND = 2.0  # of a term's gradient with respect to the logits, relative to that of the labels


class Distiller(nn.Module):
    """Student, frozen teacher and method as one module, for any training loop.

    Teachers are frozen: always in eval mode, without gradients, and not part of the state dict.  The attribute
    ``student`` is the module that was passed in (for the few methods that deploy another network, one that contains
    it); use it alone after training.

    Args:
        student: maps images [B, 3, H, W] to logits [B, K]; it is trained.
        teacher: one or several modules like the student; None for methods without a teacher.  ``requires_grad`` of
            their parameters is set to False.
        method: a method of ``potstill``, or a subclass of ``Method``.
        example: two or more training images [B, 3, H, W]; required by methods with adapters, whose sizes follow from
            it.
        student_input: how ``images`` are preprocessed.
        teacher_input: how each teacher's images must be preprocessed; images are renormalised and resized accordingly.
            A teacher of a larger size than the student's gets the student's pixels enlarged, and a warning, once,
            unless its outputs are passed: ``teacher=distiller.run_teacher(images, teacher_images=...)``.
        label_loss: replaces cross-entropy in the label term (for label smoothing or class weights).
        feature_pairs: pairs of paths (student's, teacher's), shallow to deep, in place of the stages that are found
            automatically.
        train_labels: [N], int64, labels by sample id; required by methods with a memory of the training set.
        batch_size: batch size of the training; required by methods whose layers depend on it.
        teacher_weights: one for each teacher; None: equal.
        combine: whether the "logits" or the "probabilities" of several teachers are averaged.
        scaling: "paper" leaves the method's weights as they are; "auto" bounds the teacher's terms by those of the
            labels, see ``TermScaling``; None: the method's own, which is "paper" unless ``create_method`` got
            another.

    Raises:
        UsageError: something that the method needs is missing, or it does not support these networks.

    Example:
        >>> from potstill.methods.kd import KD
        >>> student, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(12, 3)) for _ in range(2))
        >>> distiller = Distiller(student, teacher, KD(temperature=2.0, alpha=0.5))
        >>> step = distiller(torch.zeros(4, 3, 2, 2), torch.tensor([0, 1, 2, 0]))
        >>> sorted(step.terms), step.loss.shape
        (['ce', 'kd'], torch.Size([]))
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Sequence[nn.Module] | None,
        method: Method,
        *,
        example: Tensor | None = None,
        student_input: InputSpec | None = None,
        teacher_input: InputSpec | Sequence[InputSpec] | None = None,
        label_loss: nn.Module | None = None,
        feature_pairs: LayerPaths | None = None,
        train_labels: Tensor | None = None,
        batch_size: int | None = None,
        teacher_weights: Sequence[float] | None = None,
        combine: CombineMode = "logits",
        scaling: Scaling | None = None,
    ) -> None:
        super().__init__()
        self._enlarged = ""
        self._looked_for_softmax = False
        networks = _as_list(teacher, nn.Module) if method.needs.teacher else []
        if method.needs.teacher and not networks:
            raise UsageError(f"{method.label} needs a teacher, got None")
        self.student = student
        self.teacher: Teachers | None = None
        if networks:
            input_converters = _input_converters(student_input, _as_list(teacher_input, InputSpec), len(networks))
            self.teacher = Teachers(networks, input_converters, weights=teacher_weights, combine=combine)
            self._enlarged = _enlarged_sizes(student_input, _as_list(teacher_input, InputSpec))
        self.method = wrap_per_teacher(method, self.teacher.shares if self.teacher is not None else ())
        if label_loss is not None:
            self.method.use_label_loss(label_loss)
        self.feature_pairs, self.train_labels, self.batch_size = feature_pairs, train_labels, batch_size
        self.router = OutputRouter(self.method, max(1, len(networks)))
        self.scaling = TermScaling() if (scaling or method.scaling) == "auto" else None
        self._ready = not self.method.needs.prepare
        if example is not None or self.method.needs.example or self.method.student_taps or self.method.teacher_taps:
            self._build(example)
        self.train()
        self.register_state_dict_post_hook(_drop_teacher_state)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_ignore_missing_teacher_keys)  # type: ignore[no-untyped-call]

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        index: Tensor | None = None,
        view: Tensor | None = None,
        second: Tensor | None = None,
        soft_labels: Tensor | None = None,
        teacher: Outputs | None = None,
    ) -> Step:
        """Return logits and loss terms of a batch.

        In eval mode, methods that depend on training images (memories, second views) return only their label terms;
        so do methods that compare images with each other, for a batch of one image.

        Args:
            images: [B, 3, H, W], preprocessed for the student.
            labels: [B], int64.
            index: [B], int64 sample ids, for methods with a memory.
            view: [B], int64 view numbers.
            second: [B, 3, H, W], for methods that need a second image for each.
            soft_labels: [B, K], of mixed images.
            teacher: the teacher's outputs for these images if they are known (cached); None: the teacher is run.

        Raises:
            UsageError: logits or labels of a wrong shape; student and teacher with different numbers of classes;
                an argument that the method needs is missing.
        """
        batch = Batch(images, labels, index, view, second, soft_labels)
        names = self.method.label_term_names
        needs = self.method.needs
        if not self.training and (needs.training_only or (needs.several and len(labels) < 2)):
            output = self.router.extractor.run(self.student, images)
            _check_shapes(output.logits, None, labels)
            return Step(output.logits, self.method.plain_label_terms(output.outputs(), batch), names)
        self._check_inputs(batch)
        student = self._run_student(images, second)
        if teacher is None:
            if self._enlarged and torch.is_grad_enabled():  # a training step, and no try
                warnings.warn(self._enlarged, UserWarning, stacklevel=2)
                self._enlarged = ""
            teacher = self.run_teacher(images, second, index=index if self.training else None)
        _check_shapes(student.logits, teacher, labels)
        if not self._looked_for_softmax and torch.is_grad_enabled() and images.device.type in ("cpu", "cuda"):
            self._looked_for_softmax = True  # once: to look makes a GPU wait
            for name, outputs in (("student", student), ("teacher", teacher)):
                if outputs is not None and are_probabilities(outputs.logits):
                    warnings.warn(
                        f"the {name} returns probabilities (the outputs of each image sum to 1), and all losses want "
                        "logits: leave out the softmax at its end, or take the logarithm",
                        stacklevel=2,
                    )
        terms = self.method(student, teacher, batch)
        if self.scaling is not None:
            terms = self.scaling(terms, names, student.logits, batch, list(self.student.parameters()))
        return Step(student.logits, terms, names)

    @torch.no_grad()
    def run_teacher(
        self,
        images: Tensor,
        second: Tensor | None = None,
        teacher_images: TeacherImages | None = None,
        index: Tensor | None = None,
    ) -> Outputs | None:
        """Return the teacher's outputs; None for methods without a teacher.

        ``teacher_images``: the same images for teachers of another size, cropped from the original pixels; None: such
        teachers get ``images`` resized.  ``index``: [B] int64 sample ids of training images; see ``Teachers.run``.
        """
        if self.teacher is None:
            return None
        prepared, second_prepared = teacher_images or ((), ())
        outputs = self.teacher.run(images, prepared, index)
        if second is None or self.method.needs.second == "none":
            return self.router.teacher_outputs(self.teacher, outputs)
        # Another image of the same class has another id, which is not known here.
        second_index = index if self.method.needs.second == "strong" else None
        others = self.teacher.run(second, second_prepared, second_index)
        return self.router.teacher_outputs(self.teacher, outputs, others)

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Call before each epoch: number ``epoch``, counted from 0, of ``epochs``; for methods that depend on it."""
        self.method.start_epoch(epoch, epochs)
        if self.scaling is not None:
            self.scaling.start_epoch()

    def prepare(self, batches: Callable[[], Iterator[Batch]], views: TeacherViews | None = None) -> None:
        """Run the method's passes over the training images, one for each call of ``batches``, before training."""

        def passes() -> Iterator[tuple[Outputs, Batch]]:
            if views is not None:
                views.start_epoch(0)
            for position, batch in enumerate(batches()):
                own = None if views is None else views.of(position, batch)
                outputs = self.run_teacher(batch.images, teacher_images=own, index=batch.index)
                assert outputs is not None
                yield outputs, batch

        if self.method.needs.prepare:
            self.method.prepare(passes)
        self._ready = True

    def trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return names and parameters for the optimizer: those of the student and of the method's adapters."""
        return [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]

    @property
    def table(self) -> str:
        """Which layers of student and teacher are paired, as text; empty for methods that read no hidden layers."""
        return self.router.table

    def _check_inputs(self, batch: Batch) -> None:
        needs, name = self.method.needs, self.method.label
        if not self._ready:
            raise UsageError(
                f"{name} has a pass over the training images first: call distiller.prepare(batches) before training"
            )
        if needs.index and batch.index is None:
            raise UsageError(
                f"{name} has a memory of the training samples: pass index=, [B] positions in the training set"
            )
        if needs.second != "none" and batch.second is None:
            what = "another view of each image" if needs.second == "strong" else "for each image one of the same class"
            raise UsageError(f"{name} needs second=, {what}")
        if needs.several and len(batch) < 2:
            raise UsageError(
                f"{name} compares images with each other, and this batch has {len(batch)}: leave out a last batch of "
                "one image (drop_last=True of a DataLoader)"
            )
        if needs.labels and batch.labels.device.type == "cpu" and bool((batch.labels == UNLABELED).any()):
            raise UsageError(f"{name} needs the label of every image; with unlabeled images use kd or dist")

    # building

    @torch.no_grad()
    def _build(self, example: Tensor | None) -> None:
        if example is None:
            raise UsageError(f"{self.method.label} sizes its adapters from an example: pass example=images")
        _require_taps(self.method, self.student)
        self.eval()  # so that the example does not update BatchNorm statistics
        self.router = build_output_router(self.method, self.student, self.teacher, example, self.feature_pairs)
        infos = self._network_infos(example)
        if infos[1] is not None:
            _check_classes(infos[0].outputs.logits, infos[1].outputs.logits)
        modified = self.method.modify_student(self.student, *infos)
        if modified is not self.student:
            self.student = modified.to(example.device).eval()
            _freeze_unused_parameters(self.student, example)
            within = [(f"network.{ours}", theirs) for ours, theirs in self.feature_pairs or ()]
            self.router = build_output_router(self.method, self.student, self.teacher, example, within)
            infos = self._network_infos(example)
        if self.method.needs.index and self.train_labels is None:
            raise UsageError(f"{self.method.label} has a memory of the training set: pass train_labels=, [N] int64")
        training = TrainingInfo(infos[0].outputs.logits.shape[1], self.train_labels, self.batch_size)
        self.method.build(*infos, training)
        self.method.to(example.device)

    def _network_infos(self, example: Tensor) -> tuple[NetworkInfo, NetworkInfo | None]:
        untrained_copy = (lambda: _untrained_copy(self.student)) if self.method.needs.peers else None
        student, teacher = self._run_student(example, None), self.run_teacher(example)
        feature_pairs = self.router.feature_pairs
        stages = [[pair.student for pair in pairs] for pairs in feature_pairs]
        student_info = network_info(student, stages, untrained_copy=untrained_copy)
        if teacher is None or self.teacher is None:
            return student_info, None
        stages = [[pair.teacher for pair in pairs] for pairs in feature_pairs]
        return student_info, network_info(teacher, stages, self.router.batch_norms(self.teacher))

    def _run_student(self, images: Tensor, second: Tensor | None) -> Outputs:
        outputs = self.router.student_outputs(self.router.extractor.run(self.student, images))
        if second is None or self.method.needs.second == "none":
            return outputs
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.method.needs.second_gradient):
            return attach_second_outputs(
                outputs, self.router.student_outputs(self.router.extractor.run(self.student, second))
            )


def _untrained_copy(network: nn.Module) -> nn.Module:
    """Return a copy whose layers have called ``reset_parameters``, if they have it."""
    copied = copy.deepcopy(network)
    for module in copied.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    return copied.requires_grad_(True)


@torch.enable_grad()
def _freeze_unused_parameters(network: nn.Module, example: Tensor) -> None:
    """Freeze layers that a modified student no longer uses: they get no gradient."""
    network(example).sum().backward()
    for parameter in network.parameters():
        if parameter.grad is None:
            parameter.requires_grad_(False)
        parameter.grad = None


def _require_taps(method: Method, student: nn.Module) -> None:
    paths = {path for path, _ in student.named_modules()}
    missing = [path for path in method.student_taps if path not in paths]
    if missing:
        raise UsageError(
            f"{method.label} reads the student's layers {' and '.join(method.student_taps)}, and "
            f"{type(student).__name__} has no {' and no '.join(missing)}; kd works with any student"
        )


def _as_list(value: Any, kind: type) -> list[Any]:
    return [] if value is None else [value] if isinstance(value, kind) else list(value)


def _input_converters(student: InputSpec | None, teachers: list[InputSpec], count: int) -> list[nn.Module]:
    if (student is None) != (not teachers):
        raise UsageError("give both student_input and teacher_input, or neither if both networks need the same")
    if student is None:
        return [nn.Identity() for _ in range(count)]
    if len(teachers) != count:
        raise UsageError(f"give one teacher_input for each of the {count} teachers, got {len(teachers)}")
    return [InputConverter(student, teacher) for teacher in teachers]


def _enlarged_sizes(student: InputSpec | None, teachers: list[InputSpec]) -> str:
    """Return a warning if a teacher gets the student's pixels enlarged; empty if none does."""
    larger = [str(each.size) for each in teachers if student is not None and each.size > student.size]
    if student is None or not larger:
        return ""
    return (
        f"the teacher of {' and '.join(larger)} px gets the student's images of {student.size} px, enlarged, and is "
        "usually worse on them than on the original pixels: pass its outputs for images of its own size, "
        "teacher=distiller.run_teacher(images, teacher_images=TeacherImages((larger,), (None,))), or use potstill.run"
    )


def _check_shapes(logits: Tensor, teacher: Outputs | None, labels: Tensor) -> None:
    if labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise UsageError(f"labels must be int64 [{len(logits)}], got {labels.dtype} {list(labels.shape)}")
    if teacher is not None:
        _check_classes(logits, teacher.logits)


def _check_classes(student: Tensor, teacher: Tensor) -> None:
    if teacher.shape != student.shape:
        raise UsageError(
            f"teacher and student have different outputs: logits {list(teacher.shape)} and {list(student.shape)}; "
            "both must have the same classes in the same order"
        )


def _drop_teacher_state(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}teacher.")]:
        del state[key]


def _ignore_missing_teacher_keys(module: nn.Module, incompatible: Any) -> None:
    if isinstance(module, Distiller) and module.teacher is not None:
        expected = tuple(f".teacher.{key}" for key in module.teacher.state_dict())
        # The Distiller may sit inside another module, whose prefix the keys then carry.
        incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not f".{key}".endswith(expected)]


class TermScaling(nn.Module):
    r"""Multiply each term of the teacher by at most 1, such that its gradient is not much longer than the labels'.

    The weights of papers belong to long trainings of certain networks: attention transfer's 1000, in 8 epochs, moves
    the student's weights many times as far as the labels do, and so do DKD's 8 and the square of its temperature.  How
    far a term moves them is the norm of its gradient; its value does not show it (a constant changes the value and no
    step).

    A term is one on hidden layers if it does not depend on the student's logits z.  In each of the first
    ``MEASURED_STEPS`` training steps of an epoch, but not sooner than ``STEPS_BETWEEN`` steps after the last time, two
    norms g and r are measured for each term but the label terms:

    - on logits: g of the term's gradient with respect to z, and r of ``LOGIT_BOUND`` times that of the cross-entropy
      with the labels, both for the images that have a label; without any the factor is 1;
    - on hidden layers: g of the gradient with respect to the student's parameters, and r of that of all terms on
      logits, with their factors, with respect to the same parameters, those that the term reaches.

    The factor is

    .. math:: \min(1, \sum r / \sum g)

    with sums over these steps and all processes, from the first of them on; it stays until the next measurement.  So
    warm-ups and schedules count, and a term fades as the labels are learnt.  Without terms on logits (a method that
    trains hidden layers alone, or does so first) and for a term without gradient the factor is 1.

    The state is in the state dict: a training that is resumed goes on with the same factors.  Sums and factors stay on
    the device, so that no step waits for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0  # since the measurement began
        self._sums: dict[str, Tensor] = {}  # by term: the sums of g and of r, [2]
        self._factors: dict[str, Tensor] = {}

    @property
    def factors(self) -> dict[str, float]:
        """The factors of the last step, by name of the term; waits for the device."""
        return {name: float(factor) for name, factor in self._factors.items()}

    def start_epoch(self) -> None:
        """Measure anew if the last time is long enough ago; the factors stay until then."""
        if self.steps >= STEPS_BETWEEN:
            self.steps, self._sums = 0, {}

    def forward(
        self,
        terms: Mapping[str, Tensor],
        label_terms: Collection[str],
        logits: Tensor,
        batch: Batch,
        parameters: Sequence[nn.Parameter],
    ) -> dict[str, Tensor]:
        """Return the terms multiplied with their factors.

        ``label_terms`` are the names of those from labels alone; all were computed of ``logits``, [B, K].
        """
        if self.training and torch.is_grad_enabled():
            self.steps += 1
            if self.steps <= MEASURED_STEPS:
                self._measure(terms, label_terms, logits, batch, [each for each in parameters if each.requires_grad])
        return self._scaled(terms)

    def _scaled(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: term * self._factors[name].to(term.dtype) if name in self._factors else term
            for name, term in terms.items()
        }

    def _measure(
        self,
        terms: Mapping[str, Tensor],
        label_terms: Collection[str],
        logits: Tensor,
        batch: Batch,
        parameters: list[nn.Parameter],
    ) -> None:
        self._factors = {}
        trained = {name: term for name, term in terms.items() if term.requires_grad}
        by_logits = {name: _gradients(term, [logits])[0] for name, term in trained.items()}
        on_logits = {name: gradient for name, gradient in by_logits.items() if gradient is not None}
        known = (batch.labels != UNLABELED).unsqueeze(1)
        limit = LOGIT_BOUND * _norm([_label_gradient(logits, batch.targets, known)])
        self._bound(
            {
                name: torch.stack([_norm([gradient * known]), limit])
                for name, gradient in on_logits.items()
                if name not in label_terms
            }
        )
        hidden = [name for name in trained if name not in on_logits]
        if not (on_logits and hidden and parameters):
            return
        scaled = self._scaled({name: trained[name].float() for name in on_logits})
        reference = _gradients(torch.stack(list(scaled.values())).sum(), parameters)
        found = {}
        for name in hidden:
            own = _gradients(trained[name], parameters)
            common = [theirs for theirs, ours in zip(reference, own, strict=True) if ours is not None]
            found[name] = torch.stack([_norm(own), _norm(common)]).to(logits.device, non_blocking=logits.is_cuda)
        self._bound(found)

    def _bound(self, norms: Mapping[str, Tensor]) -> None:
        """Add to the sums of these terms, and set their factors."""
        if not norms:
            return
        measured = torch.stack(list(norms.values()))
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(measured)
        for name, row in zip(norms, measured.to(widest_float(measured.device)), strict=True):
            self._sums[name] = row + self._sums[name].to(row) if name in self._sums else row
            size, limit = self._sums[name].unbind()
            # 1 also where a sum is infinite or NaN: the loss itself is what is refused then.
            self._factors[name] = torch.where(limit < size, limit / size, 1.0)

    def get_extra_state(self) -> Tensor:
        """Return the state as the bytes of a JSON text, since checkpoints hold tensors."""
        sums = {name: norms.tolist() for name, norms in self._sums.items()}
        text = json.dumps([self.steps, sums, self.factors])
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Load what ``get_extra_state`` returned."""
        self.steps, sums, factors = json.loads(bytes(state.tolist()))
        self._sums = {name: torch.tensor(norms, dtype=torch.float64) for name, norms in sums.items()}
        self._factors = {name: torch.tensor(factor, dtype=torch.float64) for name, factor in factors.items()}


def _label_gradient(logits: Tensor, targets: Tensor, known: Tensor) -> Tensor:
    """Return the gradient, [B, K], of the mean cross-entropy of the images that are ``known``, [B, 1] bool."""
    probabilities = logits.detach().float().softmax(dim=1)
    if targets.ndim == 1:  # no one_hot: it looks at the labels, for which a GPU is waited
        wanted = torch.zeros_like(probabilities).scatter_(1, targets.clamp(min=0).unsqueeze(1), 1.0)
    else:
        wanted = targets.to(probabilities)
    return (probabilities - wanted) * known / known.sum().clamp(min=1)


def _gradients(value: Tensor, of: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(value, list(of), retain_graph=True, allow_unused=True)


def _norm(gradients: Sequence[Tensor | None]) -> Tensor:
    norms = [torch.linalg.vector_norm(each.float()) for each in gradients if each is not None]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
