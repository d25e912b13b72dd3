"""Saving and loading gives the same function; whatever was changed on disk is noticed before it is parsed."""

import dataclasses
import json
import random

import pytest
import torch
from torch import nn

from potstill.errors import ArtifactError
from potstill.features.student_surgery import rebuild_student
from potstill.input_spec import InputSpec
from potstill.io import sha256_hex, write_checksummed_json
from potstill.models import model_file
from potstill.models.factory import create_model
from potstill.models.model_file import Classifier, load_model, save_model
from potstill.models.pruning import cut_channels
from potstill.models.registry import input_spec

SPEC = {"size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
NAMES = ("naïve café", "鸟", 'a,b\n"c"', "<script>", "\udcff.jpg")


def classifier(name="cifar/resnet8", size=32, names=NAMES, **facts):
    module = create_model(name, len(names), size=size)
    module(torch.randn(4, 3, size, size))  # moves BatchNorm's statistics away from where they start
    return Classifier(module.eval(), name, names, input_spec(name, size), facts)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(classifier(epochs=3, lr=1e-4, nested={"best": None}), folder)
    return folder


@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet18", 40), ("vit_tiny_patch16_224", 64), ("cifar/wrn_16_1", 32), ("torchvision/squeezenet1_1", 48)],
)
def test_loaded_equals_saved_bit_by_bit(tmp_path, name, size):
    before = classifier(name, size, epochs=3)
    save_model(before, tmp_path)
    random_state = torch.get_rng_state()
    after = load_model(tmp_path)
    assert torch.equal(torch.get_rng_state(), random_state)
    images = torch.randn(3, 3, size, size)
    with torch.no_grad():
        assert torch.equal(after.module(images), before.module(images))
    assert (after.architecture, after.class_names, after.input, after.facts) == (
        before.architecture,
        NAMES,
        before.input,
        {"epochs": 3},
    )
    assert not after.module.training
    expected = before.module.state_dict()
    assert expected.keys() == after.module.state_dict().keys()
    assert all(torch.equal(value, expected[key]) for key, value in after.module.state_dict().items())


def test_batch_counters_are_kept(saved):
    assert load_model(saved).module.stem[1].num_batches_tracked == 1


@pytest.mark.parametrize("name", ["", "model.json", "model.safetensors"])
def test_a_folder_or_either_file_may_be_named(saved, name):
    assert load_model(saved / name).class_names == NAMES


def test_json_says_what_it_promises(saved):
    body = json.loads((saved / "model.json").read_text())
    assert body["schema"] == 1
    assert body["sha256"] == sha256_hex((saved / "model.safetensors").read_bytes())
    assert (body["architecture"], body["class_names"], body["input"]["size"]) == ("cifar/resnet8", list(NAMES), 32)
    assert body["facts"] == {"epochs": 3, "lr": 1e-4, "nested": {"best": None}}


def test_every_flipped_bit_is_noticed(saved, tmp_path):
    draw = random.Random(0)
    originals = {name: (saved / name).read_bytes() for name in ("model.json", "model.safetensors")}
    for name, count in {"model.json": 300, "model.safetensors": 30}.items():
        for _ in range(count):
            data = bytearray(originals[name])
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            for file, content in originals.items():
                (tmp_path / file).write_bytes(data if file == name else content)
            with pytest.raises(ArtifactError, match=f"{name} is damaged"):
                load_model(tmp_path)


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
@pytest.mark.parametrize("keep", [0, 1, 500, -1])
def test_truncated_and_empty_files_are_noticed(saved, tmp_path, name, keep):
    for file in ("model.json", "model.safetensors"):
        data = (saved / file).read_bytes()
        (tmp_path / file).write_bytes(data[:keep] if file == name else data)
    with pytest.raises(ArtifactError, match=f"{name} is damaged"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_missing_files_are_named(saved, tmp_path, name):
    other = {"model.json": "model.safetensors", "model.safetensors": "model.json"}[name]
    (tmp_path / other).write_bytes((saved / other).read_bytes())
    with pytest.raises(ArtifactError, match=name):
        load_model(tmp_path)
    with pytest.raises(ArtifactError, match="no model at"):
        load_model(tmp_path / "nothing")


def forge(folder, **changes):
    """Change entries and make the checksum fit again, as somebody could by intent."""
    body = json.loads((folder / "model.json").read_text())
    del body["checksum"]
    body = {key: value for key, value in (body | changes).items() if value is not None}
    write_checksummed_json(folder / "model.json", body)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "schema 2"),
        ({"architecture": "cifar/resnet14"}, "missing: .*stage1.1"),
        ({"architecture": "cifar/wrn_16_1"}, "not in the network"),
        ({"architecture": "no_such_network"}, "no model 'no_such_network'"),
        ({"architecture": 7}, "architecture"),
        ({"class_names": ["a", "b", "c", "d", "a"]}, "given twice"),
        ({"class_names": ["a", 1, "c", "d", "e"]}, "class_names.1"),
        ({"class_names": "abcde"}, "class_names"),
        ({"class_names": ["a", "b"]}, "another number of classes"),
        ({"class_names": None}, "class_names"),
        ({"input": {"size": 32}}, "mean"),
        ({"input": "small"}, "input"),
        ({"input": SPEC | {"size": 10**9}}, "input.size"),
        ({"input": SPEC | {"size": 32.5}}, "input.size"),
        ({"input": SPEC | {"std": [0.2, 0.0, 0.2]}}, "input.std.1"),
        ({"input": SPEC | {"mean": [0.5, 0.5]}}, "input.mean"),
        ({"input": SPEC | {"mean": [0.5, "0.5", 0.5]}}, "input.mean.1"),
        ({"input": SPEC | {"crop_share": 0}}, "input.crop_share"),
        ({"input": SPEC | {"other": 1}}, "input.other"),
        ({"sha256": None}, "sha256"),
        ({"sha256": "../../etc/passwd"}, "sha256"),
        ({"facts": [1]}, "facts"),
        ({"remodelled": 7}, "remodelled"),
        ({"remodelled": {"name": "merged_stage", "stage": "stage2", "channels": 32}}, "missing: network"),
        ({"pruned": {"stem.0": 4}}, "pruned"),
        ({"pruned": {"stem.0": {"out_channels": "4"}}}, "pruned"),
        ({"pruned": {"stem.0": {"out_channels": 4}}}, "model.safetensors"),
        ({"pruned": {"stem.0": {"out_channels": 10**9}}}, "from 1 to"),
        ({"pruned": {"none": {"out_channels": 4}}}, "none"),
        ({"facts": {"epochs": 4}}, None),
    ],
)
def test_a_forged_description_never_gives_a_wrong_network(tmp_path, changes, message):
    save_model(classifier(), tmp_path)
    forge(tmp_path, **changes)
    if message is None:
        assert load_model(tmp_path).facts == {"epochs": 4}
        return
    with pytest.raises(ArtifactError, match=message):
        load_model(tmp_path)


