import pytest
import torch
import torch.nn.functional as F
from made_maps import built, labelled, outputs

from potstill.errors import UsageError
from potstill.methods.afd import AFD, afd_loss


def test_equals_loops_over_images_and_stages():
    student = [torch.randn(3, 2, 8, 8).double(), torch.randn(3, 5, 2, 2).double()]
    teacher = [torch.randn(3, 4, 4, 4).double(), torch.randn(3, 6, 2, 2).double(), torch.randn(3, 6, 4, 4).double()]
    attention = torch.rand(3, 3, 2).double().softmax(dim=2)

    def energy(features, size):
        squared = features.square().mean(dim=0)  # before the size changes
        resized = F.adaptive_avg_pool2d(squared[None], size).flatten()
        return resized / resized.norm()

    wanted = 0.0
    for b in range(3):
        for t in range(3):
            for s in range(2):
                size = teacher[t].shape[2]
                error = (energy(student[s][b], size) - energy(teacher[t][b], size)).square().mean()
                wanted += attention[b, t, s] * error / 3
    torch.testing.assert_close(afd_loss(student, teacher, attention), wanted, rtol=1e-12, atol=0)


def test_attention_by_hand():
    student, teacher = outputs((4, 4), (6, 2), batch=8), outputs((5, 4), (7, 2), (7, 1), batch=8)
    method = built(AFD(dimension=3), student, teacher).eval()  # BatchNorm as it starts: divides by sqrt(1 + 1e-5)
    net, scale = method.attention, (1 + 1e-5) ** -0.5
    attention = net(student.maps, teacher.maps)
    assert attention.shape == (8, 3, 2)
    energies = torch.zeros(8, 3, 2)
    for t in range(3):
        query = scale * net.queries[t][0](teacher.maps[t].mean(dim=(2, 3)))
        for s in range(2):
            key = scale * net.keys[s][0](student.maps[s].mean(dim=(2, 3)))
            key = scale * net.bilinear[0](key.relu())[:, 3 * t : 3 * t + 3]
            codes = (net.teacher_codes[t] * net.student_codes[s]).sum()
            energies[:, t, s] = ((key * query).sum(dim=1) + codes) / 3**0.5
    torch.testing.assert_close(attention, energies.softmax(dim=2))


def test_refuses_a_student_of_one_stage():
    with pytest.raises(UsageError, match="Use at"):
        built(AFD(), outputs((4, 4)), outputs((5, 4), (6, 2)))


def test_weight_of_the_authors_script():
    student, teacher = outputs((4, 4), (6, 2), grad=True), outputs((5, 4), (7, 2))
    method = built(AFD(), student, teacher).eval()
    wanted = 200 * afd_loss(student.maps, teacher.maps, method.attention(student.maps, teacher.maps))
    torch.testing.assert_close(method(student, teacher, labelled())["afd"], wanted)
