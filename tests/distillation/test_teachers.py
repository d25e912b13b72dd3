import pytest
import torch
from torch import nn

from potstill.distillation.distiller import Distiller
from potstill.errors import UsageError
from potstill.input_spec import InputSpec
from potstill.methods import create_method
from potstill.methods.kd import KD


class Constant(nn.Module):
    """Says the same of every image, and remembers what it was shown."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, images):
        self.images = images
        return self.logits.expand(len(images), -1)


IMAGES, LABELS = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])


def asked(*teachers, **options):
    return Distiller(Constant(0.0, 0.0), list(teachers), KD(), **options).run_teacher(IMAGES)


def test_logits_are_averaged():
    said = asked(Constant(2.0, 0.0), Constant(0.0, 4.0))
    assert said.logits[0].tolist() == [1.0, 2.0]
    assert [member.logits[0].tolist() for member in said.members] == [[2.0, 0.0], [0.0, 4.0]]


def test_weights_are_shares():
    said = asked(Constant(2.0, 0.0), Constant(0.0, 4.0), teacher_weights=[3, 1])
    assert said.logits[0].tolist() == [1.5, 1.0]


def test_probabilities_are_averaged():
    first, second = torch.tensor([0.9, 0.1]), torch.tensor([0.2, 0.8])
    said = asked(Constant(*first.log().tolist()), Constant(*second.log().tolist()), combine="probabilities")
    torch.testing.assert_close(said.logits.softmax(1)[0], torch.tensor([0.55, 0.45]))


def test_a_weight_of_zero_leaves_a_teacher_out():
    for combine in ("logits", "probabilities"):
        said = asked(Constant(2.0, 0.0), Constant(0.0, 400.0), teacher_weights=[1, 0], combine=combine)
        torch.testing.assert_close(said.logits.softmax(1)[0], torch.tensor([2.0, 0.0]).softmax(0))


def test_each_teacher_gets_its_own_images():
    specs = [InputSpec(8, (0.0,) * 3, (1.0,) * 3), InputSpec(16, (0.5,) * 3, (0.25,) * 3)]
    teachers = [Constant(2.0, 0.0), Constant(0.0, 2.0)]
    distiller = Distiller(Constant(0.0, 0.0), teachers, KD(), student_input=specs[0], teacher_input=specs)
    with pytest.warns(UserWarning, match="the teacher of 16 px gets the student's images of 8 px, enlarged"):
        distiller(IMAGES, LABELS)
    assert torch.equal(teachers[0].images, IMAGES)
    assert teachers[1].images.shape == (4, 3, 16, 16)
    assert teachers[1].images.mean().item() == pytest.approx((IMAGES.mean().item() - 0.5) / 0.25, abs=0.02)


def test_all_stay_frozen_and_out_of_the_state():
    teachers = [nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192), nn.Linear(192, 2)) for _ in range(2)]
    distiller = Distiller(Constant(0.0, 0.0), teachers, KD()).train()
    distiller(IMAGES, LABELS).loss.backward()
    assert not any(module.training for teacher in teachers for module in teacher.modules())
    assert all(p.grad is None for teacher in teachers for p in teacher.parameters())
    assert list(distiller.state_dict()) == ["student.logits"]


@pytest.mark.parametrize("path", ["", "1"])  # the whole teacher, or one of its layers
def test_a_teacher_that_somebody_puts_into_train_mode_answers_as_before(path):
    teacher = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192), nn.Dropout(0.5), nn.Linear(192, 2))
    distiller = Distiller(Constant(0.0, 0.0), teacher, KD())
    before = distiller.run_teacher(IMAGES).logits
    state = {key: value.clone() for key, value in teacher.state_dict().items()}
    teacher.get_submodule(path).train()
    assert torch.equal(distiller.run_teacher(IMAGES).logits, before)
    assert all(torch.equal(value, state[key]) for key, value in teacher.state_dict().items())
    assert not any(module.training for module in teacher.modules())


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0]])
def test_weights_that_do_not_fit_are_refused(weights):
    with pytest.raises(UsageError, match="each of the 2 teachers a weight"):
        asked(Constant(1.0, 0.0), Constant(0.0, 1.0), teacher_weights=weights)


def test_different_classes_are_refused():
    with pytest.raises(UsageError, match=r"different numbers of classes: \[2, 3\]"):
        asked(Constant(1.0, 0.0), Constant(0.0, 1.0, 2.0))


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.head = nn.Linear(2 * width, 2)

    def forward(self, images):
        return self.head(self.stage2(self.stage1(images)).mean(dim=(2, 3)))


def test_a_feature_method_works_on_each_teacher_by_itself():
    torch.manual_seed(0)
    student, teachers = Net(4), [Net(6), Net(10)]
    images = torch.rand(4, 3, 16, 16)
    both = Distiller(student, teachers, create_method("at"), example=images).eval()
    alone = [Distiller(student, teacher, create_method("at"), example=images).eval() for teacher in teachers]
    found = both(images, LABELS).terms
    wanted = torch.stack([one(images, LABELS).terms["attention"] for one in alone]).mean()
    torch.testing.assert_close(found["attention"], wanted)


def test_each_copy_has_its_own_adapter():
    images = torch.rand(4, 3, 16, 16)
    distiller = Distiller(Net(4), [Net(6), Net(10)], create_method("fitnet"), example=images)
    distiller(images, LABELS).loss.backward()
    adapters = [p for name, p in distiller.trained_parameters() if name.endswith("conv.weight")]
    assert sorted(p.shape[0] for p in adapters) == [6, 10] or sorted(p.shape[0] for p in adapters) == [12, 20]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters)


def test_combined_and_scheduled_methods_work_on_each_teacher_too():
    images = torch.rand(4, 3, 16, 16)
    settings = {"methods": [{"name": "kd"}, {"name": "at"}], "schedule": {"kd": {"shape": "linear", "end": 0.0}}}
    student, teachers = Net(4), [Net(6), Net(10)]
    distiller = Distiller(student, teachers, create_method("combined", **settings), example=images).eval()
    distiller.start_epoch(0, 2)
    found = distiller(images, LABELS).terms["attention"]
    alone = [Distiller(student, teacher, create_method("at"), example=images).eval() for teacher in teachers]
    wanted = torch.stack([one(images, LABELS).terms["attention"] for one in alone]).mean()
    torch.testing.assert_close(found, wanted)


def test_a_method_for_one_teacher_refuses_two():
    with pytest.raises(UsageError, match="simkd gives the student one teacher's head, got 2"):
        Distiller(Net(4), [Net(6), Net(10)], create_method("simkd"), example=torch.rand(4, 3, 16, 16))


def test_a_compiled_teacher_gives_the_same_and_one_that_cannot_be_compiled_goes_on():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    distiller = Distiller(Constant(0.0, 0.0), [network, Constant(1.0, 2.0)], KD())
    before = distiller.run_teacher(IMAGES).logits
    graphs = []

    def backend(graph, inputs):
        if not any("conv" in str(node.target) for node in graph.graph.nodes):  # that of Constant
            raise ValueError("no such kernel\nmore")
        graphs.append(graph)
        return graph.forward

    notes = distiller.teacher.compile(IMAGES, backend=backend)
    assert notes[0] == "compiled"
    assert notes[1].startswith("not compiled: ")
    assert len(graphs) == 1
    torch.testing.assert_close(distiller.run_teacher(IMAGES).logits, before)
    torch.compiler.reset()


def test_a_teacher_whose_layers_are_read_is_not_compiled():
    def net():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))

    distiller = Distiller(net(), net(), create_method("at"), example=IMAGES)
    assert distiller.teacher.compile(IMAGES, backend="eager") == ["not compiled: its hidden layers are read"]
