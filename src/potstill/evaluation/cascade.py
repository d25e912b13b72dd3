"""A cascade: the student answers where it is confident, the teacher everywhere else.  No torch here.

The risk of a cascade is the share of images on which the student answers, is wrong, and the teacher would have been
right.  It is at least as large as the cascade's error minus the teacher's.  It only falls if the student answers less
often, and is 0 if the teacher always answers.

The threshold of the student's confidence is calibrated on n labelled images, so that the risk is at most R with 95 %
confidence over the draw of these images: it is the lowest threshold above which k of them count as risk, where k is the
largest number with P(Binomial(n, R) <= k) <= 5 %, the bound of Clopper and Pearson.  As the risk falls with the
threshold, the bound need not hold for all thresholds at once (S. Bates et al., Distribution-free, risk-controlling
prediction sets, J. ACM 68, 2021; A. Angelopoulos et al., Learn then Test, arXiv 2110.01052).  Conformal risk control
(A. Angelopoulos et al., arXiv 2208.02814) defers fewer images, and promises the mean over many calibrations only.

The images of a run's val have also chosen the student's epoch.  Each epoch is a candidate, and the 5 % are divided by
their number (Bonferroni), so that the promise holds whichever of them was chosen.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from potstill.errors import ArtifactError, UsageError
from potstill.evaluation import Array
from potstill.evaluation.significance import wilson_interval
from potstill.io import read_checksummed_json, write_checksummed_json

CASCADE_FILE = "cascade.json"  # beside the student's model.json
CONFIDENCE = 0.95  # of the promise
DEFAULT_RISK = 0.05
REPORTED_RISKS = (0.01, 0.02, 0.05, 0.1)
_CURVE_POINTS = 101


@dataclass(frozen=True)
class CascadeCalibration:
    """What is known of the student's confidence on labelled images: enough for the threshold of any risk."""

    images: int  # n
    candidates: int  # networks among which these images have chosen the student
    # (threshold, images above it that count as risk, images above it), from the highest threshold to 0; an image is
    # above if its confidence is greater.  Between two thresholds only the last number changes.
    steps: tuple[tuple[float, int, int], ...]

    @staticmethod
    def fit(
        confidence: Array, student_correct: Array, teacher_correct: Array, candidates: int = 1
    ) -> "CascadeCalibration":
        """Return the calibration by labelled images: confidences [N] in (0, 1], and which of both networks' answers are
        right.

        ``candidates``: networks among which these images have chosen the student.

        Example:
            >>> confidence = np.array([0.9, 0.8, 0.7, 0.6])
            >>> student, teacher = np.array([True, False, True, False]), np.array([True, True, True, True])
            >>> CascadeCalibration.fit(confidence, student, teacher).steps
            ((0.8, 0, 1), (0.6, 1, 3), (0.0, 2, 4))
        """
        count = len(confidence)
        if not count or not count == len(student_correct) == len(teacher_correct):
            lengths = [count, len(student_correct), len(teacher_correct)]
            raise UsageError(f"a cascade is calibrated on the same images of student and teacher, got {lengths}")
        values = np.asarray(confidence, dtype=np.float64)
        lost = np.sort(values[np.asarray(teacher_correct, dtype=bool) & ~np.asarray(student_correct, dtype=bool)])
        ranked, thresholds = np.sort(values), np.append(np.unique(lost)[::-1], 0.0)
        above = [len(each) - np.searchsorted(each, thresholds, side="right") for each in (lost, ranked)]
        columns = zip(thresholds.tolist(), *(each.tolist() for each in above), strict=True)
        return CascadeCalibration(count, max(1, candidates), tuple(columns))

    def as_dict(self) -> dict[str, Any]:
        """Return a dict for JSON."""
        return {"images": self.images, "candidates": self.candidates, "steps": [list(step) for step in self.steps]}

    @staticmethod
    def from_dict(values: Mapping[str, Any], origin: str) -> "CascadeCalibration":
        """Return what ``as_dict`` has returned; ArtifactError names ``origin``."""
        try:
            steps = tuple((float(at), int(lost), int(kept)) for at, lost, kept in values["steps"])
            found = CascadeCalibration(int(values["images"]), int(values["candidates"]), steps)
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{origin} is no calibration of a cascade: {type(error).__name__} {error}") from None
        falls = all(a[0] > b[0] and a[1] <= b[1] and a[2] <= b[2] for a, b in itertools.pairwise(steps))
        fits = all(0 <= lost <= kept <= found.images for _, lost, kept in steps)
        if not steps or steps[-1][0] != 0 or found.candidates < 1 or not (falls and fits):
            raise ArtifactError(f"{origin} is no calibration of a cascade: its steps contradict each other")
        return found

    def bound(self, lost: int) -> float:
        """Return the smallest risk that can be promised if ``lost`` of the calibration images count as risk."""
        if lost >= self.images:
            return 1.0
        from scipy import special  # here, since the import takes 0.1 s

        return float(special.betaincinv(lost + 1, self.images - lost, 1 - (1 - CONFIDENCE) / self.candidates))

    def step(self, risk: float) -> tuple[float, int, int] | None:
        """Return the step with the lowest threshold that promises ``risk``, in (0, 1); None: none does but 1."""
        if not 0 < risk < 1:
            hint = f"; for {risk:g} % give {risk / 100:g}" if 1 <= risk < 100 else ""
            raise UsageError(
                f"the risk of a cascade is a share of images, above 0 and below 1, such as {DEFAULT_RISK}, "
                f"got {risk:g}{hint}"
            )
        allowed = [step for step in self.steps if step[2] and self.bound(step[1]) <= risk]
        return allowed[-1] if allowed else None

    @property
    def smallest_risk(self) -> float:
        """The smallest risk that can be promised where the student answers any image, rounded up to 4 digits."""
        lost = next(lost for _, lost, kept in self.steps if kept)
        return math.ceil(self.bound(lost) * 1e4) / 1e4

    def threshold(self, risk: float) -> float:
        """Return the threshold above which the student answers; UsageError names the nearest possible risk."""
        found = self.step(risk)
        if found is None:
            raise UsageError(
                f"a risk of {risk:g} cannot be promised by {self.images:,} calibration images unless the teacher "
                f"answers every image; the nearest risk that can be is {self.smallest_risk:g}"
            )
        return found[0]


