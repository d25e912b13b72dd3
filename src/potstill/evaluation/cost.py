"""What a network costs: parameters, FLOPs, milliseconds."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from potstill.evaluation.evaluate import evaluating
from potstill.inputs import InputSpec

MOST_ROWS = 100  # of a summary
MOST_NAMES = 12  # of classes in a summary


def parameters(module: nn.Module) -> int:
    """Trainable and frozen parameters; shared ones count once, buffers do not."""
    return sum(parameter.numel() for parameter in module.parameters())


def flops(module: nn.Module, spec: InputSpec) -> int:
    """Floating-point operations for one image, two per multiply-add.

    Convolutions, matrix products and attention are counted, as ``torch.utils.flop_counter`` does; normalisation,
    activations and pooling are not (about 1 % in usual networks).  Fused attention is run as the matrix products that
    it consists of: the counter does not know every fused kernel, and counts those that it does not know as nothing.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode  # here, since it brings what compiles for GPUs

    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluating(module), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            module(_blank(module, spec, 1))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return int(counter.get_total_flops())


def summary_text(module: nn.Module, spec: InputSpec, class_names: Sequence[str]) -> str:
    """A table of layers (path, type, output shape, parameters) and the totals, for people to read.

    A network of more than ``MOST_ROWS`` layers is shown as blocks: at the greatest depth that keeps the table so short.
    """
    shapes = _output_shapes(module, spec)
    rows = _rows(module, shapes)
    columns = [("layer", "type", "output", "parameters"), *(row.cells() for row in rows)]
    path, kind, shape, count = (max(map(len, column)) for column in zip(*columns, strict=True))
    lines = [f"{a:<{path}}  {b:<{kind}}  {c:>{shape}}  {d:>{count}}" for a, b, c, d in columns]
    lines.insert(1, "-" * len(lines[0]))
    total = parameters(module)
    names = [_printable(name) for name in class_names]
    listed = ", ".join(names[:MOST_NAMES]) + (f", ... {names[-1]}" if len(names) > MOST_NAMES else "")
    lines += [
        "",
        f"network      {type(module).__name__}",
        f"input        3 x {spec.size} x {spec.size}",
        f"classes      {len(names)}: {listed}",
        f"parameters   {total:,} ({4 * total / 2**20:,.1f} MiB in float32)",
        f"FLOPs        {flops(module, spec):,} for one image, two per multiply-add",
    ]
    return "\n".join(lines) + "\n"


def latency(
    models: Mapping[str, tuple[nn.Module, InputSpec]],
    *,
    batch: int = 1,
    rounds: int = 30,
    warmup: int = 3,
    seconds: float = 20.0,
) -> dict[str, dict[str, float | int | str]]:
    """Milliseconds for one batch, the models taking turns so that a busy machine is unfair to none.

    Args:
        models: name -> network on its device, and how its images are prepared.
        batch: images at once.
        rounds: measurements of each model.
        warmup: rounds before that, thrown away.
        seconds: begin no further round after so much time, but make five at least.

    Returns:
        name -> ``p50`` and ``p95`` in ms, ``batch``, ``threads`` (of torch on the CPU), ``device``.
    """
    calls = {name: (module, _blank(module, spec, batch)) for name, (module, spec) in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    with contextlib.ExitStack() as stack:
        for module, _ in calls.values():
            stack.enter_context(evaluating(module))
        start = time.perf_counter()
        for turn in range(-warmup, rounds):
            if turn >= 5 and time.perf_counter() - start > seconds:
                break
            for name, (module, images) in calls.items():
                taken = _milliseconds(module, images)
                if turn >= 0:
                    times[name].append(taken)
    return {
        name: {
            "p50": float(np.percentile(times[name], 50)),
            "p95": float(np.percentile(times[name], 95)),
            "batch": batch,
            "threads": torch.get_num_threads(),
            "device": str(images.device),
        }
        for name, (_, images) in calls.items()
    }


class _Row(NamedTuple):
    path: str
    kind: str
    shape: str
    parameters: int

    def cells(self) -> tuple[str, str, str, str]:
        return self.path, self.kind, self.shape, f"{self.parameters:,}"


def _rows(module: nn.Module, shapes: Mapping[str, str]) -> list[_Row]:
    """One row a layer, or a block where there are too many layers; rows never overlap, so parameters add up."""
    deepest = max(path.count(".") for path, _ in module.named_modules()) + 1
    for depth in range(deepest, 0, -1):
        rows = _rows_at(module, shapes, depth)
        if len(rows) <= MOST_ROWS:
            break
    return rows


def _rows_at(module: nn.Module, shapes: Mapping[str, str], depth: int) -> list[_Row]:
    rows = []
    for path, part in module.named_modules():
        level = path.count(".") + 1 if path else 0
        if level > depth or isinstance(part, nn.Identity):
            continue
        if level == depth or not any(part.children()):
            rows.append(_Row(path or "(all)", type(part).__name__, shapes.get(path, "not used"), parameters(part)))
        elif own := sum(parameter.numel() for parameter in part.parameters(recurse=False)):
            rows.append(_Row(f"{path or '(network)'}: own", type(part).__name__, "", own))
    return rows


def _output_shapes(module: nn.Module, spec: InputSpec) -> dict[str, str]:
    """Path -> shape of what the submodule puts out for one image, without the batch."""
    shapes: dict[str, str] = {}
    handles = []
    for path, part in module.named_modules():

        def keep(part: nn.Module, args: object, output: object, path: str = path) -> None:
            shape = " x ".join(map(str, output.shape[1:])) if isinstance(output, Tensor) else type(output).__name__
            shapes.setdefault(path, shape)

        handles.append(part.register_forward_hook(keep))
    try:
        with evaluating(module):
            module(_blank(module, spec, 1))
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _printable(name: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def _milliseconds(module: nn.Module, images: Tensor) -> float:
    _wait(images.device)
    start = time.perf_counter()
    module(images)
    _wait(images.device)
    return 1000 * (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _blank(module: nn.Module, spec: InputSpec, batch: int) -> Tensor:
    weight = next((parameter for parameter in module.parameters() if parameter.is_floating_point()), torch.zeros(0))
    return torch.zeros(batch, 3, spec.size, spec.size, device=weight.device, dtype=weight.dtype)
