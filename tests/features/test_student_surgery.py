import copy
import json

import pytest
import torch
from torch import nn

from potstill.errors import UsageError
from potstill.features.stages import Stage
from potstill.features.student_surgery import (
    MODIFIED_STUDENTS,
    ExpandedStage,
    ProjectedHead,
    rebuild_student,
    require_module_output,
)


class Student(nn.Module):
    """Channels first or last; the last map is written over, as by an activation in place."""

    def __init__(self, layout="NCHW", *, overwrite=False):
        super().__init__()
        self.layout, self.overwrite = layout, overwrite
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.stage = nn.Linear(4, 6) if layout == "NHWC" else nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, images):
        features = self.stem(images)
        features = self.stage(features.permute(0, 2, 3, 1) if self.layout == "NHWC" else features)
        if self.overwrite:
            features.zero_()
        return self.head(features.mean(dim=(1, 2) if self.layout == "NHWC" else (2, 3)))


class Tokens(nn.Module):
    """A class token and 2 x 2 patches."""

    def __init__(self):
        super().__init__()
        self.patches, self.block, self.head = nn.Conv2d(3, 6, 4, stride=4), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, images):
        patches = self.patches(images).flatten(2).transpose(1, 2)
        return self.head(self.block(torch.cat([patches.new_full((len(images), 1, 6), 9.0), patches], dim=1))[:, 0])


FACTS = {
    "projected_head": {"stage": "stage", "channels": 6, "outputs": 8, "classes": 5, "pool_height": 2, "pool_width": 2},
    "expanded_stage": {"stage": "stage", "channels": 6, "expanded": 16, "logit_scale": 2.5},
    "merged_stage": {"stage": "stage", "channels": 6},
    "dual_head": {"head": "head", "alpha": 0.25, "beta": 2.0},
}


def unusual(module):
    """Give every parameter and statistic a value that no fresh module has."""
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return module.eval()


@pytest.mark.parametrize("name", sorted(MODIFIED_STUDENTS))
def test_facts_and_weights_make_the_same_network(name):
    images = torch.randn(2, 3, 8, 8)
    built = unusual(MODIFIED_STUDENTS[name](Student(), **FACTS[name]))
    again = rebuild_student(Student(), json.loads(json.dumps(built.facts))).eval()
    again.load_state_dict(built.state_dict())
    assert torch.equal(again(images), built(images))
    assert torch.equal(copy.deepcopy(built)(images), built(images))
    assert again.facts == built.facts


def test_projected_head_by_hand():
    student = Student()
    joined = unusual(ProjectedHead(student, **FACTS["projected_head"]))
    images = torch.randn(2, 3, 8, 8)
    features = torch.nn.functional.adaptive_avg_pool2d(student.stage.module(student.stem(images)), 2)
    for position in (0, 3, 6):
        conv, norm = joined.projector[position], joined.projector[position + 1]
        features = torch.nn.functional.conv2d(features, conv.weight, padding=conv.kernel_size[0] // 2)
        shape = (1, -1, 1, 1)
        features = (features - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + 1e-5).sqrt()
        features = (features * norm.weight.view(shape) + norm.bias.view(shape)).clamp(min=0)
    wanted = features.mean(dim=(2, 3)) @ joined.head.weight.T + joined.head.bias
    assert torch.allclose(joined(images), wanted, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in joined.head.parameters())


def projected_from(network, images, **facts):
    """What the projector reads."""
    joined = ProjectedHead(network, outputs=2, classes=3, channels=6, **facts).eval()
    seen = []
    joined.projector.register_forward_hook(lambda module, args, output: seen.append(args[0].clone()))
    joined(images)
    return seen[0]


def test_map_is_read_in_any_layout():
    images = torch.randn(2, 3, 8, 8)
    last = Student("NHWC")
    wanted = last.stage(last.stem(images).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert torch.equal(projected_from(last, images, stage="stage", layout="NHWC"), wanted)
    tokens = Tokens()
    wanted = tokens.block(tokens.patches(images).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    read = projected_from(tokens, images, stage="block", layout="tokens", height=2, width=2, prefix=1)
    assert torch.allclose(read, wanted, atol=1e-6)


def test_a_map_that_is_written_over_is_copied():
    images = torch.randn(2, 3, 8, 8)
    student = Student(overwrite=True).requires_grad_(False)
    wanted = student.stage(student.stem(images))
    assert torch.equal(projected_from(student, images, stage="stage", copied=True), wanted)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("scale", [0.0, 2.5])
def test_merged_is_the_same_function(layout, scale):
    student = Student(layout)
    expanded = ExpandedStage(student, stage="stage", channels=6, expanded=24, layout=layout, logit_scale=scale)
    images = torch.randn(4, 3, 8, 8)
    for _ in range(3):  # statistics that are not 0 and 1
        expanded.train()(3 * images + 1)
    expanded.eval()
    before = expanded(images)
    merged = expanded.merged()
    assert torch.allclose(merged(images), before, atol=1e-5)
    assert torch.equal(expanded(images), before)
    assert not merged.training
    # one convolution of 6 x 6 weights and 6 biases on top of the student
    extra = sum(p.numel() for p in merged.parameters()) - sum(p.numel() for p in Student(layout).parameters())
    assert extra == 6 * 6 + 6
    if scale:
        assert torch.allclose(merged(images).var(dim=1, unbiased=False), torch.full((4,), scale**2), rtol=1e-3)


def test_tap_is_the_expanded_map():
    expanded = ExpandedStage(Student(), **FACTS["expanded_stage"])
    assert expanded.get_submodule(expanded.tap)[0].out_channels == 16


@pytest.mark.parametrize("name", sorted(MODIFIED_STUDENTS))
def test_can_be_exported(name):
    images = torch.randn(2, 3, 8, 8)
    built = unusual(MODIFIED_STUDENTS[name](Student(), **FACTS[name]))
    exported = torch.export.export(built, (images,)).module()
    assert torch.allclose(exported(images), built(images), atol=1e-5)


def test_refusals():
    with pytest.raises(UsageError, match="no remodelled network 'expanded_stag'; did you mean 'expanded_stage'"):
        rebuild_student(Student(), {"name": "expanded_stag"})
    with pytest.raises(UsageError, match=r"do not describe a merged_stage: .*unexpected keyword argument 'wide'"):
        rebuild_student(Student(), {"name": "merged_stage", "stage": "stage", "channels": 6, "wide": 3})
    with pytest.raises(UsageError, match="has no layer 'stag'; did you mean 'stage'"):
        rebuild_student(Student(), {"name": "merged_stage", "stage": "stag", "channels": 6})
    with pytest.raises(UsageError, match="leaves a function, not a layer"):
        require_module_output(Stage("act(bn)", 8, 4, 4, "NCHW", module="bn", activated=True), "norm")
    with pytest.raises(UsageError, match="one of several outputs of 'relu'"):
        require_module_output(Stage("relu[3]", 8, 4, 4, "NCHW", module="relu", call=3), "norm")
