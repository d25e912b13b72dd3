import pytest
import torch
import torch.nn.functional as F
from made_maps import built, labelled, outputs
from parity_case import Case, read_index

from potstill.methods.ft import FT, ft_loss

FACTORS = [entry for method, entry in read_index() if method == "ft" and entry["name"] == "factors"]


@pytest.mark.parametrize("entry", FACTORS, ids=lambda entry: entry["name"])
def test_paper_form_equals_that_of_two_other_libraries(entry):
    case = Case("ft", entry, torch.float64)
    loss = ft_loss(case["factor_s"], case["factor_t"], form="paper")
    wanted = case.wanted("paper")
    torch.testing.assert_close(loss.detach(), wanted["paper_flattened_factor"], rtol=1e-10, atol=0)
    loss.backward()
    gradient = wanted["paper_flattened_factor.grad/factor_s"]
    torch.testing.assert_close(case["factor_s"].grad, gradient, rtol=1e-8, atol=1e-12)


def passes(teacher, counted):
    def one():
        counted.append(1)
        yield from [(teacher, labelled())] * 5

    return one


def test_paraphraser_learns_before_training_and_never_again():
    student, teacher = outputs((4, 4), grad=True), outputs((6, 4))
    method = built(FT(paraphraser_epochs=40), student, teacher).train()
    assert not any(p.requires_grad for p in method.paraphraser.parameters())
    before = [p.clone() for p in method.paraphraser.parameters()]
    counted = []
    with torch.no_grad():
        method.prepare(passes(teacher, counted))
    assert len(counted) == 40
    assert not any(torch.equal(p, q) for p, q in zip(before, method.paraphraser.parameters(), strict=True))
    assert not any(p.requires_grad or p.grad is not None for p in method.paraphraser.parameters())
    assert not method.paraphraser.training
    assert method.translator.training

    resumed = built(FT(), student, teacher)
    resumed.load_state_dict(method.state_dict())
    resumed.prepare(passes(teacher, counted))
    assert len(counted) == 40
    method(student, teacher, labelled())["factors"].backward()
    assert all(p.grad is None for p in method.paraphraser.parameters())


def test_factor_suffices_to_restore_the_map():
    teacher = outputs((6, 4))
    method = built(FT(rate=1.0, paraphraser_epochs=100), outputs((4, 4)), teacher)
    restored = []

    def watch(found, wanted):
        restored.append(mse(found, wanted))
        return restored[-1]

    mse = F.mse_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("potstill.methods.ft.F.mse_loss", watch)
        method.prepare(passes(teacher, []))
    assert restored[-1].item() < 0.2 * restored[0].item()


def test_rate_gives_the_factors_channels():
    method = built(FT(rate=0.5), outputs((4, 4)), outputs((7, 4)))
    assert method.paraphraser.conv3.out_channels == method.translator.conv3.out_channels == 3
