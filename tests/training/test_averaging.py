import pytest
import torch
from torch import nn

from potstill.training.averaging import ModelEma, warmed_up_decay


def network(value: float) -> nn.Module:
    """Every weight and statistic is ``value``; the counter of batches is 1 + value."""
    made = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with torch.no_grad():
        for tensor in [*made.parameters(), *made.buffers()]:
            tensor.fill_(value + (not tensor.is_floating_point()))
    return made


@pytest.mark.parametrize(
    ("decay", "updates", "wanted"),
    [(0.999, 0, 0.1), (0.999, 1, 2 / 11), (0.999, 80, 0.9), (0.999, 8990, 0.999), (0.5, 90, 0.5)],
)
def test_decays_by_hand(decay: float, updates: int, wanted: float) -> None:
    assert warmed_up_decay(decay, updates) == pytest.approx(wanted)


def test_three_updates_by_hand() -> None:
    """1 is copied; then 2/11 of it and 9/11 of 2; then 3/12 of that and 9/12 of 4.  Statistics as weights."""
    average = ModelEma(network(0.0), 0.9999)
    for value in (1.0, 2.0, 4.0):
        average.update_parameters(network(value))
    wanted = 3 / 12 * (2 / 11 * 1 + 9 / 11 * 2) + 9 / 12 * 4
    assert average.module[0].weight[0, 0].item() == pytest.approx(wanted)
    assert average.module[1].running_mean[0].item() == pytest.approx(wanted)
    assert average.module[1].running_var[0].item() == pytest.approx(wanted)
    assert average.module[1].num_batches_tracked.item() == 5  # a count: the last one


def test_a_short_training_is_not_averaged_with_its_beginning() -> None:
    """80 steps whose weights rise from 0 to 79: with a constant decay of 0.9999 the average would be 0.3."""
    average = ModelEma(network(0.0), 0.9999)
    for step in range(80):
        average.update_parameters(network(float(step)))
    assert average.module[0].bias[0].item() > 70


def test_a_loaded_state_goes_on_with_its_decay() -> None:
    whole, first = ModelEma(network(0.0), 0.99), ModelEma(network(0.0), 0.99)
    for value in range(6):
        whole.update_parameters(network(value))
    for value in range(3):
        first.update_parameters(network(value))
    second = ModelEma(network(0.0), 0.99)
    second.load_state_dict(first.state_dict())
    for value in range(3, 6):
        second.update_parameters(network(value))
    assert all(
        torch.equal(a, b) for a, b in zip(second.state_dict().values(), whole.state_dict().values(), strict=True)
    )
