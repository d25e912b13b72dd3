"""The one interface that every distillation method has."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, dataclass_transform

from torch import Tensor, nn

from potstill.errors import UsageError
from potstill.features.stages import Stage
from potstill.methods.requirements import Requirements
from potstill.options import REQUIRED, Option, json_schema, option, option_problems
from potstill.types import Batch, Outputs

Scaling = Literal["auto", "paper"]
TeacherPasses = Callable[[], Iterator[tuple[Outputs, Batch]]]


@dataclass(frozen=True)
class NetworkInfo:
    """Facts of the student or the teacher for the construction of a method."""

    outputs: Outputs  # of an example batch: adapters are sized by it
    norms: tuple[nn.BatchNorm2d | None, ...] = ()  # in front of each map; None where there is none
    stages: tuple[Stage, ...] = ()  # where each map is read
    untrained_copy: Callable[[], nn.Module] | None = None  # returns one of the network; only if needs.peers
    members: "tuple[NetworkInfo, ...]" = ()  # one for each teacher
    parts: "tuple[NetworkInfo, ...]" = ()  # where methods are combined: one for each of them


@dataclass(frozen=True)
class TrainingInfo:
    """Facts of the training to come."""

    classes: int
    labels: Tensor | None = None  # [N], int64, of the training set by sample id
    batch_size: int | None = None


@dataclass_transform(kw_only_default=True, field_specifiers=(option,))
class Method(nn.Module):
    """What the student imitates, and how much each part counts.

    A class with a ``name`` of its own is a method that recipes know by that name.  Its options are declared as in a
    dataclass, ``weight: NonNegative = option(default=1.0, doc="weight of ...")``; they are its keywords and its
    attributes, and ``__post_init__`` does what else is to be done with them.  The docstring is the whole loss in words;
    that of the module begins with a summary and the paper.

    A method sees Outputs and Batch only: no model that it does not own, no optimizer, device or recipe.  What it needs
    beyond logits it declares in ``needs``.

    Args:
        options: by name.

    Raises:
        UsageError: an unknown or a missing option, or a value that is not allowed; names all of them.
    """

    name: ClassVar[str] = ""
    OPTIONS: ClassVar[dict[str, Option]] = {}  # made of what the class declares
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}  # the authors' options for one pair of networks, by its name

    __signature__: ClassVar[inspect.Signature | None] = None

    needs: Requirements = Requirements()
    student_taps: tuple[str, ...] = ()  # submodules whose outputs are read into ``Outputs.features``, by path
    teacher_taps: tuple[str, ...] = ()

    scaling: Scaling = "paper"  # whether the Distiller bounds the teacher's terms; set by ``create_method``
    label_loss: nn.Module
    epoch: int | None = None  # from 0; None: ``start_epoch`` was not called yet
    epochs: int | None = None
    _unchecked = True  # no training step so far

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        found = {key: value for key, value in vars(cls).items() if isinstance(value, Option)}
        types = inspect.get_annotations(cls, eval_str=True) if found else {}
        for key, value in found.items():
            if key not in types:
                raise TypeError(f"{cls.__qualname__}.{key}: an option is declared with its type, as in {key}: float")
            found[key] = replace(value, schema=json_schema(types[key]))
            if value.default is REQUIRED:
                delattr(cls, key)
            else:
                setattr(cls, key, value.default)
        cls.OPTIONS = {**cls.OPTIONS, **found}
        if "__init__" not in vars(cls):  # what help() and notebooks show
            named = [
                inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=each.default)
                for key, each in cls.OPTIONS.items()
            ]
            cls.__signature__ = inspect.Signature(named)
            lines = [f"    {key}: {each.doc}" for key, each in cls.OPTIONS.items()]
            args = ["", "Args:", *lines] if lines else []
            cls.__doc__ = "\n".join([inspect.cleandoc(vars(cls).get("__doc__") or ""), *args])

    def __init__(self, **options: Any) -> None:
        super().__init__()
        if problems := option_problems(self.OPTIONS, options):
            raise UsageError("\n".join(f"{self.name or type(self).__name__}: {text}" for _, text in problems))
        self._given = frozenset(options)
        for key, each in self.OPTIONS.items():
            setattr(self, key, options.get(key, each.default))
        # The Distiller replaces it where labels are smoothed or classes weighted.
        self.label_loss = nn.CrossEntropyLoss()
        self.__post_init__()

    def __post_init__(self) -> None:
        """Prepare what depends on the options; they are attributes by now."""

    @property
    def label(self) -> str:
        """Name in recipes and messages; of a method of one's own without one, that of its class."""
        return self.name or type(self).__name__

    @property
    def label_weight(self) -> float:
        """Weight of the label term: the option ``ce_weight``; 1 where there is none."""
        return float(getattr(self, "ce_weight", 1.0))

    @property
    def label_term_names(self) -> frozenset[str]:
        """Which terms come from labels alone."""
        return frozenset({"ce"})

    @property
    def soft_temperature(self) -> float | None:
        """T, if the teacher's logits are read through ``softmax(z / T)`` alone; None: in other ways too."""
        return None

    @property
    def parts(self) -> "tuple[Method, ...]":
        """The methods that read the networks on their own account; more than one where methods are combined."""
        return (self,)

    @property
    def staged(self) -> bool:
        """Whether the terms themselves, and not only their weights, change with the epochs."""
        return False

    def in_epochs(self, option: str, epochs: int | None = None) -> float:
        """Return an option of type ``Epochs`` as a number of epochs.

        A share is one of the training.  A default that is a number of epochs of the authors' training
        (``of_epochs``) is the same share of a training that is shorter; a number that was given stays as it is.

        Args:
            option: its name; its value is not None.
            epochs: length of the training; None: that of the training under way.

        Raises:
            UsageError: the length counts, and ``start_epoch`` was not called.

        Example:
            >>> from potstill.methods.dkd import DKD
            >>> [DKD(**given).in_epochs("warmup_epochs", 24) for given in ({}, {"warmup_epochs": 20})]
            [2.0, 20.0]
            >>> DKD(warmup_epochs="25%").in_epochs("warmup_epochs", 24), DKD().in_epochs("warmup_epochs", 300)
            (6.0, 20.0)
        """
        value, of_epochs = getattr(self, option), self.OPTIONS[option].of_epochs
        if not isinstance(value, str) and (value == 0 or of_epochs is None or option in self._given):
            return float(value)
        if epochs is None:
            _ = self.progress  # refuses to go on without epochs
            epochs = self.epochs or 1
        if isinstance(value, str):
            return float(value.removesuffix("%")) / 100 * epochs
        return float(value) * min(1.0, epochs / (of_epochs or epochs))

    def adapted_epochs(self, epochs: int) -> dict[str, float]:
        """Return the options in epochs, here and inside, whose value follows from the length of the training.

        Example:
            >>> from potstill.methods.dkd import DKD
            >>> DKD().adapted_epochs(24), DKD().adapted_epochs(240)
            ({'dkd.warmup_epochs': 2.0}, {})
        """
        found = {}
        for method in (each for each in self.modules() if isinstance(each, Method)):
            for key, declared in method.OPTIONS.items():
                value = getattr(method, key)
                share = isinstance(value, str) and value.endswith("%")
                if share or (declared.of_epochs and method.in_epochs(key, epochs) != value):
                    found[f"{method.label}.{key}"] = method.in_epochs(key, epochs)
        return found

    def warmup_length(self, epochs: int) -> float:
        """Return after how many epochs of a training every term has its full weight; 0: from the first on."""
        return self.in_epochs("warmup_epochs", epochs) if "warmup_epochs" in self.OPTIONS else 0.0

    def for_teachers(self, shares: Sequence[float]) -> "Method":
        """Return the method for several teachers, by their shares; ``wrap_per_teacher`` calls it first."""
        return self

    def use_label_loss(self, loss: nn.Module) -> None:
        """Replace plain cross-entropy, here and in every method inside this one."""
        for module in list(self.modules()):
            if isinstance(module, Method):
                module.label_loss = loss

    def build(self, student: NetworkInfo, teacher: Any, training: TrainingInfo) -> None:
        """Create adapters and memories, sized by an example's outputs (``teacher`` is a NetworkInfo, or None if none is
        needed); UsageError, with the reason and a method that can, if these networks cannot be joined.
        """

    def modify_student(self, student: nn.Module, student_side: NetworkInfo, teacher_side: Any) -> nn.Module:
        """The network that is trained and deployed in the student's place: the student itself, but for few methods."""
        return student

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Training is about to begin its epoch number ``epoch``, counted from 0, of ``epochs``."""
        self.epoch, self.epochs = epoch, epochs

    def prepare(self, passes: TeacherPasses) -> None:
        """Learn from the teacher's outputs alone, before training; each call of ``passes`` is one pass."""

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        """Weighted terms by name, each a scalar; training minimises their sum.

        No method overrides it: ``label_terms`` and ``distill`` are all that a method around another calls.
        """
        terms = self.label_terms(student, batch) | self.distill(student, teacher, batch)
        if self.training and self._unchecked:
            self._unchecked = False
            if not self.staged:
                self.refuse_idle_schedules()
        return terms

    def refuse_idle_schedules(self) -> None:
        """Raise UsageError for a scheduled factor, at any depth, that has not been applied to a term."""
        for module in self.modules():
            if isinstance(module, Method) and (problem := module.idle_schedule()):
                raise UsageError(problem)

    def idle_schedule(self) -> str:
        """What is wrong with this method's own schedule, judged by the terms so far; empty where nothing is."""
        return ""

    def label_terms(self, student: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the label term; nothing where its weight is 0."""
        if self.label_weight == 0:
            return {}
        return {"ce": self.label_weight * self.label_loss(student.logits, batch.targets)}

    def plain_label_terms(self, student: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy alone, for images that are not those of training."""
        return {"ce": (self.label_weight or 1.0) * self.label_loss(student.logits, batch.targets)}

    def distill(self, student: Outputs, teacher: Any, batch: Batch) -> dict[str, Tensor]:
        """Return every other term: what a method defines.  ``teacher`` is an Outputs, or None by its ``needs``."""
        return {}

    def warmup(self, length: float) -> float:
        """A weight's factor that rises evenly to 1 within ``length`` epochs: 1/length in the first (mdistiller's
        count; repositories that count from 0 give the first epoch no weight at all).
        """
        return 1.0 if length <= 0 else min((self.progress + 1) / length, 1.0)

    @property
    def progress(self) -> int:
        """Return the epoch, from 0; UsageError before ``start_epoch``, as a warm-up would never advance."""
        if self.epoch is None:
            raise UsageError(
                f"{self.label} changes with the epochs: call distiller.start_epoch(epoch, epochs) at the "
                "start of each, counted from 0"
            )
        return self.epoch
