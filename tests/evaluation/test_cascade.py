"""The promise of a cascade, by simulation: fresh calibration images each time, and the risk on a large population."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from potstill.errors import ArtifactError, UsageError
from potstill.evaluation.cascade import CONFIDENCE, Cascade, CascadeCalibration, cascade_figures
from potstill.input_spec import InputSpec
from potstill.io import write_checksummed_json
from potstill.models.factory import create_model
from potstill.models.model_file import Classifier, save_model

POPULATION = 40_000


def population(seed: int, epochs: int = 1, shared: float = 0.97):
    """Confidence and correctness of a student in each of several epochs [E, N], and of a teacher [N].

    The student's confidence is what it is worth on average; epochs differ as successive ones of a training do.
    """
    random = np.random.default_rng(seed)
    difficulty = random.normal(0, 1, POPULATION)
    noise = shared**0.5 * random.normal(0, 1, POPULATION) + (1 - shared) ** 0.5 * random.normal(
        0, 1, (epochs, POPULATION)
    )
    logit = 1.5 + 1.5 * (noise - difficulty)
    confidence = 1 / (1 + np.exp(-logit))
    right = random.random((epochs, POPULATION)) if shared < 1 else random.random(POPULATION)[None]
    teacher = random.random(POPULATION) < 1 / (1 + np.exp(-(3 - 1.5 * difficulty)))
    return confidence, right < confidence, teacher


def true_risk(threshold, confidence, student, teacher) -> float:
    return float(((confidence > threshold) & ~student & teacher).mean())


@pytest.mark.parametrize("images", [150, 1000])
@pytest.mark.parametrize("risk", [0.02, 0.05])
def test_the_promised_risk_holds_in_95_of_100_resamples(images: int, risk: float) -> None:
    (confidence,), (student,), teacher = population(0)
    random = np.random.default_rng(images)
    risks, deferred = [], []
    for _ in range(400):
        rows = random.integers(0, POPULATION, images)
        found = CascadeCalibration.fit(confidence[rows], student[rows], teacher[rows])
        step = found.step(risk)
        threshold = 1.0 if step is None else step[0]
        risks.append(true_risk(threshold, confidence, student, teacher))
        deferred.append((confidence <= threshold).mean())
    held = np.mean(np.array(risks) <= risk)
    # The share that holds is an estimate of 95 % or more from 400 resamples: three standard errors below are 91.7 %.
    assert held >= CONFIDENCE - 3 * (CONFIDENCE * (1 - CONFIDENCE) / 400) ** 0.5
    assert np.mean(risks) < risk  # and so it holds on average
    if images == 1000:
        assert np.mean(risks) > risk / 3  # not by asking the teacher always
        assert np.mean(deferred) < 0.7


def test_the_promise_holds_where_the_same_images_chose_epoch_and_temperature() -> None:
    """Epochs that are equally good, of which the luckiest on val is taken; then its confidence is scaled."""
    epochs, images, risk = 40, 200, 0.05
    confidence, student, teacher = population(1, epochs, shared=0.5)
    held = {1: 0, epochs: 0}
    random = np.random.default_rng(2)
    for _ in range(300):
        rows = random.integers(0, POPULATION, images)
        best = int(student[:, rows].mean(axis=1).argmax())
        logits = np.log(confidence[best] / (1 - confidence[best]))
        grid = np.linspace(0.3, 3, 28)
        right = student[best, rows]
        losses = [np.logaddexp(0, np.where(right, -1, 1) * logits[rows] / each).mean() for each in grid]
        scaled = 1 / (1 + np.exp(-logits / grid[int(np.argmin(losses))]))
        for candidates in held:
            step = CascadeCalibration.fit(scaled[rows], right, teacher[rows], candidates).step(risk)
            threshold = 1.0 if step is None else step[0]
            held[candidates] += true_risk(threshold, scaled, student[best], teacher) <= risk
    assert held[epochs] / 300 >= CONFIDENCE
    assert held[1] / 300 < CONFIDENCE - 0.03  # what the correction is for


def test_the_bound_is_that_of_clopper_and_pearson() -> None:
    for lost, images in ((0, 59), (3, 200), (40, 1000)):
        found = CascadeCalibration(images, 1, ((0.0, lost, images),))
        expected = stats.binomtest(lost, images, alternative="less").proportion_ci(0.95, method="exact").high
        assert found.bound(lost) == pytest.approx(expected, rel=1e-9)
    three = CascadeCalibration(59, 5, ((0.0, 0, 59),)).bound(0)
    assert three == pytest.approx(1 - 0.01 ** (1 / 59))  # by hand: (1 - R)^59 = 5 % / 5
    assert CascadeCalibration(5, 1, ((0.0, 5, 5),)).bound(5) == 1


def test_steps_by_hand() -> None:
    confidence = np.array([0.99, 0.9, 0.8, 0.8, 0.7, 0.6, 0.5])
    student = np.array([True, True, False, True, False, False, True])
    teacher = np.array([False, True, True, True, False, True, True])  # both are wrong at 0.7: no risk
    found = CascadeCalibration.fit(confidence, student, teacher)
    assert found.steps == ((0.8, 0, 2), (0.6, 1, 5), (0.0, 2, 7))
    assert [found.step(risk) for risk in (0.34, 0.5, 0.66)] == [None, found.steps[1 - 1], found.steps[2]]
    assert CascadeCalibration.from_dict(json.loads(json.dumps(found.as_dict())), "here") == found


def test_a_student_without_mistakes_needs_no_teacher() -> None:
    right = np.ones(300, dtype=bool)
    found = CascadeCalibration.fit(np.linspace(0.3, 1, 300), right, right)
    assert found.threshold(0.0100) == 0  # 1 - 0.05 ** (1 / 300) = 0.00994
    assert found.smallest_risk == 0.01
    with pytest.raises(UsageError, match=r"0\.005 cannot be promised by 300 .* nearest risk that can be is 0\.01$"):
        found.threshold(0.005)


def test_the_surest_answer_being_wrong_is_no_reason_to_crash() -> None:
    confidence, right = np.linspace(0.3, 1, 300), np.ones(300, dtype=bool)
    student = right.copy()
    student[-1] = False
    found = CascadeCalibration.fit(confidence, student, right)
    assert found.steps[0] == (1.0, 0, 0)  # where the student never answers
    assert found.smallest_risk == pytest.approx(found.bound(1), abs=1e-4)
    assert found.step(found.smallest_risk) == (0.0, 1, 300)
    assert found.step(0.012) is None


@pytest.mark.parametrize("risk", [0.0, 1.0, -0.1, float("nan")])
def test_a_risk_is_a_share(risk: float) -> None:
    with pytest.raises(UsageError, match="above 0 and below 1"):
        CascadeCalibration(10, 1, ((0.0, 0, 10),)).threshold(risk)


def test_a_risk_in_percent_is_named_as_a_share() -> None:
    with pytest.raises(UsageError, match=r"got 2; for 2 % give 0\.02$"):
        CascadeCalibration(10, 1, ((0.0, 0, 10),)).threshold(2)


def test_figures_on_test_by_hand() -> None:
    calibration = CascadeCalibration(1000, 1, ((0.75, 0, 400), (0.0, 300, 1000)))
    confidence = np.array([0.9, 0.8, 0.7, 0.6])
    student, teacher = np.array([True, False, False, True]), np.array([True, True, True, False])
    found = cascade_figures(calibration, confidence, student, teacher, risks=(0.001, 0.01))
    # The teacher answers none, the image of 0.6, of 0.7 too, of 0.8 too, all.
    assert found["curve"] == [[0, 0.5], [0.25, 0.25], [0.5, 0.5], [0.75, 0.75], [1, 0.75]]
    assert found["risks"][0] == {"risk": 0.001}
    row = found["risks"][1]
    assert (row["threshold"], row["deferred_calibration"], row["deferred"]) == (0.75, 0.6, 0.5)
    assert (row["top1"], row["lost"]) == (0.5, 0.25)
    assert found["smallest_risk"] == 0.003  # 1 - 0.05 ** (1 / 1000)


def folders(root: Path) -> Cascade:
    for stage in ("distilled", "teacher"):
        (root / stage).mkdir(parents=True)
        write_checksummed_json(root / stage / "model.json", {"sha256": stage})
    cascade = Cascade("distilled", ("teacher",), "logits", None, CascadeCalibration(10, 1, ((0.0, 0, 10),)))
    cascade.write(root)
    return cascade


def test_the_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = folders(tmp_path)
    assert Cascade.read(tmp_path / "distilled") == written


def test_a_changed_file_and_other_weights_are_refused(tmp_path: Path) -> None:
    folders(tmp_path)
    path = tmp_path / "distilled" / "cascade.json"
    good = path.read_bytes()
    path.write_bytes(good.replace(b'"images": 10', b'"images": 11') if b'"images": 10' in good else good[:-5])
    with pytest.raises(ArtifactError, match="damaged"):
        Cascade.read(tmp_path / "distilled")
    path.write_bytes(good)
    write_checksummed_json(tmp_path / "teacher" / "model.json", {"sha256": "another"})
    with pytest.raises(ArtifactError, match="other weights of teacher"):
        Cascade.read(tmp_path / "distilled")
    (tmp_path / "teacher" / "model.json").unlink()
    with pytest.raises(ArtifactError, match="run folder with student and teacher"):
        Cascade.read(tmp_path / "distilled")
    with pytest.raises(ArtifactError, match=r"no cascade \(cascade\.json\): give the run folder"):
        Cascade.read(tmp_path)


def test_an_encoder_lacks_its_head_before_its_cascade(tmp_path: Path) -> None:
    module = create_model("cifar/resnet8", 2, size=16)
    spec = InputSpec(16, (0.5,) * 3, (0.2,) * 3)
    save_model(Classifier(module, "cifar/resnet8", ("a", "b"), spec, facts={"head": {"kind": "none"}}), tmp_path)
    with pytest.raises(ArtifactError, match="which predicts nothing"):
        Cascade.read(tmp_path)


@pytest.mark.parametrize(
    "steps", [[], [[0.5, 0, 1]], [[0.0, 3, 2]], [[0.5, 1, 2], [0.0, 0, 3]], [[0.0, 0, 11]], [["a", 0, 0]]]
)
def test_steps_that_contradict_each_other_are_refused(steps) -> None:
    with pytest.raises(ArtifactError, match="calibration of a cascade"):
        CascadeCalibration.from_dict({"images": 10, "candidates": 1, "steps": steps}, "here")
