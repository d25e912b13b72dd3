import pytest
import torch
from made_maps import built, labelled, outputs

from potstill.errors import UsageError
from potstill.methods.vitkd import ViTKD


def make(**options):
    student = outputs((4, 4), (4, 4), (4, 4), (4, 4), grad=True)
    teacher = outputs((6, 4), (6, 4), (6, 4), (6, 4))
    return built(ViTKD(**options), student, teacher), student, teacher


def test_mimics_the_first_two_stages_with_a_layer_each():
    method, student, teacher = make()
    wanted = sum(
        (method.aligns[stage](student.maps[stage]) - teacher.maps[stage]).square().sum() / 4 for stage in (0, 1)
    )
    terms = method(student, teacher, labelled())
    torch.testing.assert_close(terms["mimic"], 3e-5 * wanted, rtol=1e-5, atol=0)


def test_generates_the_masked_tokens_only():
    method, student, teacher = make()
    drawn = torch.rand(4, 16)
    method.draw = lambda tokens: drawn
    tokens = method.aligns[2](student.maps[3]).flatten(2)
    masked = torch.zeros(4, 1, 16)
    for image in range(4):
        masked[image, 0, drawn[image].argsort()[8:]] = 1  # the half with the largest numbers
    filled = (tokens * (1 - masked)).view(4, 6, 4, 4)  # the learnt token starts at 0
    generated = method.generator.conv2(method.generator.conv1(filled).relu())
    error = (generated - teacher.maps[3]).square().sum(dim=1).flatten(1)
    wanted = 3e-6 / 0.5 * (error * masked[:, 0]).sum() / 4
    torch.testing.assert_close(method(student, teacher, labelled())["generation"], wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("share", "masked"), [(0.5, 8), (0.25, 4), (0.9, 15), (1.0, 16)])
def test_masks_the_same_number_in_every_image(share, masked):
    method, student, _ = make(mask_share=share)
    assert method._mask(student.maps[3]).sum(dim=(1, 2, 3)).tolist() == [masked] * 4


def test_a_masked_token_is_not_seen():
    method, student, teacher = make(mask_share=1.0)
    method(student, teacher, labelled())["generation"].backward()
    assert student.maps[3].grad.abs().sum() == 0
    assert method.generator.mask_token.grad.abs().sum() > 0


def test_refuses_to_mask_nothing():
    with pytest.raises(UsageError, match="mask_share must be above 0"):
        ViTKD(mask_share=0.0)
