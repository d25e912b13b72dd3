"""One thread and one seed: no test depends on the machine's cores or on luck."""

import atexit
import functools
import gc
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import PIL
import pytest
from _pytest.doctest import DoctestModule

from .own_process import plugin

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded, and for the processes that tests start
# Else every process that tests start compiles potstill again, half a second each, and every run of pytest all tests.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
if "POTSTILL_CACHE" not in os.environ:  # tests leave no trace in a user's cache, and find none there
    os.environ["POTSTILL_CACHE"] = tempfile.mkdtemp(prefix="potstill-cache-")
    atexit.register(shutil.rmtree, os.environ["POTSTILL_CACHE"], ignore_errors=True)


_NO_STACK = SimpleNamespace(format_stack=list)

needs_pillow_13 = pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13, reason="what is expected of the odd files is what Pillow 13 makes of them"
)

# By Pillow's own rules these are refused, though all pixels are there: metadata is cut short or too large, an animation
# behind the image is damaged, or (a premultiplied gray TIFF) it cannot be turned into RGB at once.
READ_THOUGH_EXPECTED_TO_FAIL = {
    "0366_pillow_c76009a8.png",
    "0414_strongcourage_72a0dab6.png",
    "0415_libpng-pngsuite_bdc133d5.png",
    "0486_strongcourage_49275fef.png",
    "0541_strongcourage_6fcb5238.tiff",
    "0571_pillow_8eb03a3c.png",
    "0683_strongcourage_55474eaa.png",
}


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(plugin())


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A process keeps to whole files, whose runs are made once, until another is idle: ``--dist worksteal``."""
    if config.getoption("dist") != "load":  # somebody asks for another way
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection() -> Any:
    """What was collected stays until the end, so that the garbage collector need not look at a million objects."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()
        # Or libraries report that their objects were never freed; not before pytest's last collections are done.
        atexit.register(gc.unfreeze)


@pytest.hookimpl(wrapper=True)
def pytest_collect_file() -> Any:
    """Examples in docstrings are of the source: to look for some in the tests takes a second, in each process."""
    found = yield
    return [each for each in found if not isinstance(each, DoctestModule)]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    if "torch" in sys.modules:
        import torch

        # For each device that it has not begun to use, torch keeps where it was seeded: half the time of an empty test.
        for devices in (torch.cuda, torch.mtia, torch.xpu):
            devices.traceback = _NO_STACK  # type: ignore[attr-defined]
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def generated_docs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that the documentation's site is built from, as scripts/docs generates it: ``docs/`` and zensical.toml."""
    script = Path(__file__).parents[1] / "scripts" / "generate_docs.py"
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("generated") / "site"
    module.generate(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _no_wait_for_the_disk() -> Iterator[None]:
    """``os.fsync`` returns at once: a run of a second calls it a hundred times, and no test pulls the plug."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # which refuses what is no open file, too
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_table_of_operators() -> Iterator[None]:
    """PyTorch's table of ONNX operators is made once a process, by parsing 500 functions: a third of a small export."""
    from potstill.export import onnx

    export = onnx._run_exporter

    def instead(*arguments: Any) -> Any:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        if not hasattr(ONNXRegistry.from_torchlib, "cache_info"):
            patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        return export(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx, "_run_exporter", instead)
        yield


@pytest.fixture
def thread_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's number of threads can be set and read, and no thread is started: more of them than cores are slow."""
    import torch

    kept = [torch.get_num_threads()]
    monkeypatch.setattr(torch, "set_num_threads", lambda number: kept.__setitem__(0, number))
    monkeypatch.setattr(torch, "get_num_threads", lambda: kept[0])


class _Blank:
    """In place of a figure."""

    def savefig(self, file: IO[bytes], *, format: str, **_: Any) -> None:
        file.write(b"<svg></svg>" if format == "svg" else b"")


@contextmanager
def blank_pictures() -> Iterator[None]:
    """Reports have empty pictures: to draw those of a small run takes five times as long as all else of it."""
    from potstill.report import canvas

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvas, "draw_figure", lambda draw, size: _Blank())
        patch.setattr(canvas, "_style", lambda *_, **__: nullcontext())
        yield


@contextmanager
def few_digits() -> Iterator[None]:
    """The data set ``digits`` has every third of its images."""
    from potstill.data.builtin import digits

    counts, labels = digits.read_counts()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "read_counts", lambda: (counts[::3], labels[::3]))
        yield


_ONCE = {"rounds": 1, "warmup": 0}
_SECONDS = 1e-4  # in an estimate, of a step or of a forward pass
_whole: list[None] = []  # as many as there are blocks of whole_runs


_known_costs: dict[Any, Any] = {}


def _once_for_the_same_layers(name: str, cost: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a network and further arguments, called once a session for networks that look the same."""

    def remembered(module: Any, *rest: Any, **named: Any) -> Any:
        shapes = [(key, value.shape, value.dtype) for key, value in module.state_dict().items()]
        key = (name, repr(module), repr(shapes), repr(rest), repr(named))
        if key not in _known_costs:
            _known_costs[key] = cost(module, *rest, **named)
        return _known_costs[key]

    return remembered


@contextmanager
def short_runs() -> Iterator[None]:
    """Runs without what their tests do not look at: half of a small one.

    Blank pictures, each network's latency from one measurement in place of thirty, estimates from one forward pass in
    place of several and from no step, no example images, git is asked once about each folder, and FLOPs, memory and
    table of layers are those of the last network with the same layers.
    """
    from potstill.experiment import estimate, reproduce, results

    def instead(module: Any, name: str, other: Callable[..., Any]) -> None:
        real = getattr(module, name)
        patch.setattr(module, name, lambda *all_, **named: (real if _whole else other)(*all_, **named))

    measure = results.measure_latency
    with blank_pictures(), pytest.MonkeyPatch.context() as patch:
        instead(results, "measure_latency", lambda networks, **how: measure(networks, **how | _ONCE))
        for name in ("count_flops", "measure_memory", "model_summary"):
            instead(results, name, _once_for_the_same_layers(name, getattr(results, name)))
        instead(results, "describe_examples", lambda *_: None)
        instead(reproduce, "git_state", functools.cache(reproduce.git_state))
        instead(estimate, "create_timed_step", lambda *_: lambda: None)
        instead(estimate, "_seconds_of", lambda call: call() or _SECONDS)  # a network that cannot answer is still found
        yield


@contextmanager
def whole_runs() -> Iterator[None]:
    """Runs of which only the pictures are blank, within ``short_runs`` too: for those that a session shares."""
    _whole.append(None)
    try:
        with blank_pictures():
            yield
    finally:
        _whole.pop()


@pytest.fixture
def corpus() -> Path:
    """Third-party image files with the expected outcome of each."""
    default = Path(__file__).parents[2] / "shared" / "corpora" / "core"
    folder = Path(os.environ.get("POTSTILL_CORPORA", default))
    if not (folder / "MANIFEST.tsv").is_file():
        pytest.skip(f"no image corpus (a folder with MANIFEST.tsv) at {folder}; set POTSTILL_CORPORA")
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty stand-in for the Hugging Face hub, to which the hub's client is connected."""
    from .stand_in_hub import Hub, connected

    with connected(Hub(), monkeypatch, tmp_path / "hub-cache") as found:
        yield found


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights of a small network that open_clip then knows as ``tiny``."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed: pip install 'potstill[clip]'")
    import json

    import torch

    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
    (folder / "tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny.json")
    torch.manual_seed(3)
    model = open_clip.CLIP(**open_clip.get_model_config("tiny"))
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, folder / "tiny.pt")
    return folder / "tiny.pt"
