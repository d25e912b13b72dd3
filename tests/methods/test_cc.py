import numpy as np
import pytest
import torch
from made_outputs import made_batch, made_outputs, side
from parity_case import OWN

from potstill.errors import UsageError
from potstill.functional import cc_kernel_loss, cc_loss
from potstill.methods.base import TrainingInfo
from potstill.methods.cc import CC


def test_against_a_loop_over_neighbours():
    student, teacher = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    deviation = (student - teacher).abs().tolist()
    wanted = sum(deviation[i][d] * deviation[i + 1][d] for i in range(4) for d in range(3)) / 4
    assert cc_loss(student, teacher).item() == pytest.approx(wanted, rel=1e-12)


def test_kernel_form_equals_the_public_implementation_of_the_papers():
    arrays = np.load(OWN / "cc.npz", allow_pickle=False)
    names = {key.split("/", 2)[0] for key in arrays.files if key.endswith("paper/aberhu_rbf_taylor")}
    assert names
    for name in names:
        part = {key[len(name) + 1 :]: torch.tensor(arrays[key]) for key in arrays.files if key.startswith(f"{name}/")}
        student, teacher = (
            part[f"in/{features}"].double() @ part[f"param/embed_{side}.weight"].double().T
            + part[f"param/embed_{side}.bias"].double()
            for features, side in (("fs", "student"), ("ft", "teacher"))
        )
        assert cc_kernel_loss(student, teacher).item() == pytest.approx(
            part["paper/aberhu_rbf_taylor"].item(), rel=1e-10
        )


@pytest.mark.parametrize("form", ["neighbours", "kernel"])
def test_both_embeddings_learn(form):
    student, teacher = made_outputs(), made_outputs(seed=1, width=8, grad=False)
    method = CC(form=form, dim=4, weight=0.5)
    method.build(side(student), side(teacher), TrainingInfo(3))
    term = method.distill(student, teacher, made_batch())["congruence"]
    loss = cc_loss if form == "neighbours" else cc_kernel_loss
    wanted = loss(method.embed_student(student.embedding), method.embed_teacher(teacher.embedding))
    assert term.item() == pytest.approx(0.5 * wanted.item())
    term.backward()
    assert method.embed_student.weight.grad.norm() > 0
    assert method.embed_teacher.weight.grad.norm() > 0
    assert student.maps[0].grad.norm() > 0


def test_refuses_one_image_and_unequal_widths():
    with pytest.raises(UsageError, match="cc compares the images"):
        cc_loss(torch.zeros(1, 3), torch.zeros(1, 3))
    with pytest.raises(UsageError, match="must have one shape"):
        cc_loss(torch.zeros(2, 3), torch.zeros(2, 4))
