import pytest
import torch

from potstill.errors import NonFiniteError
from potstill.evaluation.metrics import TermAverages


def test_means_are_weighted_by_images():
    averages = TermAverages()
    averages.update({"ce": torch.tensor(1.0), "kd": torch.tensor(10.0)}, 3)
    averages.update({"ce": torch.tensor(5.0), "kd": torch.tensor(30.0)}, 1)
    assert averages.compute("here") == {"ce": 2.0, "kd": 15.0}


def test_a_term_that_a_step_lacks_is_averaged_over_the_others():
    averages = TermAverages()
    averages.update({"ce": torch.tensor(1.0), "relation": torch.tensor(4.0)}, 2)
    averages.update({"ce": torch.tensor(3.0), "relation": torch.tensor(1.0)}, 1)
    averages.update({"ce": torch.tensor(7.0)}, 1)
    assert averages.compute("here") == {"ce": 3.0, "relation": 3.0}  # (2 + 3 + 7) / 4 and (8 + 1) / 3


def test_the_first_bad_step_and_its_terms_are_named():
    averages = TermAverages()
    averages.update({"ce": torch.tensor(1.0), "kd": torch.tensor(1.0)}, 2)
    averages.update({"ce": torch.tensor(1.0), "kd": torch.tensor(float("nan"))}, 2)
    averages.update({"ce": torch.tensor(float("inf")), "kd": torch.tensor(float("nan"))}, 2)
    with pytest.raises(NonFiniteError, match="epoch 3: at step 2 the loss term kd is nan"):
        averages.compute("epoch 3")
