"""Which outputs of a published network a person's class names mean, and networks with those outputs."""

import pytest
import torch

from potstill.errors import ArtifactError, UsageError
from potstill.input_spec import InputSpec
from potstill.io import read_checksummed_json, write_checksummed_json
from potstill.models.class_names import CLASS_LISTS, OutputNames, class_list, find_outputs
from potstill.models.factory import create_model, load_for_classes
from potstill.models.model_file import Classifier, load_model, save_model

NAME = "cifar/resnet8"


@pytest.mark.parametrize(
    ("name", "count", "known"),
    [
        ("cifar10", 10, {3: "cat", 9: "truck"}),
        ("cifar100", 100, {0: "apple", 1: "aquarium_fish", 47: "maple_tree", 99: "worm"}),
        ("imagenet-1k", 1000, {207: "golden retriever", 985: "daisy", 999: "toilet tissue"}),
        ("imagenet-21k", 21843, {0: "organism"}),
    ],
)
def test_shipped_lists_have_the_published_order(name, count, known):
    names = class_list(name)
    assert len(names) == count
    assert len(set(names)) == count
    assert all(at in OutputNames(names).find(each) for at, each in known.items())
    assert name in CLASS_LISTS


def test_names_are_found_in_any_spelling():
    names = OutputNames(["n1, Big Cat, lion", "house_cat", "house cat, tabby", "Dog"])
    assert names.find("big_cat") == names.find("LION") == names.find("n1") == [0]
    assert names.find("house_cat") == [1]  # as it stands
    assert names.find("House Cat") == [1]  # the whole name comes before a synonym
    assert names.find("dog") == [3]
    assert names.find("bird") == []


CIFAR10 = class_list("cifar10")


@pytest.mark.parametrize(
    ("wanted", "names", "message"),
    [
        ({"pet": ["cat"]}, CIFAR10, r"classes lacks 1 of the 2 classes of this data: 'ship'"),
        ({"pet": ["cat"], "ship": []}, CIFAR10, "lacks 1 of the 2"),
        ({"pet": ["cta"], "ship": [8]}, CIFAR10, "no output of the network is called 'cta'; did you mean 'cat'"),
        ({"pet": ["cat"], "ship": [10]}, CIFAR10, "outputs 0 to 9, got 10"),
        ({"pet": ["cat"], "ship": [3]}, CIFAR10, "output 'cat' is given for 'pet' and for 'ship'"),
        ({"pet": ["cat"], "ship": [8]}, None, "names of the network's 10 outputs are unknown"),
        ({"pet": ["a"], "ship": [8]}, ["x, a", "y, a"], r"'a' may be x, a \(output 0\); y, a \(output 1\)"),
    ],
)
def test_outputs_that_cannot_be_found(wanted, names, message):
    with pytest.raises(UsageError, match=message):
        find_outputs(wanted, names, 10, ["pet", "ship"], "classes")


@pytest.fixture
def weights(tmp_path):
    network = create_model(NAME, 10, size=32).eval()
    torch.save(network.state_dict(), tmp_path / "t.pth")
    return network, str(tmp_path / "t.pth")


IMAGES = torch.linspace(-1, 1, 4 * 3 * 32 * 32).sin().reshape(4, 3, 32, 32)


def probabilities(module):
    with torch.no_grad():
        return module.eval()(IMAGES).double().softmax(dim=1)


@pytest.mark.parametrize("theirs", ["cifar10", list(CIFAR10)])
def test_a_superset_of_the_classes(weights, theirs):
    network, path = weights
    loaded = load_for_classes(NAME, path, theirs, ["truck", "cat", "ship"], size=32, key="k")
    chosen = probabilities(network)[:, [9, 3, 8]]
    assert torch.allclose(probabilities(loaded.module), chosen / chosen.sum(dim=1, keepdim=True), atol=1e-6)
    assert loaded.output_groups is None


def test_merged_classes_have_the_sum_of_the_probabilities(weights, tmp_path):
    network, path = weights
    wanted = {"animal": ["bird", "cat", "Deer", "dog", "frog", "horse"], "vehicle": [0, 1, "ship", 9]}
    loaded = load_for_classes(NAME, path, wanted, ["animal", "vehicle"], size=32, key="k")
    every = probabilities(network)
    expected = torch.stack([every[:, 2:8].sum(dim=1), every[:, [0, 1, 8, 9]].sum(dim=1)], dim=1)
    assert torch.allclose(probabilities(loaded.module), expected, atol=1e-6)
    assert loaded.output_groups.groups == ((2, 3, 4, 5, 6, 7), (0, 1, 8, 9))
    assert any("taken to be the classes of cifar10" in note for note in loaded.notes)

    classifier = Classifier(loaded.module, NAME, ("animal", "vehicle"), InputSpec(32))
    classifier.output_groups = loaded.output_groups
    save_model(classifier, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert again.output_groups == loaded.output_groups
    assert torch.equal(probabilities(again.module), probabilities(loaded.module))
    facts = read_checksummed_json(tmp_path / "model" / "model.json")
    bad = (
        {},
        {"outputs": 10, "groups": [[1]]},
        {"outputs": 10, "groups": [[1], []]},
        {"outputs": 10, "groups": [[1], [1]]},
        {"outputs": 10, "groups": [[1], [10]]},
        {"outputs": 10**7, "groups": [[1], [2]]},
        {"outputs": 9, "groups": [[1], [2]]},
    )
    for groups in bad:
        write_checksummed_json(tmp_path / "model" / "model.json", facts | {"output_groups": groups})
        with pytest.raises(ArtifactError):
            load_model(tmp_path / "model")


def test_numbers_need_no_names(tmp_path):
    network = create_model(NAME, 5, size=32).eval()
    torch.save(network.state_dict(), tmp_path / "t.pth")
    loaded = load_for_classes(NAME, str(tmp_path / "t.pth"), {"a": [4], "b": [0]}, ["a", "b"], size=32, key="k")
    chosen = probabilities(network)[:, [4, 0]]
    assert torch.allclose(probabilities(loaded.module), chosen / chosen.sum(dim=1, keepdim=True), atol=1e-6)
    with pytest.raises(UsageError, match="give their numbers, 0 to 4"):
        load_for_classes(NAME, str(tmp_path / "t.pth"), {"a": ["cat"], "b": [0]}, ["a", "b"], size=32, key="k")
