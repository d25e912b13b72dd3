"""Other repositories' checkpoints: the network is found, and it computes what theirs computes."""

import argparse
import json
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from potstill.errors import ArtifactError, UsageError
from potstill.models.factory import create_model, load_weights
from potstill.models.foreign_checkpoints import identify_network
from potstill.models.state_dict import read_checkpoint


class Block(nn.Module):
    """Of a ResNet for CIFAR, with its layers named as a repository names them."""

    def __init__(self, inputs, outputs, stride, shortcut):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.name = shortcut if stride != 1 or inputs != outputs else None
        if self.name and self.name != "A":
            layers = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            setattr(self, shortcut, layers)

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.name == "A":
            quarter = y.shape[1] // 4
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, quarter, quarter))
        elif self.name:
            x = getattr(self, self.name)(x)
        return (x + y).relu()


class Theirs(nn.Module):
    def __init__(self, widths, blocks, shortcut, head, classes=10):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0])
        for at, (inputs, outputs) in enumerate(pairwise(widths)):
            rows = [Block(inputs if i == 0 else outputs, outputs, 2 if at and i == 0 else 1, shortcut)
                    for i in range(blocks)]  # fmt: skip
            setattr(self, f"layer{at + 1}", nn.Sequential(*rows))
        self.stages, self.head = len(widths) - 1, head
        setattr(self, head, nn.Linear(widths[-1], classes))

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        for at in range(self.stages):
            x = getattr(self, f"layer{at + 1}")(x)
        return getattr(self, self.head)(x.mean(dim=(2, 3)))


class WideBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.convShortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        active = self.bn1(x).relu()
        y = self.conv2(self.bn2(self.conv1(active)).relu())
        return y + (x if self.convShortcut is None else self.convShortcut(active))


class WideGroup(nn.Module):
    def __init__(self, inputs, outputs, blocks, stride):
        super().__init__()
        rows = [WideBlock(inputs if i == 0 else outputs, outputs, stride if i == 0 else 1) for i in range(blocks)]
        self.layer = nn.Sequential(*rows)

    def forward(self, x):
        return self.layer(x)


class Wide(nn.Module):
    def __init__(self, blocks, width, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.block1 = WideGroup(16, 16 * width, blocks, 1)
        self.block2 = WideGroup(16 * width, 32 * width, blocks, 2)
        self.block3 = WideGroup(32 * width, 64 * width, blocks, 2)
        self.bn1, self.fc = nn.BatchNorm2d(64 * width), nn.Linear(64 * width, classes)

    def forward(self, x):
        x = self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))).relu()
        return self.fc(x.mean(dim=(2, 3)))


class Plain(nn.Module):
    """VGG-8 as RepDistiller names it."""

    def __init__(self, classes):
        super().__init__()
        channels = (3, 64, 128, 256, 512, 512)
        for at in range(5):
            layers = nn.Sequential(nn.Conv2d(channels[at], channels[at + 1], 3, 1, 1), nn.BatchNorm2d(channels[at + 1]))
            setattr(self, f"block{at}", layers)
        self.classifier = nn.Linear(512, classes)

    def forward(self, x):
        for at in range(5):
            x = getattr(self, f"block{at}")(x).relu()
            x = F.max_pool2d(x, 2) if at < 3 else x
        return self.classifier(x.mean(dim=(2, 3)))


CIFAR10, CIFAR100 = (0.4914, 0.4822, 0.4465), (0.5071, 0.4867, 0.4408)
SMALL = (16, 16, 32, 64)
REPOSITORIES = {
    "akamaster": (lambda: Theirs(SMALL, 3, "A", "linear"), "cifar/resnet20_a", None),
    "akamaster, option B": (lambda: Theirs(SMALL, 1, "shortcut", "linear"), "cifar/resnet8", None),
    "RepDistiller": (lambda: Theirs((32, 64, 128, 256), 1, "downsample", "fc", 100), "cifar/resnet8x4", CIFAR100),
    "chenyaofo": (lambda: Theirs(SMALL, 3, "downsample", "fc"), "cifar/resnet20", CIFAR10),
    "kuangliu": (lambda: Theirs((64, 64, 128, 256, 512), 2, "shortcut", "linear"), "cifar/resnet18", CIFAR10),
    "wide": (lambda: Wide(1, 2, 100), "cifar/wrn_10_2", CIFAR100),
    "vgg": (lambda: Plain(100), "cifar/vgg8", CIFAR100),
}


def randomised(module: nn.Module) -> nn.Module:
    """With statistics that are not those of a new BatchNorm."""
    generator = torch.Generator().manual_seed(1)
    for name, value in module.state_dict().items():
        if value.is_floating_point() and value.ndim == 1:
            value.copy_(torch.rand(value.shape, generator=generator) + (0.5 if "var" in name else 0))
    return module.eval()


