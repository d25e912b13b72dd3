import pytest
import torch

from potstill.errors import UsageError
from potstill.methods import create_method
from potstill.types import Batch, Outputs

STUDENT = Outputs(torch.tensor([[1.0, 0.0, -1.0], [0.5, 0.2, 0.1]]))
TEACHER = Outputs(torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
BATCH = Batch(torch.zeros(2, 3, 2, 2), torch.tensor([0, 1]))
KD = {"name": "kd", "temperature": 4.0, "alpha": 0.1}


def test_terms_are_weighted_and_there_is_one_cross_entropy():
    combined = create_method("combined", methods=[KD | {"factor": 2.0}, {"name": "kd", "alpha": 0.5}], ce_weight=0.3)
    terms = combined(STUDENT, TEACHER, BATCH)
    first = create_method(**KD)(STUDENT, TEACHER, BATCH)["kd"]
    second = create_method("kd")(STUDENT, TEACHER, BATCH)["kd"]
    assert list(terms) == ["ce", "kd", "kd_kd"]
    torch.testing.assert_close(terms["ce"], 0.3 * torch.nn.functional.cross_entropy(STUDENT.logits, BATCH.labels))
    torch.testing.assert_close(terms["kd"], 2 * first)
    torch.testing.assert_close(terms["kd_kd"], second)


def test_needs_are_united():
    combined = create_method("combined", methods=[KD, {"name": "fitnet"}, {"name": "at"}])
    assert combined.needs.maps != "none"
    assert combined.needs.teacher
    assert [part.needs.maps for part in combined.parts] == ["none", "middle", "pairs"]


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([KD], "two methods or more"),
        ([KD, {"name": "kdd"}], r"methods\[1\].*did you mean 'kd'"),
        ([KD, {"name": "kd", "temprature": 1}], r"methods\[1\].*did you mean 'temperature'"),
        ([KD, KD | {"factor": -1}], r"methods\[1\].factor"),
        ([KD, {"temperature": 1}], r"methods\[1\].name must be given"),
        ([KD, {"name": "cskd"}, {"name": "mlld"}], "different second images"),
    ],
)
def test_bad_lists_are_refused(methods, message):
    with pytest.raises(UsageError, match=message):
        create_method("combined", methods=methods)


def test_what_comes_from_labels_is_known_of_each():
    combined = create_method("combined", methods=[KD, {"name": "mlld"}])
    assert combined.label_term_names == {"ce", "ce_strong"}


def test_a_methods_own_weight_stays_its_own():
    combined = create_method("combined", methods=[KD, {"name": "at", "weight": 7.0, "factor": 0.5}])
    assert combined.each()[1].weight == 7.0
    assert combined.factors == [1.0, 0.5]
