from functools import partial

import numpy as np
import pytest
import torch

from potstill.contrib.federated.client import (
    Client,
    PublicDataset,
    client_loader,
    create_local_distiller,
    train_locally,
)
from potstill.contrib.federated.server import InProcessClients
from potstill.data.loader import Loader
from potstill.distillation.distiller import Distiller
from potstill.errors import NonFiniteError, UsageError
from potstill.experiment.builders import build_teacher_views, split_loader
from potstill.input_spec import InputSpec
from potstill.methods import create_method
from potstill.models.factory import create_model
from potstill.models.model_file import Classifier
from potstill.training.callbacks import SilentObserver
from potstill.training.devices import create_compute
from potstill.training.trainer import Trainer

LOCAL_EPOCHS = 1


def network(seed=5):
    torch.manual_seed(seed)
    return Classifier(
        create_model("cifar/resnet8", 3, size=16), "cifar/resnet8", ("blue", "green", "red"), InputSpec(16)
    )


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_one_client_with_all_images_is_plain_training_bit_for_bit(tmp_path, recipe, data, parts, optimizer):
    """The training loop of the package is the reference: same start, same batches, one epoch."""
    tiny = recipe(**{"training.optimizer": optimizer, "training.schedule": "cosine", "training.max_grad_norm": 1.0})
    settings = tiny.stage_training("student")
    compute = create_compute(settings)

    server = parts.server("fedavg", tiny, data, InProcessClients({0: Client(lambda classes: data.train)}))
    server.train(SilentObserver())

    plain = network()
    plain.module.to(memory_format=compute.memory_format)
    loader = client_loader(data.train, plain, tiny, settings, compute, 0)
    val = split_loader(data, "val", plain.input, tiny, settings, compute)
    distiller = Distiller(plain.module, None, create_method("supervised"), label_loss=torch.nn.CrossEntropyLoss())
    Trainer(distiller, loader, val, settings, compute, folder=tmp_path, observer=SilentObserver(), classes=3).run()

    ours, theirs = server.student.module.state_dict(), plain.module.state_dict()
    assert list(ours) == list(theirs)
    assert not torch.equal(ours["stem.0.weight"], network().module.state_dict()["stem.0.weight"])  # it has been trained
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_a_guided_client_differs_from_one_that_is_not(recipe, data):
    tiny = recipe()
    settings = tiny.stage_training("student")
    compute = create_compute(settings)
    found = []
    for teacher in (None, network(6)):
        student = network()
        distiller = create_local_distiller(student, teacher, tiny, compute, 0.0)
        loader = client_loader(data.train, student, tiny, settings, compute, 0)
        before = None if teacher is None else teacher.module.state_dict()["stem.0.weight"].clone()
        train_locally(distiller, loader, settings, compute, first=0, epochs=1)
        found.append(student.module.state_dict()["stem.0.weight"])
        if teacher is not None:  # it teaches, and learns nothing itself: not even BatchNorm's statistics
            assert torch.equal(teacher.module.state_dict()["stem.0.weight"], before)
            assert int(teacher.module.state_dict()["stem.1.num_batches_tracked"]) == 0
    assert not torch.equal(*found)


def test_a_larger_teacher_sees_the_original_pixels(recipe, data, parts):
    """A teacher of 24 px in a run with 16 px: its images are those of a loader of its own, not the student's."""
    tiny = recipe()
    seen = []
    teacher = network(6)
    teacher.input = InputSpec(24)
    teacher.module.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach().clone()))
    settings = tiny.stage_training("student")
    compute, student = create_compute(settings), network()
    loader = client_loader(data.train, student, tiny, settings, compute, 0)
    distiller = create_local_distiller(student, teacher, tiny, compute, 0.0)
    make = partial(client_loader, data.train, student, tiny, settings, compute, 0)
    views = build_teacher_views(student.input, [teacher], make)
    seen.clear()
    train_locally(distiller, loader, settings, compute, first=2, epochs=1, views=views)
    own = make(spec=InputSpec(24), drawn_for=student.input)
    expected = [batch.images for batch in own.epoch(2)]
    assert len(seen) == len(expected)
    assert all(torch.equal(one, two) for one, two in zip(seen, expected, strict=True))


