"""Third-party image files, hostile ones included, through the real commands: no traceback, no crash, bounded memory.

Another folder with such a MANIFEST.tsv: ``POTSTILL_CORPORA=DIR pytest tests/guarantees/test_third_party_images.py``.
``check`` is tested in tests/data/validation/test_validate_corpus.py, and what becomes of each file in
tests/data/test_image_io.py.
"""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from potstill.data.image_structure import has_image_suffix

from ..conftest import READ_THOUGH_EXPECTED_TO_FAIL, needs_pillow_13
from ..forked import forked

pytestmark = needs_pillow_13

MOST_KILOBYTES = 200_000  # beyond what the command needs on two harmless images
LONG = 1200  # seconds

RECIPE = """
name: corpus
data: {{source: "{source}", size: 32, workers: {workers}, cache_fraction: {share}}}
student: {{model: cifar/resnet8}}
method: {{name: supervised}}
training: {{epochs: 1, batch_size: {batch}, precision: float32}}
teacher_cache: off
"""
SCRIPT = """
import sys
from potstill.cli import main
from potstill.report import render
render.render = lambda folder: folder / "report.html"  # pictures take most of the time, and show none of the images
code = main(sys.argv[1:])
if sys.platform == "linux":
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    sys.stderr.write("peak " + peak.split()[1] + chr(10))
sys.exit(code)
"""


def command(*arguments):
    """Exit code, output, errors and peak memory in kB (0 where the system does not say)."""
    done = forked(["-c", SCRIPT, *map(str, arguments)], timeout=LONG)
    assert "Traceback" not in done.errors, done.errors
    errors, _, peak = done.errors.partition("peak ")
    return done.returncode, done.out, errors, int(peak.split()[0] if peak else 0)


@pytest.fixture(params=[12, pytest.param(1, marks=pytest.mark.slow)], ids=["every twelfth", "all"])
def expected(request, corpus):
    """Whether each file can be read, by name: all whose pixels would fill the memory, and every twelfth of the others.

    ``check`` is tried on all of them by default.
    """
    every = [line.split("\t") for line in (corpus / "MANIFEST.tsv").read_text().splitlines()]
    lines = [line for at, line in enumerate(every) if at % request.param == 0 or "DecompressionBomb" in line[4]]
    return {line[0]: line[4] == "ok" or line[0] in READ_THOUGH_EXPECTED_TO_FAIL for line in lines}


def in_classes(corpus, names, folder):
    """Two class folders with the files in turn."""
    for at, name in enumerate(names):
        place = folder / ("even", "odd")[at % 2]
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(corpus / name, place / as_image(name))
    return folder


def as_image(name):
    """Only what is called an image is looked at."""
    return name if has_image_suffix(name) else f"{name}.png"


def train(folder, tmp_path, batch, **settings):
    """The baseline alone: one epoch."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(source=folder, batch=batch, **{"workers": 0, "share": 0.3, **settings}))
    return command("train", recipe, "--stage", "baseline", "--output-dir", tmp_path / "runs", "--overwrite")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model of two classes of harmless images, and the memory that training and predicting took."""
    tmp_path = tmp_path_factory.mktemp("harmless")
    for name, value in (("even", 40), ("odd", 200)):
        (tmp_path / "harmless" / name).mkdir(parents=True)
        for i in range(10):
            image = Image.new("RGB", (32, 32), (value, 4 * i, value))
            image.save(tmp_path / "harmless" / name / f"{i}.png")
    code, _, errors, training = train(tmp_path / "harmless", tmp_path, 8)
    assert code == 0, errors
    model = shutil.copytree(tmp_path / "runs", tmp_path / "trained") / "corpus-baseline"
    code, _, errors, predicting = command("predict", model, tmp_path / "harmless" / "odd", "--json")
    assert code == 0, errors
    return model, training, predicting


def test_training(corpus, expected, trained, tmp_path):
    """Those that can be read are learnt from, in two steps; with any of the others nothing begins, and it is named."""
    readable = [name for name, fine in expected.items() if fine]
    code, _, errors, peak = train(in_classes(corpus, readable, tmp_path / "fine"), tmp_path, len(readable) // 3)
    assert code == 0, errors
    assert peak < trained[1] + MOST_KILOBYTES

    code, _, errors, peak = train(in_classes(corpus, expected, tmp_path / "all"), tmp_path, 64)
    assert code == 3
    assert errors.startswith("error: ")
    assert len(errors.splitlines()) < 30
    assert any(name in errors for name, fine in expected.items() if not fine)
    assert peak < trained[1] + MOST_KILOBYTES


def test_predicting(corpus, expected, trained, tmp_path):
    """Each that can be read is predicted; each of the others is named, on one line."""
    model, _, memory = trained
    code, out, errors, peak = command("predict", model, in_classes(corpus, expected, tmp_path / "all"), "--json")
    predicted = {Path(each["path"]).name for each in json.loads(out) if each.get("error") is None}
    assert predicted == {as_image(name) for name, fine in expected.items() if fine}
    assert code == (3 if len(predicted) < len(expected) else 0)
    for name, fine in expected.items():
        assert sum(name in line for line in errors.splitlines()) == (0 if fine else 1), name
    assert peak < memory + MOST_KILOBYTES
