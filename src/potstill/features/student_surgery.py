"""Students with replaced last layers, trained and deployed instead of the student (DHO, NORM, SimKD).

Each is built from a student and plain values, so that a saved model can be built again without teacher and method.
"""

import copy
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.errors import UsageError, did_you_mean
from potstill.features.hooks import find_submodule
from potstill.features.stages import Stage
from potstill.features.tracing import Grid, Layout
from potstill.types import at_least_float32


class ModifiedStudent(nn.Module):
    """A network around a student's; ``rebuild_student`` makes the same from ``facts``."""

    name: ClassVar[str]
    network: nn.Module
    facts: dict[str, Any]


def require_module_output(stage: Stage, method: str) -> None:
    """Check that layers can be appended to a stage: its map is the single output of a submodule."""
    if stage.activated or stage.call is not None:
        reason = (
            "leaves a function, not a layer" if stage.activated else f"is one of several outputs of {stage.module!r}"
        )
        raise UsageError(
            f"{method} appends layers to the student's last map, but that ({stage.path}) {reason}; "
            "name another pair with layers, or use fitnet, which only reads it"
        )


def constructor_arguments(arguments: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the arguments in ``locals()`` at the start of an ``__init__``, without the network."""
    excluded = ("self", "network", "__class__")
    return {"name": name, **{key: value for key, value in arguments.items() if key not in excluded}}


LAYER_NORM_EPSILON = 1e-7  # of the logits, in NORM's release


class ExpandedStage(ModifiedStudent):
    """The student with a linear block after its last stage: 1x1 to many channels, 1x1 back, plus the map itself.

    The student's last ``stage`` (path, and channels and layout of its map) is replaced in place.  With ``logit_scale``,
    logits get mean 0 and variance 1 over the classes and are multiplied by it.

    Example:
        >>> student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        >>> expanded = ExpandedStage(student, stage="0", channels=4, expanded=24).eval()
        >>> images = torch.randn(2, 3, 4, 4)
        >>> torch.allclose(expanded(images), expanded.merged()(images), atol=1e-5)
        True
    """

    name = "expanded_stage"

    def __init__(
        self,
        network: nn.Module,
        *,
        stage: str,
        channels: int,
        expanded: int,
        layout: Layout = "NCHW",
        logit_scale: float = 0.0,
    ) -> None:
        super().__init__()
        self.facts = constructor_arguments(locals(), self.name)
        self.stage, self.logit_scale = stage, logit_scale
        self.network = network
        block = ExpansionBlock(channels, expanded, layout)
        network.set_submodule(stage, nn.Sequential(find_submodule(network, stage), block))

    @property
    def tap(self) -> str:
        """Path of the submodule that outputs the expanded map [B, expanded, H, W]."""
        return f"network.{self.stage}.1.expand"

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, K] for images [B, 3, H, W]."""
        return _scale_logits(self.network(images), self.logit_scale)

    @torch.no_grad()
    def merged(self) -> "MergedStage":
        """Return an equivalent network for eval mode, with one 1x1 convolution in place of the block."""
        network = copy.deepcopy(self.network)
        old, block = cast(nn.Sequential, network.get_submodule(self.stage))
        weight, bias = cast(ExpansionBlock, block).as_one()
        network.set_submodule(self.stage, old)
        arguments = {key: value for key, value in self.facts.items() if key not in ("name", "expanded")}
        merged = MergedStage(network, **arguments)
        conv = cast(PointwiseConv, network.get_submodule(f"{self.stage}.1")).conv
        conv.to(weight.device)
        conv.weight.copy_(weight[:, :, None, None])
        assert conv.bias is not None
        conv.bias.copy_(bias)
        return merged.train(self.training)


class MergedStage(ModifiedStudent):
    """The student with one 1x1 convolution after its last stage."""

    name = "merged_stage"

    def __init__(
        self, network: nn.Module, *, stage: str, channels: int, layout: Layout = "NCHW", logit_scale: float = 0.0
    ) -> None:
        super().__init__()
        self.facts = constructor_arguments(locals(), self.name)
        self.logit_scale = logit_scale
        self.network = network
        place_wise = PointwiseConv(nn.Conv2d(channels, channels, kernel_size=1), layout)
        network.set_submodule(stage, nn.Sequential(find_submodule(network, stage), place_wise))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, K] for images [B, 3, H, W]."""
        return _scale_logits(self.network(images), self.logit_scale)


class ExpansionBlock(nn.Module):
    """BatchNorm(1x1 convolution) to many channels and back, plus the input."""

    def __init__(self, channels: int, expanded: int, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.expand = nn.Sequential(nn.Conv2d(channels, expanded, 1, bias=False), nn.BatchNorm2d(expanded))
        self.back = nn.Sequential(nn.Conv2d(expanded, channels, 1, bias=False), nn.BatchNorm2d(channels))
        for layer in (self.expand, self.back):
            nn.init.kaiming_normal_(cast(nn.Conv2d, layer[0]).weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: Tensor) -> Tensor:
        """Return a map of the same shape and layout."""
        arguments = _to_channels_first(features, self.layout)
        return _to_layout(self.back(self.expand(arguments)) + arguments, self.layout)

    def as_one(self) -> tuple[Tensor, Tensor]:
        """Return weight [C, C] and bias [C] of the linear map of the block in eval mode, in float64."""
        wide, wide_bias = _fold_batch_norm(self.expand)
        narrow, narrow_bias = _fold_batch_norm(self.back)
        unit = torch.eye(len(narrow), dtype=narrow.dtype, device=narrow.device)
        return narrow @ wide + unit, narrow @ wide_bias + narrow_bias


class PointwiseConv(nn.Module):
    """A 1x1 convolution on a map of either layout."""

    def __init__(self, conv: nn.Conv2d, layout: Layout) -> None:
        super().__init__()
        self.conv, self.layout = conv, layout

    def forward(self, features: Tensor) -> Tensor:
        """Return a map of the same shape and layout."""
        return _to_layout(self.conv(_to_channels_first(features, self.layout)), self.layout)


def _to_channels_first(features: Tensor, layout: Layout) -> Tensor:
    return features.permute(0, 3, 1, 2) if layout == "NHWC" else features


def _to_layout(features: Tensor, layout: Layout) -> Tensor:
    return features.permute(0, 2, 3, 1) if layout == "NHWC" else features


def layer_norm_logits(logits: Tensor) -> Tensor:
    """Logits [B, K] of mean 0 and variance 1 over the classes of each image.

    Example:
        >>> layer_norm_logits(torch.tensor([[1.0, 3.0]]))
        tensor([[-1.,  1.]])
    """
    return F.layer_norm(at_least_float32(logits), logits.shape[1:], eps=LAYER_NORM_EPSILON)


def _scale_logits(logits: Tensor, scale: float) -> Tensor:
    return layer_norm_logits(logits) * scale if scale else logits


def _fold_batch_norm(layer: nn.Sequential) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a 1x1 convolution and its BatchNorm in eval mode, in float64."""
    conv, norm = cast(nn.Conv2d, layer[0]), cast(nn.BatchNorm2d, layer[1])
    assert norm.running_mean is not None
    assert norm.running_var is not None
    # On the CPU, since MPS has no float64.
    scale = norm.weight.cpu().double() / (norm.running_var.cpu().double() + norm.eps).sqrt()
    bias = norm.bias.cpu().double() - scale * norm.running_mean.cpu().double()
    return scale[:, None] * conv.weight.cpu().double()[:, :, 0, 0], bias