def test_later_rounds_see_other_views_and_a_lower_learning_rate(recipe, data):
    tiny = recipe(**{"training.epochs": 4, "training.schedule": "cosine"})
    settings = tiny.stage_training("student")
    compute = create_compute(settings)

    def moved(first):
        student = network()
        start = student.module.stem[0].weight.detach().clone()
        loader = client_loader(data.train, student, tiny, settings, compute, 0)
        train_locally(
            create_local_distiller(student, None, tiny, compute, 0.0), loader, settings, compute, first=first, epochs=1
        )
        return float((student.module.stem[0].weight.detach() - start).norm())

    assert moved(3) < 0.5 * moved(0)


@pytest.mark.parametrize("method", ["crd", "fitnet", "simkd"])
def test_methods_that_a_round_cannot_carry_on_are_refused(recipe, method):
    tiny = recipe(**{"method.name": method, "method": f"{{name: {method}}}"})
    with pytest.raises(UsageError, match=rf"method {method} trains or keeps more .* kd, dkd, dist"):
        create_local_distiller(network(), network(6), tiny, create_compute(tiny.stage_training("student")), 0.0)


def test_a_loss_that_is_no_number_is_an_error(recipe, data):
    tiny = recipe(**{"training.lr": 1e30, "training.optimizer": "sgd"})
    settings = tiny.stage_training("student")
    compute, student = create_compute(settings), network()
    loader = Loader(data.train, student.input, batch_size=16, order="shuffled")
    with pytest.raises(NonFiniteError, match="loss of a client"):
        train_locally(
            create_local_distiller(student, None, tiny, compute, 0.0), loader, settings, compute, first=0, epochs=2
        )


class Linear(torch.nn.Module):
    """Three logits that are linear in the mean colour."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(3, 3)

    def forward(self, images):
        return self.head(images.mean(dim=(2, 3)))


def create_public(recipe, public, **changes):
    settings = recipe(**changes).stage_training("student")
    student = Classifier(Linear(), "linear", ("blue", "green", "red"), InputSpec(16))
    return PublicDataset(public, student.input, settings, create_compute(settings), seed=0), student


def test_logits_are_those_of_each_image_in_its_place(recipe, public):
    public_set, student = create_public(recipe, public)
    logits = public_set.predict_logits(student)
    assert logits.shape == (21, 3)
    mean, std = np.array(student.input.mean), np.array(student.input.std)
    for at in (0, 7, 20):  # by hand, from the pixels
        colour = (public.pixels(at).reshape(-1, 3).mean(axis=0) / 255 - mean) / std
        weight, bias = student.module.head.weight.detach().numpy(), student.module.head.bias.detach().numpy()
        np.testing.assert_allclose(logits[at], weight @ colour + bias, atol=1e-4)


def test_a_student_learns_from_logits_without_a_label(recipe, public):
    public_set, student = create_public(recipe, public, **{"training.lr": 0.2})
    wanted = np.eye(3, dtype=np.float32)[np.array(public.labels)] * 8
    wrong = np.roll(wanted, 1, axis=1)  # labels say otherwise; they must not be looked at
    public_set.train_student(student, wrong, temperature=1.0, epochs=25, first=0)
    assert (public_set.predict_logits(student).argmax(axis=1) == wrong.argmax(axis=1)).mean() > 0.9


def test_the_order_is_that_of_the_pass(recipe, public):
    weights = []
    for first in (0, 0, 1):
        torch.manual_seed(0)
        public_set, student = create_public(recipe, public, **{"training.batch_size": 4})
        targets = np.random.default_rng(0).normal(size=(21, 3)).astype(np.float32)
        public_set.train_student(student, targets, temperature=2.0, epochs=1, first=first)
        weights.append(student.module.head.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
