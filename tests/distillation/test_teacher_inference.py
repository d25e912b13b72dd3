"""Converted teachers: who stays untouched, what stays exact, and when float32 is kept."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from potstill.distillation.distiller import Distiller
from potstill.distillation.teacher_inference import Fidelity, InferenceSettings, convert_for_inference, measure_fidelity
from potstill.distillation.teachers import Teachers
from potstill.methods import create_method
from potstill.methods.kd import KD

BF16, LAST = torch.bfloat16, torch.channels_last
IMAGES, LABELS = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU(), nn.BatchNorm2d(2 * width))
        self.head = nn.Linear(2 * width, 3)

    def forward(self, images):
        return self.head(self.stage2(self.stage1(images)).mean(dim=(2, 3)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.places = nn.Parameter(torch.randn(1, 16, 16))
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.layer(tokens)).mean(dim=1))


class Between(nn.Module):
    """Two classes less than a hundredth apart at 100, where bf16 has steps of a half."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(3, 2, 1)
        with torch.no_grad():
            self.mix.weight.copy_(torch.tensor([[0.01, 0.0, 0.0], [0.0, 0.01, 0.0]]).view(2, 3, 1, 1))
            self.mix.bias.fill_(100.0)

    def forward(self, images):
        return self.mix(images).mean(dim=(2, 3))


class OnlyFloat32(Net):
    def forward(self, images):
        if images.dtype != torch.float32:
            raise TypeError("no, thank you")
        return super().forward(images)


class Looks(Net):
    """Reads its BatchNorm from outside."""

    def forward(self, images):
        return super().forward(images) + self.stage1[1].weight.mean()


class Decays(Net):
    """Reads its convolution's weights from outside."""

    def __init__(self):
        super().__init__()
        self.stage1[1].running_var.fill_(4.0)  # folding halves them

    def forward(self, images):
        return super().forward(images) + self.stage1[0].weight.square().mean()


def teachers(*networks):
    return Teachers([network.eval() for network in networks], [nn.Identity() for _ in networks])


def optimize(teachers, dtype, memory_format, example):
    """Replace each teacher by a faster copy where it agrees; what was done, as text."""
    return [
        teachers.optimize_one_for_inference(position, dtype, memory_format, convert(example)).note
        for position, convert in enumerate(teachers.input_converters)
    ]


