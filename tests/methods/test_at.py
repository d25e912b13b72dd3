import pytest
import torch
from parity_case import Case, read_index

from potstill.methods.at import AT, at_loss

PAPER = "paper_form_torchdistill_mode_paper"
WITH_PAPER = [entry for method, entry in read_index() if method == "at" and entry["name"] in ("single", "multi")]


@pytest.mark.parametrize("entry", WITH_PAPER, ids=lambda entry: entry["name"])
def test_paper_form_equals_torchdistills(entry):
    case = Case("at", entry, torch.float64)
    loss = at_loss(case.many("fs"), case.many("ft"), form="paper")
    wanted = case.wanted("paper")
    torch.testing.assert_close(loss.detach(), wanted[PAPER], rtol=1e-10, atol=0)
    loss.backward()
    torch.testing.assert_close(case["fs.0"].grad, wanted[f"{PAPER}.grad/fs.0"], rtol=1e-8, atol=1e-12)


def test_larger_map_is_averaged_before_it_is_squared():
    student = torch.tensor([[[[1.0, -1.0], [2.0, 2.0]]]])  # mean 1
    wide = torch.nn.functional.pad(student, (0, 2))  # two more columns of 0
    teacher = torch.tensor([[[[1.0, 0.0]]]])
    # Averaged to 1 x 2 it is (1, 0): its attention map equals the teacher's.
    assert at_loss([wide], [teacher]).item() == pytest.approx(0.0, abs=1e-12)
    # 3 and -3 cancel, so that only the right half looks at anything; squared first, the left half would.
    other = torch.tensor([[[[3.0, -3.0, 1.0, 1.0]]]])
    assert at_loss([other], [torch.tensor([[[[0.0, 5.0]]]])]).item() == pytest.approx(0.0, abs=1e-12)


def test_size_of_a_map_counts_in_the_release_and_not_in_the_paper():
    student, teacher = torch.rand(2, 3, 2, 2), torch.rand(2, 3, 2, 2)
    doubled = [features.repeat(1, 1, 2, 1) for features in (student, teacher)]  # each place twice: A shrinks by sqrt 2
    release = at_loss([student], [teacher]) / at_loss(*([each] for each in doubled))
    assert release.item() == pytest.approx(2.0, rel=1e-5)
    paper = at_loss([student], [teacher], form="paper") / at_loss(*([each] for each in doubled), form="paper")
    assert paper.item() == pytest.approx(1.0, rel=1e-5)


def test_odd_powers_lose_the_sign_in_the_paper_only():
    student, teacher = torch.tensor([[[[-1.0, 0.0]]]]), torch.tensor([[[[2.0, 0.0]]]])
    assert at_loss([student], [teacher], power=3).item() == pytest.approx(2.0)  # (-1, 0) and (1, 0)
    assert at_loss([student], [teacher], power=3, form="paper").item() == 0


def test_defaults_are_those_of_the_published_numbers():
    method = AT()
    assert (method.weight, method.power, method.form, method.ce_weight) == (1000.0, 2, "release", 1.0)
