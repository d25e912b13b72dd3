"""Networks without visible layers: ONNX, TorchScript and torch.export files, and plain functions."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from potstill.code_references import allowed_code, permit_code
from potstill.errors import ArtifactError, UsageError
from potstill.export.formats import TORCH_EXPORT, quiet
from potstill.export.onnx import convert_to_onnx
from potstill.input_spec import InputSpec
from potstill.models.exported_files import ExportMetadata, identify_file
from potstill.models.families.opaque_models import FileNetwork, FunctionNetwork, find_opaque
from potstill.models.families.own_models import build, given_networks
from potstill.models.model_file import Classifier, load_model, save_model
from potstill.models.output_groups import GroupedOutputs, OutputGroups

SIZE = 8
IMAGES = torch.rand(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


class Means(nn.Module):
    """Logits are the means of the channels, times ten, in another order."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 10 * images.mean((2, 3))[:, [2, 0, 1]]


EXPECTED = 10 * IMAGES.mean((2, 3))[:, [2, 0, 1]]


def write_onnx(path, module, sample=None, outputs=("logits",), dynamic=True):
    sample = torch.zeros(2, 3, SIZE, SIZE) if sample is None else sample
    axes = ({0: torch.export.Dim("batch")},) if dynamic else None
    with quiet():
        torch.onnx.export(
            module.eval(), (sample if dynamic else sample[:1],), str(path), dynamo=True, dynamic_shapes=axes,
            input_names=["images"], output_names=list(outputs), external_data=False, verbose=False,
        )  # fmt: skip
    return path


def write_file(kind, path, *, dynamic=True):
    sample = torch.zeros(2 if dynamic else 1, 3, SIZE, SIZE)
    axes = ({0: torch.export.Dim("batch")},) if dynamic else None
    if kind == "onnx":
        return write_onnx(path / "file.onnx", Means(), dynamic=dynamic)
    if kind == "torchscript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch advises another format
            torch.jit.script(Means()).save(path / "file.pt")
        return path / "file.pt"
    torch.export.save(torch.export.export(Means(), (sample,), dynamic_shapes=axes), path / "file.pt2")
    return path / "file.pt2"


@pytest.mark.parametrize("kind", ["onnx", "torchscript", "torch-export"])
def test_a_file_computes_what_its_network_did(tmp_path, kind):
    file = write_file(kind, tmp_path)
    assert identify_file(file) == kind
    with allowed_code():
        network = FileNetwork.read(kind, file)
        assert network.examine(SIZE) == 3
        assert torch.allclose(network(IMAGES), EXPECTED, atol=1e-5)
        file.unlink()  # the model folder is complete without it
        groups = OutputGroups(3, ((2,), (0,)))
        saved = Classifier(GroupedOutputs(network, groups), kind, ("a", "b"), InputSpec(SIZE), output_groups=groups)
        save_model(saved, tmp_path / "model")
        loaded = load_model(tmp_path / "model").module
        assert torch.allclose(loaded(IMAGES), EXPECTED[:, [2, 0]], atol=1e-5)
        assert torch.allclose(copy.deepcopy(loaded)(IMAGES), EXPECTED[:, [2, 0]], atol=1e-5)
        assert find_opaque(loaded).kind == kind


@pytest.mark.parametrize("kind", ["torchscript", "torch-export"])
def test_the_weights_of_a_program_are_in_its_content_alone(tmp_path, kind):
    module, file = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, 4)).eval(), tmp_path / "file"
    with warnings.catch_warnings(), allowed_code():
        warnings.simplefilter("ignore")  # torch advises another format
        if kind == "torchscript":
            torch.jit.trace(module, IMAGES).save(file)
        else:
            torch.export.save(torch.export.export(module, (IMAGES,)), file)
        network = FileNetwork.read(kind, file)
        network.examine(SIZE) if kind == "torchscript" else None
        assert torch.allclose(network(IMAGES), module(IMAGES), atol=1e-5)
        assert set(network.state_dict()) == {"content", "settings"}


@pytest.mark.parametrize("kind", ["torchscript", "torch-export"])
def test_files_that_can_run_code_need_permission(tmp_path, kind):
    file = write_file(kind, tmp_path)
    with pytest.raises(UsageError, match="--allow-code"):
        FileNetwork.read(kind, file)
    with allowed_code():
        network = FileNetwork.read(kind, file)
        network.examine(SIZE)
        save_model(Classifier(network, kind, ("a", "b", "c"), InputSpec(SIZE)), tmp_path / "model")
    loaded = load_model(tmp_path / "model").module
    with pytest.raises(UsageError, match="--allow-code"):
        loaded(IMAGES)
    permit_code([str(file)])  # this file alone, and the copies of it
    FileNetwork.read(kind, file)
    assert torch.allclose(loaded(IMAGES), EXPECTED, atol=1e-5)
    other = tmp_path / f"other{file.suffix}"
    other.write_bytes(file.read_bytes())
    with pytest.raises(UsageError, match="--allow-code"):
        FileNetwork.read(kind, other)


@pytest.mark.parametrize("kind", ["onnx", "torch-export"])
def test_a_file_for_a_single_image_is_run_image_by_image(tmp_path, kind):
    with allowed_code():
        network = FileNetwork.read(kind, write_file(kind, tmp_path, dynamic=False))
        assert network.examine(SIZE) == 3
        assert torch.allclose(network(IMAGES), EXPECTED, atol=1e-5)


EXPORTED_SPEC = InputSpec(SIZE, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))


