"""examples.json of a tiny experiment: which images, what was said of them, where the networks looked."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from potstill.data.image_sets import ArraySet, FileSet, read_pixels
from potstill.data.transforms import preprocess
from potstill.errors import DataError
from potstill.evaluation.gradcam import grad_cam
from potstill.evaluation.predictions import Predictions
from potstill.experiment.examples import describe_examples
from potstill.input_spec import InputSpec
from potstill.models.model_file import Classifier

NAMES = ("dark", "light")
LABELS = [0, 1, 1, 0]


def said(rows):
    return Predictions.of(np.array(rows), np.array(LABELS))


STUDENT = said([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]])  # wrong: 1 (0.6), 3 (0.7)
BASELINE = said([[0.9, 0.1], [0.3, 0.7], [0.6, 0.4], [0.8, 0.2]])  # wrong: 2
TEACHER = said([[0.9, 0.1], [0.2, 0.8], [0.1, 0.9], [0.9, 0.1]])


class Corner(nn.Module):
    """Looks at one corner of the image alone, for either class."""

    def __init__(self, row, column):
        super().__init__()
        self.maps = nn.Conv2d(3, 1, 4, 4, bias=False)
        self.act = nn.ReLU()
        self.mask = nn.Parameter(torch.zeros(2, 2))
        self.head = nn.Linear(1, 2, bias=False)
        with torch.no_grad():
            self.maps.weight.fill_(1.0)
            self.mask[row, column] = 1.0
            self.head.weight.fill_(1.0)

    def forward(self, images):
        maps = self.act(self.maps(images))
        return self.head((maps * self.mask).sum(dim=(2, 3)))


def classifier(module):
    return Classifier(module, "corner", NAMES, InputSpec(8, (0.0,) * 3, (1.0,) * 3))


def test_large_jpeg_files_are_decoded_at_the_scale_that_suffices(tmp_path, monkeypatch):
    """As the evaluation does: the heat map is that of the pixels which the prediction is of."""
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
    model = classifier(Corner(0, 1))
    found = describe_examples({"distilled": model}, {"distilled": STUDENT}, files, NAMES)
    assert sorted(set(shapes)) == [(150, 200, 3), (300, 400, 3)]  # 1/8 for 8 px, 1/4 for the thumbnail's 120 px
    for name, each in found["images"].items():
        pixels = read_pixels(files, int(name), 8)
        (cam,) = grad_cam(model.module, preprocess(pixels, model.input)[None], [0])
        assert each["gradcam"]["distilled"]["rows"] == [bytes((255 * row).round().int().tolist()).hex() for row in cam]
        assert each["gradcam"]["distilled"]["region"] == [0.125, 0.0, 0.75, 1.0]
        shown = Image.open(io.BytesIO(base64.b64decode(each["thumbnail"]["data"])))
        assert shown.size == (120, 90)


def images(pixels=None):
    # From top left to bottom right ever lighter, so that Grad-CAM of the mean slope is strongest where it is lightest.
    ramp = np.tile(np.arange(8, dtype=np.uint8) * 30 + 10, (4, 8, 1)) if pixels is None else pixels
    return ArraySet(ramp, LABELS, [f"photos/{i}.png" for i in range(4)])


@pytest.fixture
def three():
    models = {name: classifier(Corner(1, 1)) for name in ("teacher", "baseline", "distilled")}
    return models, {"teacher": TEACHER, "baseline": BASELINE, "distilled": STUDENT}


def test_what_is_kept(three):
    found = describe_examples(*three, images(), NAMES)
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
    assert found["failed"] == {}


def test_heat_maps_are_of_student_and_teacher_and_strongest_at_light_fields(three):
    found = describe_examples(*three, images(), NAMES)
    looks = found["images"]["1"]["gradcam"]
    assert set(looks) == {"distilled", "teacher"}
    rows = [bytes.fromhex(row) for row in looks["distilled"]["rows"]]
    # Means of the two halves: (10 + 40 + 70 + 100) / 4 = 55 and 175 of 255; the largest becomes 255.
    assert [list(row) for row in rows] == [[80, 255], [80, 255]]
    assert looks["distilled"]["region"] == [0, 0, 1, 1]


def test_again_gives_the_same(three):
    assert describe_examples(*three, images(), NAMES) == describe_examples(*three, images(), NAMES)


def test_a_student_alone():
    found = describe_examples({"baseline": classifier(Corner(0, 0))}, {"baseline": BASELINE}, images(), NAMES)
    assert found["parts"] == {"student": "baseline"}
    assert set(found["groups"]) == {"mistakes"}


def test_no_student_no_examples():
    assert describe_examples({"teacher": classifier(Corner(0, 0))}, {"teacher": TEACHER}, images(), NAMES) is None


class Gone(ArraySet):
    def pixels(self, i):
        if i == 3:
            raise DataError(f"{self.names[i]}: no such file")
        return super().pixels(i)


def test_an_image_that_is_gone_has_no_picture_and_harms_no_other(three):
    whole = images()
    found = describe_examples(*three, Gone(whole.images, LABELS, whole.names), NAMES)
    assert found["images"]["3"]["thumbnail"] is None
    assert found["images"]["3"]["gradcam"] == {}
    assert found["images"]["1"]["thumbnail"]
    assert found["images"]["1"]["gradcam"].keys() == {"teacher", "distilled"}


def test_a_network_without_maps_is_named_and_harms_no_other(three):
    models, answers = three
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    found = describe_examples(models | {"teacher": classifier(flat)}, answers, images(), NAMES)
    assert set(found["failed"]) == {"teacher"}
    assert "no feature map" in found["failed"]["teacher"]
    assert all(set(image["gradcam"]) == {"distilled"} for image in found["images"].values())


def test_an_error_of_torch_is_named(three):
    class Full(Corner):
        def forward(self, images):
            raise RuntimeError("out of memory\nand a long story")

    models, answers = three
    found = describe_examples(models | {"distilled": classifier(Full(0, 0))}, answers, images(), NAMES)
    assert found["failed"] == {"distilled": "out of memory"}
    assert all(set(image["gradcam"]) == {"teacher"} for image in found["images"].values())
