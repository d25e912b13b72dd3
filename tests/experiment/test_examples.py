"""examples.json of a tiny experiment: which images, and what was said of them."""

import base64
import io

import numpy as np
from PIL import Image

from potstill.data.image_sets import ArraySet, FileSet
from potstill.errors import DataError
from potstill.evaluation.predictions import Predictions
from potstill.experiment.examples import describe_examples

NAMES = ("dark", "light")
LABELS = [0, 1, 1, 0]


def said(rows):
    return Predictions.of(np.array(rows), np.array(LABELS))


STUDENT = said([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]])  # wrong: 1 (0.6), 3 (0.7)
BASELINE = said([[0.9, 0.1], [0.3, 0.7], [0.6, 0.4], [0.8, 0.2]])  # wrong: 2
TEACHER = said([[0.9, 0.1], [0.2, 0.8], [0.1, 0.9], [0.9, 0.1]])


def test_large_jpeg_files_are_decoded_at_the_scale_that_suffices(tmp_path, monkeypatch):
    for i in range(4):
        noise = np.random.default_rng(i).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((1600, 1200), Image.Resampling.BICUBIC).save(tmp_path / f"{i}.jpg", quality=95)
    files = FileSet(tmp_path, [f"{i}.jpg" for i in range(4)], LABELS)
    shapes, read = [], FileSet.read

    def spied(self, i, side=None):
        found = read(self, i, side)
        shapes.append(found.pixels.shape)
        return found

    monkeypatch.setattr(FileSet, "read", spied)
    found = describe_examples({"distilled": STUDENT}, files, NAMES)
    assert set(shapes) == {(300, 400, 3)}  # 1/4 for the thumbnail's 120 px
    for each in found["images"].values():
        shown = Image.open(io.BytesIO(base64.b64decode(each["thumbnail"]["data"])))
        assert shown.size == (120, 90)


def images(pixels=None):
    ramp = np.tile(np.arange(8, dtype=np.uint8) * 30 + 10, (4, 8, 1)) if pixels is None else pixels
    return ArraySet(ramp, LABELS, [f"photos/{i}.png" for i in range(4)])


THREE = {"teacher": TEACHER, "baseline": BASELINE, "distilled": STUDENT}


def test_what_is_kept():
    found = describe_examples(THREE, images(), NAMES)
    assert found["split"] == "test"
    assert found["parts"] == {"student": "distilled", "teacher": "teacher", "baseline": "baseline"}
    assert found["groups"] == {
        "mistakes": {"count": 2, "images": ["3", "1"]},
        "disagreements": {"count": 2, "images": ["3", "1"]},
        "repaired": {"count": 1, "images": ["2"]},
        "broken": {"count": 2, "images": ["3", "1"]},
    }
    assert set(found["images"]) == {"1", "2", "3"}  # each once, image 0 not at all
    third = found["images"]["3"]
    assert (third["name"], third["class"]) == ("photos/3.png", "dark")
    assert third["predictions"]["distilled"] == {"class": "light", "probability": 0.7}
    assert third["predictions"]["teacher"] == {"class": "dark", "probability": 0.9}
    shown = Image.open(io.BytesIO(base64.b64decode(third["thumbnail"]["data"])))
    assert shown.size == (8, 8)
    assert shown.getpixel((7, 0)) == (220, 220, 220)


def test_again_gives_the_same():
    assert describe_examples(THREE, images(), NAMES) == describe_examples(THREE, images(), NAMES)


def test_a_student_alone():
    found = describe_examples({"baseline": BASELINE}, images(), NAMES)
    assert found["parts"] == {"student": "baseline"}
    assert set(found["groups"]) == {"mistakes"}


def test_no_student_no_examples():
    assert describe_examples({"teacher": TEACHER}, images(), NAMES) is None


class Gone(ArraySet):
    def pixels(self, i):
        if i == 3:
            raise DataError(f"{self.names[i]}: no such file")
        return super().pixels(i)


def test_an_image_that_is_gone_has_no_picture_and_harms_no_other():
    whole = images()
    found = describe_examples(THREE, Gone(whole.images, LABELS, whole.names), NAMES)
    assert found["images"]["3"]["thumbnail"] is None
    assert found["images"]["1"]["thumbnail"]