def outputs(module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(torch.linspace(-1, 1, 2 * 3 * 32 * 32).sin().mul(3).reshape(2, 3, 32, 32))


@pytest.mark.parametrize("repository", REPOSITORIES)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_networks_of_known_repositories(tmp_path, repository, suffix):
    build, name, mean = REPOSITORIES[repository]
    theirs, path = randomised(build()), tmp_path / f"t{suffix}"
    if suffix == ".pth":
        torch.save({"net": {f"module.{key}": value for key, value in theirs.state_dict().items()}}, path)
    else:  # in alphabetical order
        safetensors.torch.save_file(theirs.state_dict(), path)
    assert identify_network(path) == name
    loaded = load_weights(name, str(path), 100 if mean == CIFAR100 else 10, size=32)
    assert torch.allclose(outputs(loaded.module.eval()), outputs(theirs), atol=1e-4)
    assert loaded.normalisation is None if mean is None else loaded.normalisation[0] == mean
    assert any("layer names of" in note for note in loaded.notes)


def test_unknown_names_are_assigned_by_order_and_shape(tmp_path):
    other = randomised(Theirs(SMALL, 3, "downsample", "fc"))
    state = {f"w{at}.{key.rpartition('.')[2]}": value for at, (key, value) in enumerate(other.state_dict().items())}
    torch.save(state, tmp_path / "t.pth")
    assert identify_network(tmp_path / "t.pth") == "cifar/resnet20"
    loaded = load_weights("cifar/resnet20", str(tmp_path / "t.pth"), 10, size=32)
    assert torch.allclose(outputs(loaded.module.eval()), outputs(other), atol=1e-4)
    assert "by order and shape" in loaded.notes[0]
    safetensors.torch.save_file(state, tmp_path / "t.safetensors")  # whose order is lost
    with pytest.raises(ArtifactError, match="does not contain the weights of this network"):
        load_weights("cifar/resnet20", str(tmp_path / "t.safetensors"), 10, size=32)


def weights(value: float, prefix: str = "") -> dict[str, torch.Tensor]:
    return {f"{prefix}fc.weight": torch.full((3, 4), value), f"{prefix}fc.bias": torch.full((3,), value)}


@pytest.mark.parametrize(
    ("content", "taken", "left"),
    [
        ({"state_dict": weights(0), "state_dict_ema": weights(1), "arch": "x"}, "state_dict_ema", ("state_dict",)),
        ({"model": weights(0), "model_ema": {"n_averaged": torch.tensor(3), **weights(1, "module.")}},
         "model_ema", ("model",)),
        ({"model": weights(1), "ema": {"fc.weight": torch.zeros(3, 4)}}, "model", ("ema",)),
        ({"net": weights(1), "acc": 93.0, "epoch": 3}, "net", ()),
        ({"model_state_dict": weights(1), "optimizer_state_dict": {"state": {}}}, "model_state_dict", ()),
        ({"state_dict": weights(1, "model."), "pytorch-lightning_version": "2.6", "hyper_parameters": {}},
         "state_dict", ()),
        ({"state_dict": weights(1, "net.module._orig_mod.")}, "state_dict", ()),
        ({"best_weights": weights(1), "epoch": 1}, "best_weights", ()),
        ({**weights(1), "fc.total_ops": torch.zeros(1)}, "", ()),
    ],
)  # fmt: skip
def test_which_weights_of_a_file_are_taken(tmp_path, content, taken, left):
    torch.save(content, tmp_path / "t.pth")
    found = read_checkpoint(tmp_path / "t.pth")
    assert (found.taken_from, found.left) == (taken, left)
    assert all(torch.equal(found.tensors[key], value) for key, value in weights(1).items())
    assert found.tensors.keys() == weights(1).keys()
    assert len(found.notes) == bool(taken)
    assert all(key in found.notes[0] for key in left)


def test_several_sets_of_weights_are_no_choice_of_ours(tmp_path):
    torch.save({"generator": weights(0), "judge": weights(1)}, tmp_path / "t.pth")
    with pytest.raises(ArtifactError, match="several sets of weights: generator, judge") as error:
        read_checkpoint(tmp_path / "t.pth")
    assert 'checkpoint["generator"]' in str(error.value).replace("'", '"')


def test_a_prefix_may_be_the_networks_own(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 3)

    from potstill.models.foreign_checkpoints import convert

    torch.save(Wrapped().state_dict(), tmp_path / "t.pth")
    converted = convert(read_checkpoint(tmp_path / "t.pth"), "mine:Wrapped", Wrapped().state_dict())
    assert set(converted.state) == {"net.weight", "net.bias"}


@pytest.mark.parametrize(
    ("beside", "name"),
    [
        ({"arch": "resnet18"}, "timm/resnet18"),
        ({"args": argparse.Namespace(model="resnet18", lr=0.1), "epoch": np.int64(3)}, "timm/resnet18"),
        ({}, "torchvision/convnext_tiny"),
    ],
)
def test_networks_that_training_scripts_name(tmp_path, beside, name):
    import torchvision

    with torch.device("meta"):
        state = getattr(torchvision.models, name.split("/")[1])(num_classes=7).state_dict()
    zeros = {key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in state.items()}
    torch.save({"state_dict": zeros, **beside}, tmp_path / "best.pth")
    assert identify_network(tmp_path / "best.pth") == name


def test_a_file_may_be_named_after_its_network(tmp_path):
    network = create_model("timm/test_resnet", 5, size=64)
    torch.save(network.state_dict(), tmp_path / "test_resnet-0123abcd.pth")
    assert identify_network(tmp_path / "test_resnet-0123abcd.pth") == "timm/test_resnet"


def test_hub_folders_say_network_normalisation_and_classes(tmp_path):
    network = create_model("timm/test_resnet", 3, size=64)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "model.safetensors")
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.2, 0.1]
    config = {"architecture": "test_resnet", "num_classes": 3, "label_names": ["a", "b", "c"],
              "pretrained_cfg": {"mean": mean, "std": std}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        found = read_checkpoint(path)
        assert found.class_names == ("a", "b", "c")
        assert identify_network(path) == "timm/test_resnet"
        loaded = load_weights("timm/test_resnet", str(path), 3, size=64)
        assert loaded.normalisation == (tuple(mean), tuple(std))
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ArtifactError, match="describes no network"):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"1": "b", "0": "a", "2": "c"}}))
    assert read_checkpoint(tmp_path).class_names == ("a", "b", "c")


