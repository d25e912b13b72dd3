"""What is compiled, when, and that nothing but the call is.  No GPU: a pretended compiler, and torch's without code."""

import copy

import pytest
import torch
from torch import nn

from potstill.distillation.distiller import Distiller
from potstill.errors import UsageError
from potstill.methods.at import AT
from potstill.methods.kd import KD
from potstill.methods.supervised import Supervised
from potstill.training.callbacks import SilentObserver
from potstill.training.checkpointing import load_checkpoint
from potstill.training.devices import Compute
from potstill.training.optim import create_optimizer
from potstill.training.settings import TrainingSettings
from potstill.training.student_forward import (
    COMPILE_SECONDS,
    EXPECTED_SAVING,
    MAX_CUDA_GRAPH_IMAGES,
    WARMUP_STEPS,
    StudentCompiler,
    is_worth_compiling,
)
from potstill.training.trainer import Trainer
from potstill.types import Batch

CPU = Compute(torch.device("cpu"), bf16=False, channels_last=False)
GPU = Compute(torch.device("cuda"), bf16=True, channels_last=True)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Dropout(0.3), nn.Linear(4, 3),
    )  # fmt: skip


class Compiler:
    """Calls the plain forward and counts; sees what it was asked for."""

    def __init__(self, error=None):
        self.calls, self.asked, self.error = 0, [], error

    def __call__(self, forward, **options):
        self.asked.append(options)

        def compiled(images):
            if self.error is not None:
                raise self.error
            self.calls += 1
            return forward(images)

        return compiled


class Listening(SilentObserver):
    def __init__(self):
        self.notes = []

    def note(self, message):
        self.notes.append(message)


class Case:
    """One student's compiling with a clock that is set by hand."""

    def __init__(self, monkeypatch, compute=CPU, compiler=None, method=None, seconds=0.0, **settings):
        torch.manual_seed(0)
        method, self.now, self.seconds = method or Supervised(), 0.0, seconds
        teacher = network() if method.needs.teacher else None
        self.distiller = Distiller(network(), teacher, method, example=torch.randn(2, 3, 8, 8))
        self.settings = TrainingSettings(**settings)
        optimizer = create_optimizer(self.distiller.trained_parameters(), self.settings)
        self.compiler, self.observer = compiler or Compiler(), Listening()
        if compute is GPU:  # rehearsing needs one
            monkeypatch.setattr(StudentCompiler, "_warm_up", lambda *_: None)
            monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
        self.compiling = StudentCompiler(
            self.distiller, optimizer, self.settings, compute, self.observer, compile=self.compiler,
            clock=lambda: self.now,
        )  # fmt: skip

    def epoch(self, steps=10, left=10**6, seconds=1.0, images=None):
        """One epoch of so many seconds; how many of two calls were compiled."""
        images = torch.randn(6, 3, 8, 8) if images is None else images
        before = self.compiler.calls
        with self.compiling.epoch(steps, left):
            self.compiling.prepare(images)
            rehearsed = self.compiler.calls
            self.distiller.student(images)
            self.distiller.student(images)
            self.now += seconds
        assert "forward" not in vars(self.distiller.student)
        self.rehearsals = rehearsed - before
        return self.compiler.calls - rehearsed


def test_it_pays_when_what_is_saved_is_more_than_what_it_takes():
    assert not is_worth_compiling(int(COMPILE_SECONDS / EXPECTED_SAVING) - 1, 1.0)
    assert is_worth_compiling(int(COMPILE_SECONDS / EXPECTED_SAVING) + 1, 1.0)


def test_auto_leaves_a_cpu_alone(monkeypatch):
    case = Case(monkeypatch)
    assert [case.epoch(seconds=1e6) for _ in range(3)] == [0, 0, 0]
    assert case.compiler.asked == []
    assert case.observer.notes == []


def test_auto_on_a_gpu_first_looks_at_a_plain_epoch(monkeypatch):
    case = Case(monkeypatch, GPU)
    assert case.epoch(seconds=10.0) == 0  # 1 s a step
    assert case.epoch(left=int(COMPILE_SECONDS / EXPECTED_SAVING) - 1, seconds=10.0) == 0
    assert case.epoch(left=int(COMPILE_SECONDS / EXPECTED_SAVING) + 1, seconds=8.0) == 2
    assert case.epoch(left=1, seconds=8.0) == 2  # it is there already
    assert len(case.compiler.asked) == 1
    assert len(case.observer.notes) == 1


def test_a_compiled_epoch_that_is_slower_was_the_last(monkeypatch):
    case = Case(monkeypatch, GPU)
    case.epoch(seconds=10.0)
    assert case.epoch(seconds=200.0) == 2  # with compiling: says nothing yet
    assert case.epoch(seconds=8.0) == 2
    slower = Case(monkeypatch, GPU)
    slower.epoch(seconds=10.0)
    assert slower.epoch(seconds=200.0) == 2
    assert slower.epoch(seconds=11.0) == 2
    assert slower.epoch(seconds=10.0) == 0
    assert "no longer compiled" in slower.observer.notes[-1]


@pytest.mark.parametrize(
    ("images", "settings", "mode"),
    [
        (MAX_CUDA_GRAPH_IMAGES, {}, "reduce-overhead"),
        (MAX_CUDA_GRAPH_IMAGES + 1, {}, None),
        (8, {"gradient_accumulation_steps": 2}, None),  # gradients of one call must outlive the next
    ],
)
def test_cuda_graphs_for_small_batches(monkeypatch, images, settings, mode):
    case = Case(monkeypatch, GPU, compile=True, **settings)
    assert case.epoch(images=torch.randn(images, 3, 8, 8)) == 2
    assert case.compiler.asked[0].get("mode") == mode
    assert case.compiler.asked[0]["dynamic"] is False