@dataclass(frozen=True)
class Cascade:
    """A student, teachers that answer in its place, and the calibration; cascade.json in the student's folder."""

    student: str  # its stage in the run folder
    teachers: tuple[str, ...]  # their stages
    combine: str  # what is averaged of several teachers, "logits" or "probabilities"
    weights: tuple[float, ...] | None  # one for each of several teachers; None: equal
    calibration: CascadeCalibration  # of the student's confidence

    def write(self, run: Path) -> None:
        """Write the file of a run folder, with the SHA-256 of each model's weights."""
        value = {
            "schema": 1,
            "student": self.student,
            "teachers": list(self.teachers),
            "combine": self.combine,
            "weights": None if self.weights is None else list(self.weights),
            "sha256": {stage: _weights_digest(run / stage) for stage in (self.student, *self.teachers)},
            "calibration": self.calibration.as_dict(),
        }
        write_checksummed_json(run / self.student / CASCADE_FILE, value)

    @staticmethod
    def read(folder: Path) -> "Cascade":
        """Return the cascade of a student's folder; ArtifactError also if a model was trained again since."""
        path = folder / CASCADE_FILE
        if not path.is_file():
            from potstill.models.model_file import FACTS_FILE, check_predicts_classes, read_facts  # imports torch

            if (folder / FACTS_FILE).is_file():
                check_predicts_classes(folder, read_facts(folder / FACTS_FILE).facts)
            raise ArtifactError(
                f"{folder} has no cascade ({CASCADE_FILE}): give the run folder of a student that was distilled from a "
                "teacher with classes; a run from before there were cascades gets one with `potstill run RECIPE --name "
                "NAME --resume`"
            )
        found = read_checksummed_json(path)
        if found.get("schema") != 1:
            raise ArtifactError(f"{path} has schema {found.get('schema')!r}, this potstill reads 1; update potstill")
        try:
            weights = found["weights"]
            cascade = Cascade(
                str(found["student"]),
                tuple(map(str, found["teachers"])),
                str(found["combine"]),
                None if weights is None else tuple(map(float, weights)),
                CascadeCalibration.from_dict(found["calibration"], str(path)),
            )
            recorded = {str(stage): str(digest) for stage, digest in found["sha256"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"{path} describes no cascade: {type(error).__name__} {error}") from None
        for stage in (cascade.student, *cascade.teachers):
            place = folder if stage == cascade.student else folder.parent / stage
            if not (place / "model.json").is_file():
                raise ArtifactError(
                    f"{path}: the model {place} is missing; a cascade needs the run folder with student and teacher"
                )
            if _weights_digest(place) != recorded.get(stage):
                raise ArtifactError(
                    f"{path} was calibrated with other weights of {stage}: it was trained again since; finish the run "
                    "with --resume"
                )
        return cascade


def _weights_digest(folder: Path) -> str:
    return str(read_checksummed_json(folder / "model.json").get("sha256"))


def cascade_figures(
    calibration: CascadeCalibration,
    confidence: Array,
    student_correct: Array,
    teacher_correct: Array,
    risks: Sequence[float] = REPORTED_RISKS,
) -> dict[str, Any]:
    """Return what a cascade does on test images [N], for results.json.

    ``curve``: pairs of the share of test images that the teacher answers (those of which the student is least
    confident) and the top-1 of the cascade; ``risks``: ``risk`` and, if it can be promised, ``threshold``,
    ``deferred_calibration``, and on test ``deferred``, ``top1``, ``lost`` (the share that counts as risk) with its 95 %
    interval.
    """
    student, teacher = np.asarray(student_correct, dtype=bool), np.asarray(teacher_correct, dtype=bool)
    count = len(student)
    order = np.argsort(confidence, kind="stable")
    # correct[d]: images that are correct if the teacher answers the d of which the student is least confident
    gains = teacher[order].astype(np.int64) - student[order]
    correct = int(student.sum()) + np.concatenate([[0], np.cumsum(gains)])
    points = np.unique(np.linspace(0, count, _CURVE_POINTS).round().astype(np.int64))
    rows: list[dict[str, Any]] = []
    for risk in risks:
        step = calibration.step(risk)
        if step is None:
            rows.append({"risk": risk})
            continue
        answers = np.asarray(confidence) > step[0]
        lost = wilson_interval(int((answers & ~student & teacher).sum()), count)
        rows.append(
            {
                "risk": risk,
                "threshold": step[0],
                "deferred_calibration": 1 - step[2] / calibration.images,
                "deferred": float(1 - answers.mean()),
                "top1": float(np.where(answers, student, teacher).mean()),
                "lost": lost.value,
                "lost_low": lost.low,
                "lost_high": lost.high,
            }
        )
    return {
        "calibration_images": calibration.images,
        "candidates": calibration.candidates,
        "confidence": CONFIDENCE,
        "smallest_risk": calibration.smallest_risk,
        "curve": [[int(at) / count, int(correct[at]) / count] for at in points],
        "risks": rows,
    }
