import resource
from pathlib import Path

import pytest
import torch
from timm.layers import BatchNormAct2d, SyncBatchNormAct
from torch import nn

from potstill.distillation.distiller import Distiller
from potstill.distributed.group import ProcessGroup
from potstill.errors import StorageError, UsageError
from potstill.methods import create_method
from potstill.methods.kd import KD
from potstill.methods.supervised import Supervised
from potstill.training import devices
from potstill.training.autotune import create_timed_step
from potstill.training.devices import Compute, create_compute, has_static_graph, idle_gpus, synced_batch_norm
from potstill.training.settings import TrainingSettings

FOUR = ProcessGroup(rank=1, count=4, local_rank=1, local_count=4)


def test_unknown_devices_are_refused():
    with pytest.raises(UsageError, match="'abacus' cannot be used"):
        create_compute(TrainingSettings(device="abacus"))


class _TooLarge(nn.Linear):
    """A network for which a device has no room."""

    def __init__(self, error):
        super().__init__(999, 1000, bias=True)  # 4 MB
        self.error, self.moves = error, []

    def to(self, device):
        self.moves.append(str(device))
        if device != "cpu":
            raise self.error


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_a_network_without_room_on_its_device_is_named_with_its_bytes(error):
    network = _TooLarge(error)
    compute = Compute(torch.device("meta"), bf16=False, channels_last=False)
    with pytest.raises(
        StorageError, match=r"teacher: its weights take 4\.00 MB, too much for the memory of meta"
    ) as found:
        compute.place(network, "teacher")
    assert "--device cpu" in str(found.value)
    assert "--teacher answers.parquet" in str(found.value)
    assert network.moves == ["meta", "cpu"]  # what was moved is freed


def test_other_errors_of_moving_a_network_stay(monkeypatch):
    with pytest.raises(RuntimeError, match="no kernel"):
        Compute(torch.device("meta"), bf16=False, channels_last=False).place(_TooLarge(RuntimeError("no kernel")), "a")


@pytest.mark.parametrize(
    ("layer", "kept"),
    [
        (nn.Conv2d(7, 12, 1, stride=2), False),
        (nn.Conv2d(7, 12, 1, stride=(2, 1)), False),
        (nn.Conv2d(1, 12, 1, stride=2), True),
        (nn.Conv2d(16, 32, 1, stride=2), True),
        (nn.Conv2d(7, 12, 1), True),
        (nn.Conv2d(7, 12, 3, stride=2), True),
    ],
)
def test_layers_whose_gradients_would_be_written_out_of_bounds_are_trained_without_channels_last(layer, kept):
    network = nn.Sequential(nn.Conv2d(3, layer.in_channels, 3), layer)
    compute = create_compute(TrainingSettings(device="cpu"))
    assert compute.channels_last
    assert compute.for_training(network).channels_last == kept
    assert Compute(torch.device("cuda"), bf16=False, channels_last=True).for_training(network).channels_last


@pytest.mark.own_process
def test_a_step_on_such_a_layer_does_not_end_the_process():
    network = nn.Sequential(
        nn.Conv2d(3, 7, 3, padding=1), nn.Conv2d(7, 12, 1, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    step = create_timed_step(network, 32, 16, create_compute(TrainingSettings(device="cpu")))
    for _ in range(60):
        step()


def test_memory_of_freed_tensors_is_used_again():
    create_compute(TrainingSettings(device="cpu"))
    if not devices.keep_freed_memory():
        pytest.skip("the C library is not glibc")

    def step() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(1 << 22) for _ in range(4)]  # 16 MiB each, 4,096 pages
        assert len(tensors) == 4
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    # The first ones may find free memory in pieces that are too small.
    assert min(step() for _ in range(5)) < 2000


def test_memory_of_freed_tensors_is_returned():
    if not devices.keep_freed_memory():
        pytest.skip("the C library is not glibc")

    def pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    tensors = [torch.ones(1 << 22) for _ in range(16)]  # 256 MiB
    full = pages()
    tensors.clear()
    devices.return_freed_memory()
    assert full - pages() > (128 << 20) // resource.getpagesize()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_missing_gpu_is_refused():
    with pytest.raises(UsageError, match="'cuda' cannot be used"):
        create_compute(TrainingSettings(device="cuda"))


def test_precision_is_what_was_asked_for():
    assert create_compute(TrainingSettings(device="cpu", precision="bf16")).bf16
    compute = create_compute(TrainingSettings(device="cpu", precision="float32"))
    with compute.autocast():
        assert (torch.zeros(2, 2) @ torch.zeros(2, 2)).dtype == torch.float32
    with create_compute(TrainingSettings(device="cpu", precision="bf16")).autocast():
        assert (torch.zeros(2, 2) @ torch.zeros(2, 2)).dtype == torch.bfloat16


def test_channels_last_is_the_layout_unless_asked_otherwise():
    for asked, layout in (("auto", torch.channels_last), (True, torch.channels_last), (False, torch.contiguous_format)):
        assert create_compute(TrainingSettings(device="cpu", channels_last=asked)).memory_format == layout


def test_words():
    assert str(Compute(torch.device("cpu"), bf16=True, channels_last=True)).endswith(", bf16")
    assert str(Compute(torch.device("cuda:1"), bf16=False, channels_last=True)) == "cuda:1, float32"


@pytest.fixture
def fake_cuda(monkeypatch):
    """CUDA devices of a compute capability, and torch's global switches restored afterwards."""

    def install(capability, count=1):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        supported = capability >= (8, 0)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: supported)

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    yield install
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.benchmark = before[1]