def test_no_cuda_graphs_on_a_cpu(monkeypatch):
    case = Case(monkeypatch, compile=True)
    assert case.epoch() == 2
    assert "mode" not in case.compiler.asked[0]


def test_true_compiles_at_once_and_false_never(monkeypatch):
    case = Case(monkeypatch, compile=True)
    assert case.epoch(left=1) == 2
    assert case.rehearsals == WARMUP_STEPS
    assert case.epoch(left=1) == 2
    assert case.rehearsals == 0
    assert Case(monkeypatch, GPU, compile=False).epoch() == 0


def test_kd_is_compiled_and_what_reads_maps_is_not(monkeypatch):
    assert Case(monkeypatch, compile=True, method=KD()).epoch() == 2
    reads = Case(monkeypatch, compile=True, method=AT())
    assert reads.epoch() == 0
    assert "not compiled" in reads.observer.notes[0]
    twice = Case(monkeypatch, compile=True, method=KD(), optimizer="dot")  # backward twice in a step
    assert twice.epoch() == 0
    assert "not compiled" in twice.observer.notes[0]


def test_smaller_batches_evaluation_and_no_grad_take_the_plain_way(monkeypatch):
    case = Case(monkeypatch, compile=True)
    student, whole = case.distiller.student, torch.randn(6, 3, 8, 8)
    with case.compiling.epoch(1, 1):
        case.compiling.prepare(whole)
        before = case.compiler.calls
        student(whole[:5])
        with torch.no_grad():
            student(whole)
        student.eval()(whole)
        assert case.compiler.calls == before
        student.train()(whole)
        assert case.compiler.calls == before + 1


def test_rehearsing_leaves_no_trace(monkeypatch):
    case = Case(monkeypatch, compile=True)
    before, random = copy.deepcopy(case.distiller.student.state_dict()), torch.get_rng_state()
    with case.compiling.epoch(1, 1):
        case.compiling.prepare(torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert case.compiler.calls == WARMUP_STEPS
    torch.testing.assert_close(case.distiller.student.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in case.distiller.student.parameters())


@pytest.mark.parametrize("error", [RuntimeError("no C++ compiler\nand much more"), ValueError(""), MemoryError()])
def test_a_compiler_that_fails_is_said_once_and_training_goes_on(monkeypatch, error):
    case = Case(monkeypatch, compile=True, compiler=Compiler(error))
    assert case.epoch() == 0
    assert case.epoch() == 0
    assert len(case.observer.notes) == 1
    assert "not compiled" in case.observer.notes[0]
    assert "much more" not in case.observer.notes[0]


def test_an_error_in_the_epoch_leaves_the_student_as_it_was(monkeypatch):
    case = Case(monkeypatch, compile=True)

    def fail():
        with case.compiling.epoch(1, 1):
            case.compiling.prepare(torch.randn(6, 3, 8, 8))
            raise UsageError("stop")

    with pytest.raises(UsageError):
        fail()
    assert "forward" not in vars(case.distiller.student)


class Numbers:
    """Batches of 4, 4 and 2 images."""

    count, steps = 10, 3

    def names_at(self, number, step):
        return ["a", "b"]

    def sizes_of(self, number):
        return [4, 4, 2]

    def epoch(self, number=0, step=0):
        generator = torch.Generator().manual_seed(number)
        for size in (4, 4, 2)[step:]:
            yield Batch(torch.randn(size, 3, 8, 8, generator=generator), torch.arange(size) % 3)


def train(folder, **settings):
    torch.manual_seed(0)
    distiller = Distiller(network(), network(), KD())
    settings = TrainingSettings(epochs=2, lr=0.05, checkpoint_seconds=0, **settings)
    training = Trainer(
        distiller, Numbers(), Numbers(), settings, CPU, folder=folder, observer=SilentObserver(), classes=3, test=None
    )
    training.run()
    return distiller


def test_compiled_training_is_saved_as_plain_training_is(tmp_path, monkeypatch):
    """Torch's own compiler, with kernels left as they are: it must come to the same bits, under the same names."""
    torch.compiler.reset()
    compiled = []
    defaults = dict(StudentCompiler.__init__.__kwdefaults__)

    def compile(forward, **options):
        compiled.append(options)
        return torch.compile(forward, backend="aot_eager", dynamic=options["dynamic"])

    plain = train(tmp_path / "plain", compile=False)
    monkeypatch.setattr(StudentCompiler.__init__, "__kwdefaults__", {**defaults, "compile": compile})
    other = train(tmp_path / "compiled", compile=True)
    assert len(compiled) == 1
    assert list(other.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(other.state_dict(), plain.state_dict(), rtol=0, atol=0)
    for name in ("last.checkpoint",):
        (kept, _), (expected, _) = (
            load_checkpoint(tmp_path / each / "checkpoints" / name) for each in ("compiled", "plain")
        )
        torch.testing.assert_close(kept, expected, rtol=0, atol=0)
    copied = copy.deepcopy(other.student).eval()
    images = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(copied(images), other.student.eval()(images), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_compiles_and_replays():
    notes = Listening()
    distiller = Distiller(network(), None, Supervised()).cuda()
    settings = TrainingSettings(compile=True)
    optimizer = create_optimizer(distiller.trained_parameters(), settings)
    compiling = StudentCompiler(distiller, optimizer, settings, GPU, notes)
    images, labels = torch.randn(8, 3, 8, 8, device="cuda"), torch.arange(8, device="cuda") % 3
    with compiling.epoch(5, 5):
        compiling.prepare(images)
        for _ in range(5):
            with GPU.autocast():
                loss = distiller(images, labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert "compiled with CUDA graphs" in notes.notes[0]
    assert bool(loss.isfinite())