def test_weights_that_are_no_safetensors_although_their_hash_fits(tmp_path):
    save_model(classifier(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04 not tensors")
    forge(tmp_path, sha256=sha256_hex(b"\x80\x04 not tensors"))
    with pytest.raises(ArtifactError, match="cannot be used"):
        load_model(tmp_path)


class Tied(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.second = nn.Linear(12, 12)
        self.second.weight = self.first.weight
        self.head = nn.Linear(12, classes)

    def forward(self, images):
        x = images.mean(dim=1).flatten(1)[:, :12]
        return self.head(self.second(self.first(x).relu()))


def test_tied_weights_stay_tied(tmp_path, monkeypatch):
    monkeypatch.setattr(model_file, "build_model", lambda name, classes, size: Tied(classes))
    before = Classifier(Tied(2), "tied", ("a", "b"), InputSpec(8))
    save_model(before, tmp_path)
    after = load_model(tmp_path).module
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(after(images), before.module(images))
    assert after.second.weight is after.first.weight


def test_channels_last_weights_are_saved(tmp_path):
    before = classifier()
    before.module.to(memory_format=torch.channels_last)
    save_model(before, tmp_path)
    loaded = load_model(tmp_path).module.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in before.module.state_dict().items())


def test_predict_gives_probabilities_and_keeps_the_mode():
    subject = classifier()
    subject.module.train()
    images = torch.randn(5, 3, 32, 32)
    probabilities = subject.predict(images)
    assert subject.module.training
    assert subject.module.stem[1].num_batches_tracked == 1  # as before: predicted in eval mode
    assert probabilities.dtype == torch.float32
    assert not probabilities.requires_grad
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(5))
    with torch.no_grad():
        logits = subject.module.eval()(images).double()
    torch.testing.assert_close(probabilities.double(), logits.exp() / logits.exp().sum(1, keepdim=True))


def test_a_remodelled_network_is_built_again_without_its_method(tmp_path):
    before = classifier()
    facts = {"name": "merged_stage", "stage": "stage2", "channels": 32}
    before.module = rebuild_student(before.module, facts).eval()
    before.remodelled = before.module.facts
    save_model(before, tmp_path)
    after = load_model(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(after.module(images), before.module(images))
    assert after.remodelled == before.remodelled
    assert json.loads((tmp_path / "model.json").read_text())["remodelled"]["stage"] == "stage2"


def test_a_pruned_network_is_built_again(tmp_path):
    before = classifier()
    before.pruned = {
        "stage1.0.conv1": {"out_channels": 5},
        "stage1.0.bn1": {"num_features": 5},
        "stage1.0.conv2": {"in_channels": 5},
    }
    before.module = cut_channels(before.module, before.pruned).eval()
    save_model(before, tmp_path)
    after = load_model(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(after.module(images), before.module(images))
    assert after.pruned == before.pruned
    given = load_model(tmp_path, module=classifier().module)
    assert torch.equal(given.module(images), before.module(images))


def test_facts_of_no_remodelled_network_are_refused(tmp_path):
    before = classifier()
    before.remodelled = {"name": "no such thing"}
    save_model(before, tmp_path)
    with pytest.raises(ArtifactError, match="no remodelled network 'no such thing'"):
        load_model(tmp_path)


def test_a_plain_network_says_nothing_of_remodelling(saved):
    assert "remodelled" not in json.loads((saved / "model.json").read_text())
    assert load_model(saved).remodelled is None


def test_the_resize_mode_is_kept(tmp_path) -> None:
    before = classifier()
    before.input = dataclasses.replace(before.input, resize_mode="pad")
    save_model(before, tmp_path)
    assert load_model(tmp_path).input.resize_mode == "pad"

    body = json.loads((tmp_path / "model.json").read_text())
    write_checksummed_json(tmp_path / "model.json", {**body, "input": body["input"] | {"resize_mode": "fold"}})
    with pytest.raises(ArtifactError, match="'crop', 'pad' or 'stretch'"):
        load_model(tmp_path)
