"""Cost of a network: parameters, FLOPs, latency, and memory of weights and activations."""

import contextlib
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from potstill.evaluation.predictions import evaluation_mode
from potstill.formatting import format_columns
from potstill.input_spec import InputSpec
from potstill.models.families.opaque_models import find_opaque
from potstill.models.model_table import REFERENCE, REFERENCE_SIZE, TABLE_CLASSES
from potstill.models.registry import build_model


def measure_memory(module: nn.Module, spec: InputSpec, batch: int = 1) -> dict[str, int]:
    """Return bytes of ``weights`` (parameters and buffers) and peak ``activations`` of one forward pass.

    Activations are all tensors that are alive at the same time, including the ``batch`` images, without the workspace
    of cuDNN or oneDNN inside an operation.
    """
    weights = [*module.parameters(), *module.buffers()]
    skip_compiler_import(_MemoryTracker.__torch_dispatch__)
    with evaluation_mode(module), _MemoryTracker() as tracker:
        module(_blank_images(module, spec, batch))
    return {
        "weights": sum(each.numel() * each.element_size() for each in weights),
        "activations": tracker.peak,
        "batch": batch,
    }


def skip_compiler_import(*functions: Any) -> None:
    """Set torch's mark of functions that are not compiled, for which many import its compiler: 1.5 s at the start."""
    if "torch._dynamo" in sys.modules:
        return
    for function in functions:
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is not None and not hasattr(wrapped, "__dynamo_disable"):
            setattr(wrapped, "__dynamo_disable", wrapped)


class _MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tracks the bytes of storages that are created in the block and not yet freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        for each in tree_leaves((args, kwargs)):
            self._track_storage(each, created=False)  # weights
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            self._track_storage(each, created=True)
        self.peak = max(self.peak, self.current)
        return result

    def _track_storage(self, value: Any, *, created: bool) -> None:
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        key, size = id(storage), storage.nbytes() if created else 0
        if key in self._known and self._known[key]() is storage:
            return

        def freed(_: Any) -> None:
            self._known.pop(key, None)
            self.current -= size

        self._known[key] = weakref.ref(storage, freed)
        self.current += size


MAX_SUMMARY_ROWS = 100
MAX_CLASS_NAMES = 12  # listed in a summary

# The processor time of the calling thread, which a busy machine hardly changes; on some systems it is too coarse.
THREAD_CLOCK = time.thread_time if time.get_clock_info("thread_time").resolution <= 1e-6 else time.perf_counter


def count_parameters(module: nn.Module) -> int:
    """Return the number of trainable and frozen parameters; shared ones count once, buffers do not."""
    return sum(parameter.numel() for parameter in module.parameters())


def known_parameters(*modules: nn.Module) -> int | None:
    """Return the sum of ``count_parameters``; None if one of the networks hides its layers."""
    hidden = any(find_opaque(module) is not None for module in modules)
    return None if hidden else sum(map(count_parameters, modules))