@pytest.mark.parametrize(
    ("capability", "precision"),
    [((6, 1), "float32"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")],
)
def test_a_gpu_trains_in_the_half_precision_that_its_tensor_cores_have(fake_cuda, capability, precision):
    fake_cuda(capability)
    compute = create_compute(TrainingSettings())
    assert (str(compute.device), compute.precision) == ("cuda", precision)
    dtypes = {"float32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    assert compute.teacher_dtype == dtypes[precision]
    if precision == "fp16":  # whose loss has to be scaled, which dot cannot
        assert create_compute(TrainingSettings(optimizer="DOT")).precision == "float32"


def test_on_cuda_float32_uses_tensor_cores_and_cudnn_times_its_algorithms(fake_cuda):
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.benchmark = False
    create_compute(TrainingSettings(device="cpu"))
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == ("highest", False)
    fake_cuda((8, 0))
    create_compute(TrainingSettings(precision="float32"))
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == ("high", True)


@pytest.mark.parametrize("name", ["dot", "DOT"])  # names of optimizers ignore case
def test_fp16_and_dot_are_refused(name):
    with pytest.raises(UsageError, match="dot keeps two gradients"):
        create_compute(TrainingSettings(device="cpu", precision="fp16", optimizer=name))


def test_one_gpu_for_several_processes_is_refused():
    with pytest.raises(UsageError, match="'cuda:1' is one GPU, and each of the 4 processes uses another"):
        create_compute(TrainingSettings(device="cuda:1"), FOUR)


def test_idle_gpus_are_said(fake_cuda):
    fake_cuda((8, 0), count=4)
    one = create_compute(TrainingSettings())
    assert idle_gpus(one) == "1 of the 4 GPUs of this machine is used; --gpus all uses all of them"
    two = create_compute(TrainingSettings(), ProcessGroup(0, 2, 0, 2))
    assert idle_gpus(two).startswith("2 of the 4 GPUs of this machine are used")
    assert idle_gpus(create_compute(TrainingSettings(), FOUR)) == ""
    assert idle_gpus(create_compute(TrainingSettings(device="cpu"))) == ""
    fake_cuda((8, 0), count=1)  # each of four sees its own
    assert idle_gpus(create_compute(TrainingSettings(), FOUR)) == ""


def test_batch_norm_over_all_processes_needs_gpus():
    settings = TrainingSettings(device="cpu", sync_batch_norm=True)
    assert create_compute(settings).device.type == "cpu"  # one process has all images
    with pytest.raises(UsageError, match="sync_batch_norm needs GPUs"):
        create_compute(settings, FOUR)


def test_batch_norm_over_all_processes_leaves_the_network_as_it_was():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), BatchNormAct2d(4))
    before, images = {**network.state_dict()}, torch.randn(2, 3, 4, 4)
    expected = network.eval()(images)
    with synced_batch_norm(network, FOUR, True):
        assert [type(layer) for layer in network[1:]] == [nn.SyncBatchNorm, SyncBatchNormAct]
        assert network.state_dict().keys() == before.keys()
    assert [type(layer) for layer in network[1:]] == [nn.BatchNorm2d, BatchNormAct2d]
    assert torch.equal(network(images), expected)
    for processes, enabled in ((FOUR, False), (ProcessGroup(), True)):
        with synced_batch_norm(network, processes, enabled):
            assert type(network[1]) is nn.BatchNorm2d


def test_the_graph_is_static_unless_parameters_come_and_go():
    def net():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

    kd = Distiller(net(), net(), KD())
    assert has_static_graph(kd, TrainingSettings())
    assert has_static_graph(Distiller(net(), None, Supervised()), TrainingSettings())
    assert not has_static_graph(kd, TrainingSettings(freeze=1))
    assert not has_static_graph(kd, TrainingSettings(gradient_accumulation_steps=2))
    adapters = Distiller(net(), net(), create_method("cc", dim=4), example=torch.randn(4, 3, 8, 8))
    assert not has_static_graph(adapters, TrainingSettings())


def test_memories_are_shared_at_each_update_and_statistics_at_the_end_of_an_epoch():
    method = Supervised()
    method.register_buffer("memory", torch.zeros(3))
    method.adapter = nn.BatchNorm1d(2)
    student = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
    sent = []

    class Recording(ProcessGroup):
        def share_tensors(self, tensors):
            sent.append(len(tensors))

    ddp = devices.DistributedDistiller(Distiller(student, None, method), Recording())
    ddp.sync_method_buffers()
    ddp.sync_buffers()
    ddp.sync_buffers(nn.BatchNorm1d(4))
    assert sent == [1, 7, 10]  # the memory; with three buffers for each BatchNorm
