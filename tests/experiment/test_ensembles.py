import numpy as np

from potstill.config.recipe import TeachersSettings
from potstill.evaluation import predictions
from potstill.evaluation.predictions import Predictions
from potstill.experiment import ensembles
from potstill.experiment.ensembles import ensemble_predictions, group_members


def said(*rows):
    found = Predictions.of(np.array(rows, dtype=np.float32), np.zeros(len(rows), dtype=np.int64))
    return dict.fromkeys(("train", "val", "test"), found)


def test_averaged_logits_are_the_geometric_mean():
    both = {"teacher": said([0.5, 0.5]), "teacher-2": said([0.9, 0.1])}
    found = ensemble_predictions(both, TeachersSettings())["teachers"]["test"]
    np.testing.assert_allclose(found.array, [[0.75, 0.25]], rtol=1e-6)  # sqrt(0.45) : sqrt(0.05) = 3 : 1


def test_averaged_probabilities_are_the_weighted_mean():
    both = {"teacher": said([0.5, 0.5]), "teacher-2": said([0.9, 0.1])}
    settings = TeachersSettings(combine="probabilities", weights=[1, 3])
    np.testing.assert_allclose(ensemble_predictions(both, settings)["teachers"]["test"].array, [[0.8, 0.2]], rtol=1e-6)


def test_a_probability_of_0_stays_finite():
    both = {"teacher": said([1.0, 0.0]), "teacher-2": said([1.0, 0.0])}
    np.testing.assert_allclose(
        ensemble_predictions(both, TeachersSettings())["teachers"]["val"].array, [[1.0, 0.0]], atol=1e-30
    )


def test_generations_are_averaged_by_probability_whatever_the_teachers_are():
    found = ensemble_predictions(
        {"generation-1": said([0.2, 0.8]), "distilled": said([0.6, 0.4]), "baseline": said([1.0, 0.0])},
        TeachersSettings(weights=[1, 5]),
    )
    assert list(found) == ["generations"]
    np.testing.assert_allclose(found["generations"]["test"].array, [[0.4, 0.6]], rtol=1e-6)


def test_what_is_too_large_to_hold_is_mixed_block_by_block(monkeypatch):
    both = {"teacher": said([0.5, 0.5], [0.2, 0.8]), "teacher-2": said([0.9, 0.1], [0.2, 0.8])}
    held = ensemble_predictions(both, TeachersSettings())["teachers"]["test"]
    monkeypatch.setattr(ensembles, "MAX_VALUES_IN_MEMORY", 0)
    monkeypatch.setattr(predictions, "_BLOCK_VALUES", 2)  # a row at once
    mixed = ensemble_predictions(both, TeachersSettings())["teachers"]["test"]
    assert mixed.array is None
    np.testing.assert_allclose(np.concatenate([block for _, block in mixed.probabilities.blocks()]), held.array)
    np.testing.assert_allclose(mixed.confidence, held.confidence)


def test_one_alone_is_itself():
    found = ensemble_predictions({"teacher": said([0.3, 0.7]), "distilled": said([0.5, 0.5])}, TeachersSettings())
    assert list(found) == ["teachers"]
    np.testing.assert_allclose(found["teachers"]["test"].array, [[0.3, 0.7]], rtol=1e-6)
    assert ensemble_predictions({"distilled": said([0.5, 0.5])}, TeachersSettings()) == {}


def test_members_come_in_order():
    names = ["distilled", "generation-2", "teacher-2", "baseline", "generation-1", "teacher", "assistant-1"]
    assert group_members("teachers", names) == ["teacher", "teacher-2"]
    assert group_members("generations", names) == ["generation-1", "generation-2", "distilled"]