def count_flops(module: nn.Module, spec: InputSpec) -> int:
    """Return the floating-point operations for one image, two per multiply-add, by ``torch.utils.flop_counter``.

    Convolutions, matrix products and attention count; normalisation, activations and pooling do not (about 1 % in usual
    networks).  Fused attention runs unfused here, as the counter counts unknown fused kernels as 0.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils import flop_counter  # here, since it imports triton

    for mode in vars(flop_counter).values():
        skip_compiler_import(getattr(mode, "__torch_dispatch__", None))

    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            evaluation_mode(module),
            sdpa_kernel(SDPBackend.MATH),
            flop_counter.FlopCounterMode(display=False) as counter,
        ):
            module(_blank_images(module, spec, 1))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return int(counter.get_total_flops())


def model_summary(module: nn.Module, spec: InputSpec, class_names: Sequence[str], *, flops: int | None = None) -> str:
    """Return a text table of layers (path, type, output shape, parameters) and the totals; large ones by blocks."""
    if (hidden := find_opaque(module)) is not None:
        return (
            f"network      {hidden.label}, whose layers are hidden\n"
            f"input        3 x {spec.size} x {spec.size}\n"
            f"classes      {_list_classes(class_names)}\n"
        )
    shapes = _output_shapes(module, spec)
    rows = _layer_rows(module, shapes)
    lines = format_columns([("layer", "type", "output", "parameters"), *rows], left=(0, 1))
    lines.insert(1, "-" * len(lines[0]))
    total = count_parameters(module)
    lines += [
        "",
        f"network      {type(module).__name__}",
        f"input        3 x {spec.size} x {spec.size}",
        f"classes      {_list_classes(class_names)}",
        f"parameters   {total:,} ({4 * total / 2**20:,.1f} MiB in float32)",
        f"FLOPs        {count_flops(module, spec) if flops is None else flops:,} for one image, two per multiply-add",
    ]
    return "\n".join(lines) + "\n"


def _list_classes(class_names: Sequence[str]) -> str:
    names = [_printable(name) for name in class_names]
    listed = ", ".join(names[:MAX_CLASS_NAMES]) + (f", ... {names[-1]}" if len(names) > MAX_CLASS_NAMES else "")
    return f"{len(names)}: {listed}"


def measure_latency(
    models: Mapping[str, tuple[nn.Module, InputSpec]],
    *,
    batch: int = 1,
    rounds: int = 30,
    warmup: int = 3,
    seconds: float = 20.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float | int | str]]:
    """Measure the milliseconds for one batch, alternating between the models so that background load affects all.

    The first five ``rounds`` take place whatever ``seconds`` are.  Return name -> ``p50`` and ``p95`` in ms, ``batch``,
    ``threads`` (of torch on the CPU), ``device``.  ``clock`` may be ``THREAD_CLOCK`` for models that compute in the
    calling thread alone.
    """
    calls = {name: (module, _blank_images(module, spec, batch)) for name, (module, spec) in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    with contextlib.ExitStack() as stack:
        for module, _ in calls.values():
            stack.enter_context(evaluation_mode(module))
        start = time.perf_counter()
        for number in range(-warmup, rounds):
            if number >= 5 and time.perf_counter() - start > seconds:
                break
            for name, (module, images) in calls.items():
                elapsed = _time_forward(module, images, clock)
                if number >= 0:
                    times[name].append(elapsed)
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


def measure_reference() -> float:
    """Return the milliseconds of the model table's reference network for one image, on one thread of this CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            network = build_model(REFERENCE, TABLE_CLASSES, size=REFERENCE_SIZE)
        models = {REFERENCE: (network, InputSpec(REFERENCE_SIZE))}
        found = measure_latency(models, rounds=15, seconds=2.0, clock=THREAD_CLOCK)
    finally:
        torch.set_num_threads(threads)
    return float(found[REFERENCE]["p50"])


def _layer_rows(module: nn.Module, shapes: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Return path, type, output shape and parameters of each layer, or block if there are too many layers.

    Rows never overlap, so parameters add up.
    """
    deepest = max(path.count(".") for path, _ in module.named_modules()) + 1
    for depth in range(deepest, 0, -1):
        rows = _layer_rows_at(module, shapes, depth)
        if len(rows) <= MAX_SUMMARY_ROWS:
            break
    return rows


def _layer_rows_at(module: nn.Module, shapes: Mapping[str, str], depth: int) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for path, part in module.named_modules():
        level = path.count(".") + 1 if path else 0
        if level > depth or isinstance(part, nn.Identity):
            continue
        if level == depth or not any(part.children()):
            shape, count = shapes.get(path, "not used"), count_parameters(part)
            rows.append((path or "(all)", type(part).__name__, shape, f"{count:,}"))
        elif own := sum(parameter.numel() for parameter in part.parameters(recurse=False)):
            rows.append((f"{path or '(network)'}: own", type(part).__name__, "", f"{own:,}"))
    return rows


def _output_shapes(module: nn.Module, spec: InputSpec) -> dict[str, str]:
    """Return the shape of each submodule's output for one image, without the batch, by path."""
    shapes: dict[str, str] = {}
    handles = []
    for path, part in module.named_modules():

        def keep(part: nn.Module, args: object, output: object, path: str = path) -> None:
            shape = " x ".join(map(str, output.shape[1:])) if isinstance(output, Tensor) else type(output).__name__
            shapes.setdefault(path, shape)

        handles.append(part.register_forward_hook(keep))
    try:
        with evaluation_mode(module):
            module(_blank_images(module, spec, 1))
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _printable(name: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def _time_forward(module: nn.Module, images: Tensor, clock: Callable[[], float]) -> float:
    _synchronize(images.device)
    start = clock()
    module(images)
    _synchronize(images.device)
    return 1000 * (clock() - start)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _blank_images(module: nn.Module, spec: InputSpec, batch: int) -> Tensor:
    weights = (*module.parameters(), *module.buffers())
    weight = next((each for each in weights if each.is_floating_point()), torch.zeros(0))
    return torch.zeros(batch, 3, spec.size, spec.size, device=weight.device, dtype=weight.dtype)
