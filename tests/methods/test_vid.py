import math

import pytest
import torch
from made_maps import built, labelled, outputs

from potstill.methods.vid import VID, Prediction, vid_loss


def test_equals_a_gaussians_log_likelihood():
    mean, teacher = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    variance = torch.tensor([0.5, 1.0, 3.0])
    gaussian = torch.distributions.Normal(mean, variance.sqrt().view(1, 3, 1, 1).expand_as(mean))
    wanted = -gaussian.log_prob(teacher).mean() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(vid_loss(mean, variance, teacher), wanted)


@pytest.mark.parametrize("variance", [5.0, 0.25])
def test_variances_start_where_asked(variance):
    torch.testing.assert_close(Prediction(2, 3, variance=variance).variance, torch.full((3,), variance))


def test_variances_are_trained():
    student, teacher = outputs((4, 4), (6, 2), grad=True), outputs((5, 4), (7, 2))
    method = built(VID(), student, teacher)
    names = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    assert {"predictions.0.scale", "predictions.1.scale"} <= names
    optimizer = torch.optim.SGD(method.parameters(), lr=1.0)
    method(student, teacher, labelled())["vid"].backward()
    optimizer.step()
    # The teacher's values lie closer than a variance of 5 says, so it falls.
    assert all((prediction.variance < 5).all() for prediction in method.predictions)
