"""8 bits: whose extremes make the ranges of the activations."""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy
from torch import nn

from potstill.export.int8 import CalibrationImages, class_balanced_indices, quantize_network
from potstill.export.onnx import export_graph
from potstill.input_spec import InputSpec
from potstill.models.exported_files import ExportMetadata

for _name in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(_name, reason="needs potstill[export]")
import onnxruntime as ort  # noqa: E402


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Hardswish(), nn.Conv2d(8, 8, 3), nn.Hardswish(), nn.Flatten(), nn.Linear(128, 4)
    )
    module[-1].weight.data *= 8  # probabilities far from equal
    names = tuple("abcd")
    return export_graph(module.eval(), ExportMetadata("some", names, InputSpec(size=8)))


def images(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, 8, 8)).astype(np.float32)


def divergence(reference, model, given: np.ndarray) -> float:
    """Return the mean KL divergence, in nats, of a model's probabilities from those of the reference."""
    (p, q) = (
        softmax(ort.InferenceSession(each.SerializeToString()).run(None, {"images": given})[0].astype(float), axis=1)
        for each in (reference, model)
    )
    return float(entropy(p, q, axis=1).mean())


def test_one_image_with_extreme_values_does_not_make_the_ranges(network) -> None:
    given = images(0, 256)
    given[100] *= 50  # 8 bits for fifty times the usual range leave five steps to the others
    chosen = CalibrationImages(given, images(1, 128), 4)
    extremes, found = quantize_network(network, chosen, choose=False)
    assert found == {"method": "MinMax", "batch": None, "divergence": None}
    best, found = quantize_network(network, chosen)
    assert found["batch"] in {8, 16}  # the extreme image in one of 32 or 16 batches
    assert found["divergence"] == pytest.approx(divergence(network, best, chosen.judged), rel=1e-6)
    assert found["divergence"] < 0.1 * divergence(network, extremes, chosen.judged)


def test_where_all_images_are_alike_smaller_batches_are_not_tried_to_the_end(
    network, monkeypatch: pytest.MonkeyPatch
) -> None:
    from potstill.export import int8

    tried = []
    quantize = int8._quantize
    monkeypatch.setattr(int8, "_quantize", lambda *args: tried.append(args[-1]) or quantize(*args))
    signs = np.sign(images(0, 256))  # minimum and maximum of each image are -1 and 1
    _, found = quantize_network(network, CalibrationImages(signs, signs[:128], 4))
    assert tried[0] is None
    assert len(tried) < 5
    assert found["divergence"] < 0.01


def test_calibration_takes_all_classes_in_turn() -> None:
    labels = [0] * 50 + [1] * 3 + [2] * 50
    chosen = [labels[i] for i in class_balanced_indices(labels, 23)]
    assert [chosen.count(label) for label in (0, 1, 2)] == [10, 3, 10]
    assert class_balanced_indices(labels, 1000) == list(range(103))