class ProjectedHead(ModifiedStudent):
    """The student up to its last stage, a projector to the teacher's channels, and the teacher's pooling and head.

    The head is a copy that is never trained.  The student's own later layers are left in place, without effect.

    Wraps ``stage`` in place, whose map has ``channels``, a ``layout`` and, of tokens, a size and ``prefix``; ``copied``
    keeps it from later writes.  The projector's hidden layers have ``outputs // factor`` channels; the map is averaged
    to ``pool_height`` x ``pool_width`` before, unless these are 0.

    Example:
        >>> import torch
        >>> student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        >>> joined = ProjectedHead(student, stage="0", channels=4, outputs=6, classes=5)
        >>> joined(torch.zeros(2, 3, 4, 4)).shape  # 5 classes: the teacher's head
        torch.Size([2, 5])
    """

    name = "projected_head"

    def __init__(
        self,
        network: nn.Module,
        *,
        stage: str,
        channels: int,
        outputs: int,
        classes: int,
        factor: int = 2,
        pool_height: int = 0,
        pool_width: int = 0,
        layout: Layout = "NCHW",
        height: int = 0,
        width: int = 0,
        prefix: int = 0,
        copied: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.facts = constructor_arguments(locals(), self.name)
        self.stage, self.pooled = stage, (pool_height, pool_width)
        self.grid = Grid(layout, channels, height, width, prefix)
        self.network = network
        network.set_submodule(stage, OutputCapture(find_submodule(network, stage), copied=copied))
        hidden = max(outputs // factor, 1)
        self.projector = nn.Sequential(
            *_conv_norm_relu(channels, hidden, kernel=1),
            *_conv_norm_relu(hidden, hidden, kernel=3),
            *_conv_norm_relu(hidden, outputs, kernel=1),
        )
        self.head = nn.Linear(outputs, classes, bias=bias).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, K] for images [B, 3, H, W]."""
        self.network(images)
        kept = cast(OutputCapture, self.network.get_submodule(self.stage)).take()
        features = self.grid.to_map(kept)
        if self.pooled != (0, 0):
            features = F.adaptive_avg_pool2d(features, self.pooled)
        logits: Tensor = self.head(self.projector(features).mean(dim=(2, 3)))
        return logits


class OutputCapture(nn.Module):
    """A submodule whose last output can be taken once, so that no tensor is left for copies and exports."""

    def __init__(self, module: nn.Module, *, copied: bool) -> None:
        super().__init__()
        self.module, self.copied = module, copied
        self._output: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the submodule's output."""
        output: Tensor = self.module(*args, **kwargs)
        self._output = output.clone() if self.copied else output
        return output

    def take(self) -> Tensor:
        """Return the last output."""
        output, self._output = self._output, None
        if output is None:
            raise UsageError("the student's last stage did not run; name a layer that every image passes")
        return output


def _conv_norm_relu(inputs: int, outputs: int, *, kernel: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU()


class DualHead(ModifiedStudent):
    """The student with two heads on its embedding, whose probabilities are averaged.

    Its logits are ``log(alpha * softmax(first) + (1 - alpha) * softmax(second / beta))``.

    ``head`` is the path of the last linear layer, wrapped in place; ``select`` tries the ``candidates`` of alpha and
    beta.

    Example:
        >>> student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        >>> dual = DualHead(student, head="2", alpha=0.5, beta=1.0)
        >>> dual(torch.zeros(2, 3, 4, 4)).exp().sum(dim=1)  # probabilities
        tensor([1., 1.], grad_fn=<SumBackward1>)
    """

    name = "dual_head"

    def __init__(self, network: nn.Module, *, head: str, alpha: float, beta: float) -> None:
        super().__init__()
        self.facts = constructor_arguments(locals(), self.name)
        self.taps = f"network.{head}.first", f"network.{head}.second"
        self.candidates: tuple[tuple[float, ...], tuple[float, ...]] = ((alpha,), (beta,))
        self.network = network
        linear = find_submodule(network, head)
        if not isinstance(linear, nn.Linear) or not 0 <= alpha <= 1 or not beta > 0:
            raise UsageError(f"{head} must be a linear layer, alpha in [0, 1] and beta above 0, got {alpha} and {beta}")
        network.set_submodule(head, AveragedHeads(linear, alpha, beta))
        self._heads = head

    @property
    def heads(self) -> "AveragedHeads":
        """The two heads."""
        return cast(AveragedHeads, self.network.get_submodule(self._heads))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, K] for images [B, 3, H, W]: logarithms of the averaged probabilities."""
        logits: Tensor = self.network(images)
        return logits

    def select(self, first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
        """Choose alpha and beta among the candidates by top-1, and among equal ones by the log-likelihood.

        Logits [N, K] of both heads are for images that the network was not trained on.  Return the chosen mean's, [N,
        K].
        """
        heads, best = self.heads, (-1.0, -float("inf"))
        for beta in self.candidates[1]:
            for alpha in self.candidates[0]:
                logits = average_heads(first, second, alpha, beta)
                found = (
                    int((logits.argmax(dim=1) == labels).sum()),
                    -float(F.nll_loss(logits.cpu().double(), labels.cpu())),
                )
                if found > best:
                    best, heads.alpha, heads.beta = found, alpha, beta
        self.facts |= {"alpha": heads.alpha, "beta": heads.beta}
        return average_heads(first, second, heads.alpha, heads.beta)


class AveragedHeads(nn.Module):
    """Two linear layers on one input; puts out the logarithm of their averaged probabilities."""

    def __init__(self, linear: nn.Linear, alpha: float, beta: float) -> None:
        super().__init__()
        self.alpha, self.beta = alpha, beta
        self.first = linear
        self.second = nn.Linear(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )

    def forward(self, embedding: Tensor) -> Tensor:
        """Return logits [B, K] for an embedding [B, D]."""
        return average_heads(self.first(embedding), self.second(embedding), self.alpha, self.beta)


MIN_PROBABILITY = 1e-30  # so that the logarithm stays finite


def average_heads(first: Tensor, second: Tensor, alpha: float, beta: float) -> Tensor:
    """Return ``log(alpha * softmax(first) + (1 - alpha) * softmax(second / beta))``, [B, K] in at least float32.

    Example:
        >>> first, second = torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[1.0, 1.0]]).log()
        >>> average_heads(first, second, alpha=0.5, beta=1.0).exp()  # the mean of 3/4 and 1/2
        tensor([[0.6250, 0.3750]])
    """
    first_probabilities = F.softmax(at_least_float32(first), dim=1)
    second_probabilities = F.softmax(at_least_float32(second) / beta, dim=1)
    return (alpha * first_probabilities + (1 - alpha) * second_probabilities).clamp(min=MIN_PROBABILITY).log()


MODIFIED_STUDENTS: dict[str, type[ModifiedStudent]] = {
    "projected_head": ProjectedHead,
    "expanded_stage": ExpandedStage,
    "merged_stage": MergedStage,
    "dual_head": DualHead,
}


def rebuild_student(network: nn.Module, facts: dict[str, Any]) -> ModifiedStudent:
    """Return the module that ``facts`` describe, around an unchanged student, ready for its saved weights.

    UsageError: facts of an unknown module, or that do not fit ``network``, which is changed in place.

    Example:
        >>> student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        >>> rebuild_student(student, {"name": "merged_stage", "stage": "0", "channels": 4}).facts["layout"]
        'NCHW'
    """
    arguments = dict(facts)
    name = arguments.pop("name", None)
    if name not in MODIFIED_STUDENTS:
        raise UsageError(
            f"no remodelled network {name!r}{did_you_mean(str(name), MODIFIED_STUDENTS) or '.'} Known: "
            f"{', '.join(MODIFIED_STUDENTS)}"
        )
    try:
        return MODIFIED_STUDENTS[name](network, **arguments)
    except TypeError as error:
        raise UsageError(f"these facts do not describe a {name}: {error}") from None
