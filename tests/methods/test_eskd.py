import pytest
import torch

from potstill.methods import create_method
from potstill.types import Batch, Outputs

STUDENT, TEACHER = Outputs(torch.tensor([[1.0, 0.0], [0.0, 2.0]])), Outputs(torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
BATCH = Batch(torch.zeros(2, 3, 2, 2), torch.tensor([0, 1]))


def test_the_teacher_is_heard_in_the_first_share_of_the_epochs_only():
    method = create_method("eskd", base_method={"name": "kd", "alpha": 0.25}, stop=0.5)
    inner = create_method("kd", alpha=0.25)(STUDENT, TEACHER, BATCH)
    ce = torch.nn.functional.cross_entropy(STUDENT.logits, BATCH.labels)
    for epoch in range(6):
        method.start_epoch(epoch, 6)
        terms = method(STUDENT, TEACHER, BATCH)
        if epoch < 3:
            assert {name: term.item() for name, term in terms.items()} == pytest.approx(
                {name: term.item() for name, term in inner.items()}
            )
        else:
            assert {name: term.item() for name, term in terms.items()} == pytest.approx({"ce": ce.item()})


@pytest.mark.parametrize(("stop", "heard"), [(0.0, 0), (0.3, 2), (1.0, 5)])
def test_ends_by_hand(stop, heard):
    method = create_method("eskd", stop=stop)
    found = []
    for epoch in range(5):
        method.start_epoch(epoch, 5)
        found.append("kd" in method(STUDENT, TEACHER, BATCH))
    assert found == [True] * heard + [False] * (5 - heard)