def test_a_file_that_crops_its_images_itself_is_refused(tmp_path):
    """Whatever its kind: what it does is read from its metadata, as in the next test."""
    metadata = ExportMetadata("own", ("a", "b", "c"), EXPORTED_SPEC, "resize")
    (tmp_path / "model.pt2").write_bytes(TORCH_EXPORT.convert(Means(), metadata)[".pt2"])
    with allowed_code(), pytest.raises(ArtifactError, match="--preprocessing none"):
        FileNetwork.read("torch-export", tmp_path / "model.pt2")


@pytest.mark.parametrize(
    ("convert", "suffix", "kind"), [(convert_to_onnx, ".onnx", "onnx"), (TORCH_EXPORT.convert, ".pt2", "torch-export")]
)
@pytest.mark.parametrize("inside", ["none", "normalise"])
def test_preprocessing_of_exported_files(tmp_path, convert, suffix, kind, inside):
    spec = EXPORTED_SPEC
    file = tmp_path / f"model{suffix}"
    file.write_bytes(convert(Means(), ExportMetadata("own", ("a", "b", "c"), spec, inside))[suffix])
    with allowed_code():
        network = FileNetwork.read(kind, file)
        network.examine(SIZE)
    assert network.fixed_size == SIZE
    assert network.metadata.class_names == ("a", "b", "c")
    pixels = torch.randint(0, 256, (4, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0)) / 255
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in network.normalisation)
    ours, theirs = (torch.tensor(each).view(3, 1, 1) for each in (spec.mean, spec.std))
    expected = Means()((pixels - ours) / theirs)
    assert torch.allclose(network((pixels - mean) / std), expected, atol=1e-4)


class WithFeatures(nn.Module):
    def forward(self, images):
        return 10 * images.mean((2, 3)), images.mean((2, 3))


class ChannelsLast(nn.Module):
    def forward(self, images):
        return images.mean((1, 2))


class TwoInputs(nn.Module):
    def forward(self, images, mask):
        return (images * mask).mean((2, 3))


def test_networks_that_are_no_classifiers_of_images(tmp_path):
    several = write_onnx(tmp_path / "several.onnx", WithFeatures(), outputs=("logits", "features"))
    with pytest.raises(ArtifactError, match=r"2 outputs \(logits, features\).*\n.*extract_model"):
        FileNetwork.read("onnx", several)
    last = write_onnx(tmp_path / "last.onnx", ChannelsLast(), torch.zeros(2, SIZE, SIZE, 3))
    with pytest.raises(ArtifactError, match=r"square images \[B, 3, S, S\]"):
        FileNetwork.read("onnx", last)
    with quiet():
        torch.onnx.export(TwoInputs(), (IMAGES, IMAGES), str(tmp_path / "two.onnx"), dynamo=True, external_data=False)
    with pytest.raises(ArtifactError, match="2 inputs"):
        FileNetwork.read("onnx", tmp_path / "two.onnx")
    maps = write_onnx(tmp_path / "maps.onnx", nn.Conv2d(3, 2, 1))
    with pytest.raises(ArtifactError, match=r"returned a tensor \[2, 2, 8, 8\]"):
        FileNetwork.read("onnx", maps).examine(SIZE)
    with pytest.raises(ArtifactError, match="cannot take images"):
        FileNetwork.read("onnx", write_file("onnx", tmp_path)).examine(SIZE + 1)
    (tmp_path / "damaged.onnx").write_bytes(last.read_bytes()[:100])
    with pytest.raises(ArtifactError, match=r"damaged\.onnx"):
        FileNetwork.read("onnx", tmp_path / "damaged.onnx")


def test_probabilities_become_logits(tmp_path):
    network = FileNetwork.read("onnx", write_onnx(tmp_path / "soft.onnx", nn.Sequential(Means(), nn.Softmax(dim=1))))
    network.examine(SIZE)
    assert network.gives_probabilities
    assert torch.allclose(network(IMAGES), EXPECTED.log_softmax(dim=1), atol=1e-5)
    save_model(Classifier(network, "onnx", ("a", "b", "c"), InputSpec(SIZE)), tmp_path / "model")
    assert torch.allclose(load_model(tmp_path / "model").module(IMAGES), EXPECTED.log_softmax(dim=1), atol=1e-5)
    sure = FunctionNetwork(lambda images: torch.eye(3)[[0] * len(images)], "sure", SIZE)
    sure.examine(SIZE)
    assert sure(IMAGES).isfinite().all()


def test_a_function_of_images_is_a_network():
    def by_means(images):
        assert images.shape[1:] == (3, SIZE, SIZE)
        found = Means()(images).numpy()
        images.zero_()  # its own copy
        return found

    with given_networks({"python/teacher": (by_means, None)}):
        network = build("python/teacher", 3, SIZE, 3)
    images = IMAGES.clone()
    assert torch.allclose(network(images), EXPECTED, atol=1e-5)
    assert torch.equal(images, IMAGES)
    other = FunctionNetwork(lambda images: Means()(images) + torch.tensor([0.0, 0.0, 1.0]), "other", SIZE)
    assert network.fingerprint() == FunctionNetwork(Means().forward, "same", SIZE).fingerprint()
    assert network.fingerprint() != other.fingerprint()


def raises(images):
    raise ValueError("the service is down")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises, "raised ValueError: the service is down .*test_opaque_models.py, line"),
        (lambda images: images.mean(), r"returned a tensor \[\]"),
        (lambda images: images.mean((2, 3))[:1], r"returned a tensor \[1, 3\]"),
        (lambda images: np.zeros((len(images), 1)), r"returned an array \[2, 1\]"),
        (lambda images: [0.0] * 3, "returned a list of 3"),
        (lambda images: None, "returned None"),
    ],
)
def test_functions_that_are_no_teachers(function, message):
    with (
        given_networks({"python/teacher": (function, None)}),
        pytest.raises(UsageError, match=message),
    ):
        build("python/teacher", 3, SIZE, 3)
