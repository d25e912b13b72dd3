"""A run of small networks that know the digits, made without training."""

from pathlib import Path

import numpy as np
import pytest
import torch

from potstill.data import DataSettings
from potstill.data.datasets import load_data
from potstill.data.preprocessing import crop_to_input, normalize_array
from potstill.input_spec import InputSpec
from potstill.models.factory import create_model
from potstill.models.model_file import Classifier, save_model

SPEC = InputSpec(16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
ARCHITECTURE = "cifar/resnet8"


@pytest.fixture(scope="session")
def digits():
    return load_data(DataSettings(source="digits"))


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, digits) -> Path:
    """Stages "teacher" and "distilled"; their last layers were solved for, by least squares."""
    folder = tmp_path_factory.mktemp("runs") / "made"
    for seed, stage in enumerate(("teacher", "distilled")):
        torch.manual_seed(seed)
        network = create_model(ARCHITECTURE, 10, size=SPEC.size).eval()
        solve_head(network, digits)
        save_model(Classifier(network, ARCHITECTURE, digits.class_names, SPEC), folder / stage)
    return folder


def solve_head(network: torch.nn.Module, digits) -> None:
    head = [part for part in network.modules() if isinstance(part, torch.nn.Linear)][-1]
    count = 400
    images = np.stack([crop_to_input(digits.train.pixels(i), SPEC) for i in range(count)])
    seen: list[torch.Tensor] = []
    handle = head.register_forward_pre_hook(lambda part, given: seen.append(given[0]))
    with torch.no_grad():
        network(torch.from_numpy(normalize_array(images, SPEC)))
        handle.remove()
        targets = 8 * torch.nn.functional.one_hot(torch.from_numpy(digits.train.labels[:count]), 10).float()
        inputs = torch.cat([seen[0], torch.ones(count, 1)], dim=1).double()
        ridge = 1e-3 * torch.eye(inputs.shape[1], dtype=torch.float64)
        solved = torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ targets.double()).float()
        head.weight.copy_(solved[:-1].T)
        head.bias.copy_(solved[-1])