def snapshot(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def unchanged(network, before):
    now = network.state_dict()
    return now.keys() == before.keys() and all(
        value.dtype == before[name].dtype and torch.equal(value, before[name]) for name, value in now.items()
    )


@pytest.mark.parametrize("network", [Net, Attention])
def test_a_copy_takes_the_place_and_the_original_stays(network):
    network = network().eval()
    before, frozen = snapshot(network), teachers(network)
    exact = frozen.run(IMAGES)[0].logits
    random = torch.get_rng_state()
    (note,) = optimize(frozen, BF16, LAST, IMAGES)
    assert torch.equal(torch.get_rng_state(), random)
    assert unchanged(network, before)
    assert frozen.networks[0] is not network
    weights = dict(frozen.networks[0].named_parameters())
    exactly = {name for name, value in weights.items() if value.dtype == torch.float32}
    assert exactly == {name for name in weights if name.startswith(("head.", "stage2.2."))}
    assert not any(value.requires_grad for value in weights.values())
    said = frozen.run(IMAGES)[0].logits
    assert said.dtype == torch.float32
    assert 0 < (said - exact).abs().max() < 0.02
    assert note.startswith("runs in bf16, ")
    assert "channels_last (same top class as float32 on " in note
    assert " of 16 images, largest logit difference 0.0" in note


def test_folded_alone_it_says_the_same():
    network = Net().eval()
    frozen = teachers(network)
    exact = frozen.run(IMAGES)[0].logits
    assert optimize(frozen, torch.float32, torch.contiguous_format, IMAGES) == [
        "runs in float32, BN folded (same top class as float32 on 100.0 % of 16 images, largest logit difference "
        f"{(frozen.run(IMAGES)[0].logits - exact).abs().max():.2g})"
    ]
    assert frozen.inference_settings == [InferenceSettings(torch.float32, torch.contiguous_format, 1)]
    torch.testing.assert_close(frozen.run(IMAGES)[0].logits, exact, atol=1e-5, rtol=1e-5)


def test_autocast_around_it_changes_nothing():
    frozen = teachers(Net())
    optimize(frozen, BF16, LAST, IMAGES)
    plain = frozen.run(IMAGES)[0].logits
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(frozen.run(IMAGES)[0].logits, plain)


def test_float32_on_demand_whatever_autocast_says():
    frozen = teachers(Net())
    exact = frozen.run(IMAGES)[0].logits
    frozen.use_float32(0)
    with torch.autocast("cpu", dtype=BF16):
        assert torch.equal(frozen.run(IMAGES)[0].logits, exact)


def test_answers_can_be_saved_for_a_backward_pass():
    distiller = Distiller(Net(4), Net(), create_method("rkd"), example=IMAGES)
    assert optimize(distiller.teacher, BF16, LAST, IMAGES)[0].startswith("runs in bf16")
    outputs = distiller.run_teacher(IMAGES)
    for answer in (outputs.logits, outputs.embedding):
        assert answer.dtype == torch.float32
        assert not answer.is_inference()
        factor = torch.ones_like(answer, requires_grad=True)
        (factor * answer).sum().backward()
        assert torch.equal(factor.grad, answer)
    distiller(IMAGES, LABELS).loss.backward()


def test_a_head_that_a_method_reads_stays_exact():
    teacher = Net()
    distiller = Distiller(Net(4), teacher, create_method("srrl", form="pooled"), example=IMAGES)
    assert optimize(distiller.teacher, BF16, LAST, IMAGES)[0].startswith("runs in bf16")
    head = distiller.run_teacher(IMAGES).head
    assert torch.equal(head.weight, teacher.head.weight)
    assert torch.equal(head.bias, teacher.head.bias)
    with torch.autocast("cpu", dtype=BF16):
        distiller(IMAGES, LABELS).loss.backward()


def test_where_maps_are_read_nothing_is_done():
    teacher = Net()
    distiller = Distiller(Net(4), teacher, create_method("at"), example=IMAGES)
    assert optimize(distiller.teacher, BF16, LAST, IMAGES) == ["runs under autocast, since its feature maps are read"]
    assert distiller.teacher.networks[0] is teacher
    assert distiller.teacher.inference_settings == [None]


def test_maps_in_float32_on_demand():
    distiller = Distiller(Net(4), Net(), create_method("at"), example=IMAGES)
    exact = distiller.run_teacher(IMAGES).maps
    distiller.teacher.use_float32(0)
    with torch.autocast("cpu", dtype=BF16):
        found = distiller.run_teacher(IMAGES).maps
    assert all(torch.equal(one, other) for one, other in zip(found, exact, strict=True))


def test_the_original_is_let_go():
    teacher = Net()
    distiller = Distiller(Net(4), teacher, KD())
    optimize(distiller.teacher, BF16, LAST, IMAGES)
    kept = weakref.ref(teacher)
    del teacher
    gc.collect()
    assert kept() is None


def test_copies_and_states_go_on_working():
    distiller = Distiller(Net(4), [Net(), Attention()], KD(), teacher_weights=[3, 1])
    keys = list(distiller.state_dict())
    notes = optimize(distiller.teacher, BF16, LAST, IMAGES)
    assert [note.startswith("runs in bf16") for note in notes] == [True, True]
    assert list(distiller.state_dict()) == keys
    assert not any(name.startswith("teacher.") for name, _ in distiller.trained_parameters())
    distiller.load_state_dict(distiller.state_dict())
    twin = copy.deepcopy(distiller)
    said = distiller.run_teacher(IMAGES)
    assert torch.equal(twin.run_teacher(IMAGES).logits, said.logits)
    torch.testing.assert_close(said.logits, 0.75 * said.members[0].logits + 0.25 * said.members[1].logits)
    assert not any(module.training for module in distiller.train().teacher.modules())


def test_second_images_run_alike():
    distiller = Distiller(Net(4), Net(), create_method("mlld"), example=IMAGES)
    optimize(distiller.teacher, BF16, LAST, IMAGES)
    flipped = IMAGES.flip(3)
    said = distiller.run_teacher(IMAGES, flipped)
    assert torch.equal(said.second.logits, distiller.run_teacher(flipped).logits)
    distiller(IMAGES, LABELS, second=flipped).loss.backward()


def test_where_it_does_not_agree_float32_stays():
    frozen = teachers(Between())
    network = frozen.networks[0]
    exact = frozen.run(IMAGES)[0].logits
    (note,) = optimize(frozen, BF16, LAST, IMAGES)
    assert note.startswith("runs in float32; bf16 is too inaccurate (same top class as float32 on ")
    assert frozen.networks[0] is network
    with torch.autocast("cpu", dtype=BF16):
        torch.testing.assert_close(frozen.run(IMAGES)[0].logits, exact)


def test_what_cannot_be_converted_stays():
    frozen = teachers(OnlyFloat32())
    assert optimize(frozen, BF16, LAST, IMAGES) == ["runs in float32, since it could not be converted: no, thank you"]
    assert frozen.inference_settings == [InferenceSettings(memory_format=LAST)]


@pytest.mark.parametrize("kind", [Looks, Decays])
def test_what_is_looked_into_from_outside_is_not_folded(kind):
    network = kind().eval()
    copied, how = convert_for_inference(network, torch.float32, torch.contiguous_format, IMAGES)
    assert how.folded == 0
    assert torch.equal(how.logits(copied, IMAGES), network(IMAGES))


def test_other_weights_stay_and_twice_is_once():
    frozen = teachers(Net().double())
    assert optimize(frozen, BF16, LAST, IMAGES) == ["runs unconverted, since it has weights in torch.float64"]
    frozen = teachers(Net())
    optimize(frozen, BF16, LAST, IMAGES)
    before = frozen.networks[0]
    assert optimize(frozen, BF16, LAST, IMAGES) == ["runs in bf16, BN folded, channels_last already"]
    assert frozen.networks[0] is before


def test_the_same_conversion_twice_gives_the_same_bits():
    network = Net().eval()
    one, other = (convert_for_inference(network, BF16, LAST, IMAGES) for _ in range(2))
    assert torch.equal(one[1].logits(one[0], IMAGES), other[1].logits(other[0], IMAGES))


class Says(nn.Module):
    def __init__(self, *logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, images):
        return self.logits[: len(images)]


def test_fidelity_by_hand():
    ours, theirs = Says([2.0, 1.0], [0.0, 3.0], [1.0, 2.0]), Says([2.5, 1.0], [0.0, 3.0], [2.0, 1.0])
    assert measure_fidelity(ours, InferenceSettings(), theirs, IMAGES[:3]) == Fidelity(2 / 3, 1.0, 3)


def test_what_is_no_longer_finite_does_not_agree():
    ours, theirs = Says([float("inf"), 1.0], [0.0, 3.0]), Says([2.5, 1.0], [0.0, 3.0])
    assert measure_fidelity(ours, InferenceSettings(), theirs, IMAGES[:2]).agreement == 0.5


@pytest.mark.parametrize("how", [InferenceSettings(), InferenceSettings(BF16, LAST, 3)])
def test_facts_and_back(how):
    assert InferenceSettings.of(how.facts()) == how
