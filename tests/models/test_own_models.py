"""Networks of code from outside: built by name, refused with one message, loaded again only where code is allowed."""

import sys
from importlib.metadata import EntryPoint

import pytest
import torch
from torch import nn

from potstill.code_references import allowed_code, permit_code
from potstill.errors import ArtifactError, UsageError
from potstill.input_spec import InputSpec
from potstill.models.factory import create_model, load_for_classes, load_weights
from potstill.models.families import own_models
from potstill.models.families.own_models import given_networks
from potstill.models.model_file import Classifier, load_model, save_model
from potstill.models.registry import input_spec, list_models

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4, num_classes)

    def forward(self, images):
        return self.head(self.body(images))

def fixed():
    torch.manual_seed(5)
    return Net(3)

ready = fixed()
number = 3

def broken(num_classes):
    raise RuntimeError("no disk")

def text(**settings):
    return "network"

class Maps(Net):
    def forward(self, images):
        return self.body[0](images)

class Picky(Net):
    def forward(self, images):
        raise ValueError("only 999 px")
"""


@pytest.fixture
def code(tmp_path):
    (tmp_path / "mine.py").write_text(CODE)
    return f"{tmp_path / 'mine.py'}:"


@pytest.mark.parametrize("name", ["Net", "fixed", "ready"])
def test_classes_functions_and_modules_are_networks(code, name):
    module = create_model(code + name, 3, size=16)
    assert module(torch.zeros(2, 3, 16, 16)).shape == (2, 3)


def test_the_random_state_decides_initial_weights(code):
    torch.manual_seed(1)
    first = create_model(code + "Net", 3, size=16)
    torch.manual_seed(1)
    assert torch.equal(create_model(code + "Net", 3, size=16).head.weight, first.head.weight)
    assert not torch.equal(create_model(code + "Net", 3, size=16).head.weight, first.head.weight)


def test_a_module_is_copied(code):
    first, second = (create_model(code + "ready", 3, size=16) for _ in range(2))
    assert torch.equal(first.head.weight, second.head.weight)
    assert first.head.weight is not second.head.weight


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("number", "is an object of type int; a network is an nn.Module, or a callable"),
        ("broken", r"broken\(num_classes=4\) raised RuntimeError: no disk"),
        ("text", r"text\(num_classes=4\) returned an object of type str"),
        ("fixed", r"no classifier of 4 classes: one image gives \(1, 3\) instead of \(1, 4\)\nIt has to return"),
        ("Maps", r"one image gives \(1, 4, 7, 7\) instead of \(1, 4\)"),
        ("Picky", r"cannot take images of 16 px \(only 999 px\)"),
        ("Nett", "has no 'Nett'; did you mean 'Net'"),
    ],
)
def test_what_is_no_classifier_gets_one_message(code, name, message):
    with pytest.raises(UsageError, match=message) as error:
        create_model(code + name, 4, size=16)
    assert len(str(error.value).splitlines()) <= 2


def test_weights_of_a_file_and_weights_that_the_code_gives(code, tmp_path):
    network = create_model(code + "Net", 3, size=16)
    torch.save({"model": network.state_dict()}, tmp_path / "w.pth")
    loaded = load_weights(code + "Net", str(tmp_path / "w.pth"), 3, size=16)
    assert torch.equal(loaded.module.head.weight, network.head.weight)
    own = load_weights(code + "fixed", "own", 3, size=16)
    assert torch.equal(own.module.head.weight, create_model(code + "fixed", 3, size=16).head.weight)
    with pytest.raises(UsageError, match="without published weights; name a file with its state dict, or 'own'"):
        load_weights(code + "Net", "pretrained", 3, size=16)
    with pytest.raises(UsageError, match="no weights 'own'"):
        load_weights("cifar/resnet8", "own", 3, size=16)


def test_outputs_of_a_network_of_fixed_classes_can_be_chosen_and_merged(code, tmp_path):
    images = torch.randn(2, 3, 16, 16)
    wanted = {"a": [2], "b": [0, 1]}
    loaded = load_for_classes(code + "ready", "own", wanted, ["a", "b"], size=16, key="teacher.classes")
    with torch.no_grad():
        every = create_model(code + "ready", 3, size=16).eval()(images).softmax(dim=1)
        found = loaded.module.eval()(images).softmax(dim=1)
    assert torch.allclose(found, torch.stack([every[:, 2], every[:, 0] + every[:, 1]], dim=1))
    chosen = load_for_classes(code + "ready", "own", ["x", "y", "z"], ["z", "x"], size=16, key="teacher.classes")
    with torch.no_grad():
        found = chosen.module.eval()(images).softmax(dim=1)
    expected = every[:, [2, 0]] / every[:, [2, 0]].sum(dim=1, keepdim=True)
    assert torch.allclose(found, expected)


def test_a_saved_model_runs_code_only_where_it_is_allowed(code, tmp_path, monkeypatch):
    module = create_model(code + "Net", 3, size=16).eval()
    save_model(Classifier(module, code + "Net", ("a", "b", "c"), InputSpec(16)), tmp_path / "m")
    (tmp_path / "mine.py").write_text(CODE + f"\nopen({str(tmp_path / 'canary')!r}, 'w').close()\n")
    with pytest.raises(ArtifactError, match=r"code would run on this machine.*\n.*--allow-code"):
        load_model(tmp_path / "m")
    assert not (tmp_path / "canary").exists()
    with allowed_code(False), pytest.raises(ArtifactError):
        load_model(tmp_path / "m")
    with allowed_code():
        loaded = load_model(tmp_path / "m")
    assert (tmp_path / "canary").exists()
    assert torch.equal(loaded.module.head.weight, module.head.weight)
    with pytest.raises(ArtifactError):
        load_model(tmp_path / "m")
    permit_code([code + "Net"])
    assert load_model(tmp_path / "m").architecture == code + "Net"


def test_a_saved_model_is_refused_where_its_code_computes_something_else(code, tmp_path):
    module = create_model(code + "Net", 3, size=16).train()
    save_model(Classifier(module, code + "Net", ("a", "b", "c"), InputSpec(16)), tmp_path / "m")
    assert module.training
    (tmp_path / "mine.py").write_text(CODE.replace("nn.ReLU()", "nn.ReLU(inplace=True)"))  # the same function
    with allowed_code():
        assert torch.equal(load_model(tmp_path / "m").module.head.weight, module.head.weight)
        (tmp_path / "mine.py").write_text(CODE.replace("nn.ReLU()", "nn.Sigmoid()"))
        with pytest.raises(ArtifactError, match=r"mine.py:Net computes other outputs than .* its code has changed"):
            load_model(tmp_path / "m")


def test_outputs_that_are_not_repeatable_or_finite_are_not_compared(tmp_path):
    class Noisy(Tiny):
        def forward(self, images):
            return super().forward(images) + torch.rand(2)

    for module in (Noisy(), Tiny()):
        if type(module) is Tiny:
            module.head.bias.data[0] = float("inf")
        save_model(Classifier(module, "python/student", ("a", "b"), InputSpec(8)), tmp_path / "m")
        assert load_model(tmp_path / "m", module=type(module)()).architecture == "python/student"


class Tiny(nn.Module):
    def __init__(self, num_classes=2):
        super().__init__()
        self.head = nn.Linear(3, num_classes)

    def forward(self, images):
        return self.head(images.mean(dim=(2, 3)))


def test_networks_given_from_python_are_known_within_the_block(tmp_path):
    module, spec = Tiny(), InputSpec(24, (0.1,) * 3, (0.2,) * 3)
    with given_networks({"python/teacher": (module, spec), "python/student": (Tiny, None)}):
        built = create_model("python/teacher", 2, size=24)
        assert built is not module
        assert torch.equal(built.head.weight, module.head.weight)
        assert create_model("python/student", 5, size=24).head.out_features == 5
        assert input_spec("python/teacher", 99) == spec
        save_model(Classifier(built, "python/teacher", ("a", "b"), spec), tmp_path / "m")
    with pytest.raises(UsageError, match="given from Python, and is known in that process only"):
        create_model("python/teacher", 2, size=24)
    with pytest.raises(ArtifactError, match="give it again"):
        load_model(tmp_path / "m")
    assert torch.equal(load_model(tmp_path / "m", module=Tiny()).module.head.weight, module.head.weight)
    with pytest.raises(ArtifactError, match="does not contain the weights"):
        load_model(tmp_path / "m", module=nn.Linear(2, 2))


def test_entry_points_of_installed_packages(tmp_path, monkeypatch):
    (tmp_path / "some_package.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    points = {
        "my-net": EntryPoint("my-net", "some_package:Net", own_models.ENTRY_POINTS),
        "my-gone": EntryPoint("my-gone", "some_package:Gone", own_models.ENTRY_POINTS),
    }
    monkeypatch.setattr(own_models, "_plugins", lambda: points)
    try:
        assert create_model("my-net", 6, size=16).head.out_features == 6
        assert "my-net" in list_models("my-")
        with pytest.raises(UsageError, match="'my-gone' of the installed package some_package cannot be loaded"):
            create_model("my-gone", 6, size=16)
    finally:
        sys.modules.pop("some_package", None)