def test_weights_of_no_known_network_are_described(tmp_path):
    torch.save(weights(1), tmp_path / "t.pth")
    with pytest.raises(UsageError, match=r"ARCHITECTURE@.*\n.*2 tensors of 15 values.*fc.weight \(3, 4\)"):
        identify_network(tmp_path / "t.pth")


def script_module(path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)


def exported(path: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), path)


def onnx_file(path: Path) -> None:
    path.write_bytes(b"\x08\x0a\x12\x07pytorch\x1a\x032.1" + bytes(50))


def arrays(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.zeros(2))


@pytest.mark.parametrize(
    ("write", "what", "line"),
    [
        (script_module, "TorchScript", "torch.jit.load"),
        (exported, "torch.export", "torch.export.load"),
        (onnx_file, "ONNX", "initializer"),
        (arrays, "NumPy arrays", "numpy.load"),
        (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(90)), "HDF5", "h5py"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid"), "Git LFS", "git lfs pull"),
        (lambda path: path.write_bytes(b"<!DOCTYPE html><html>"), "web page", ""),
        (lambda path: path.write_bytes(b"\x1f\x8b\x08" + bytes(60)), "gzip", "gunzip"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_read_is_recognised_with_the_lines_that_convert_it(tmp_path, write, what, line):
    write(tmp_path / "t.pt")
    with pytest.raises(ArtifactError, match=f"looks like .*{what}") as error:
        read_checkpoint(tmp_path / "t.pt")
    assert line in str(error.value)
    assert "FILE" not in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def test_the_public_resnet56_on_jpeg_images(tmp_path):
    """83 % of CIFAR-10's test images as JPEG files; on the first 100 of each class 84.1 %, on 25 84.8 % (here)."""
    from potstill.data.image_io import decode
    from potstill.data.transforms import preprocess
    from potstill.models.registry import input_spec

    shared = Path(__file__).parents[3] / "shared" / "data"
    file, images = shared / "checkpoints" / "cifar10-resnet56.th", shared / "cifar10.zip"
    if not file.is_file() or not images.is_file():
        pytest.skip(f"no public checkpoint and images at {shared}")
    name = identify_network(file)
    assert name == "cifar/resnet56_a"
    loaded = load_weights(name, str(file), 10, size=32)
    spec = input_spec(name, 32)
    right = total = 0
    with zipfile.ZipFile(images) as archive:
        every = sorted(each for each in archive.namelist() if each.startswith("test/") and each.endswith(".jpg"))
        classes = sorted({each.split("/")[1] for each in every})
        for label, one in enumerate(classes):
            batch = []
            for each in [each for each in every if f"/{one}/" in each][:25]:
                batch.append(preprocess(decode(Path(archive.extract(each, tmp_path))), spec))
            with torch.no_grad():
                right += int((loaded.module.eval()(torch.stack(batch)).argmax(dim=1) == label).sum())
            total += len(batch)
    assert total == 250
    assert 0.77 <= right / total <= 0.90
