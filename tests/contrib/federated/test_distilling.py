import numpy as np
import torch

from potstill.contrib.federated.client import PublicDataset
from potstill.input_spec import InputSpec
from potstill.models.model_file import Classifier
from potstill.training.devices import create_compute


class Linear(torch.nn.Module):
    """Three logits that are linear in the mean colour."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(3, 3)

    def forward(self, images):
        return self.head(images.mean(dim=(2, 3)))


def made(recipe, public, **changes):
    settings = recipe(**changes).stage_training("student")
    student = Classifier(Linear(), "linear", ("blue", "green", "red"), InputSpec(16))
    return PublicDataset(public, student.input, settings, create_compute(settings), seed=0), student


def test_logits_are_those_of_each_image_in_its_place(recipe, public):
    asked, student = made(recipe, public)
    logits = asked.ask(student)
    assert logits.shape == (21, 3)
    mean, std = np.array(student.input.mean), np.array(student.input.std)
    for at in (0, 7, 20):  # by hand, from the pixels
        colour = (public.pixels(at).reshape(-1, 3).mean(axis=0) / 255 - mean) / std
        weight, bias = student.module.head.weight.detach().numpy(), student.module.head.bias.detach().numpy()
        np.testing.assert_allclose(logits[at], weight @ colour + bias, atol=1e-4)


def test_a_student_learns_what_was_said_without_a_label(recipe, public):
    asked, student = made(recipe, public, **{"training.lr": 0.2})
    wanted = np.eye(3, dtype=np.float32)[np.array(public.labels)] * 8
    wrong = np.roll(wanted, 1, axis=1)  # labels say otherwise; they must not be looked at
    asked.train_student(student, wrong, temperature=1.0, epochs=25, first=0)
    assert (asked.ask(student).argmax(axis=1) == wrong.argmax(axis=1)).mean() > 0.9


def test_the_order_is_that_of_the_pass(recipe, public):
    weights = []
    for first in (0, 0, 1):
        torch.manual_seed(0)
        asked, student = made(recipe, public, **{"training.batch_size": 4})
        said = np.random.default_rng(0).normal(size=(21, 3)).astype(np.float32)
        asked.train_student(student, said, temperature=2.0, epochs=1, first=first)
        weights.append(student.module.head.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
