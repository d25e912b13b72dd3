"""export --prune and potstill shrink, on a run of small networks."""

import csv
import importlib.util
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import potstill
from potstill.cli import main
from potstill.config.recipe import dump_recipe, load_recipe
from potstill.config.yaml import parse_yaml
from potstill.errors import UsageError
from potstill.experiment.pipeline import run as run_recipe
from potstill.io import read_checksummed_json
from potstill.models import model_file
from potstill.models.pruning import count_weights
from potstill.sweep import shrink as shrinking
from potstill.sweep.shrink import Finetuning, LossTest, PrunedStudent, parse_target

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(each) is None for each in ("torch_pruning", "onnx", "onnxscript", "onnxruntime")),
    reason="torch-pruning or ONNX is not installed (extras prune and export)",
)


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    """A finished run; tests that write work on copies."""
    return run_recipe(recipe(), output_dir=tmp_path_factory.mktemp("runs"))


@pytest.fixture
def copied(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


def model_facts(folder):
    return read_checksummed_json(folder / "model.json")["facts"]


def test_a_pruned_student_is_tuned_by_the_run_and_loads_again(copied, photographs, capsys):
    main(["export", str(copied), "--prune", "0.5"])
    folder = copied / "pruned" / "distilled-0.5" / "finetuned" / "distilled"
    whole, pruned = potstill.load(copied), potstill.load(folder)
    assert 0.35 < count_weights(pruned.module) / count_weights(whole.module) <= 0.5
    assert (folder / "export" / "model.onnx").stat().st_size < 4 * count_weights(whole.module)
    facts = model_facts(folder)
    assert facts["method"] == model_facts(copied / "distilled")["method"]
    assert facts["training"]["planned_epochs"] == 1  # a quarter of 2
    assert facts["teaching"]["computed"] == 0  # all that the teacher says of these views is known
    assert facts["teaching"]["read"] == facts["views"]["count"] * 42
    assert facts["views"]["augmentation_seed"] == model_facts(copied / "distilled")["views"]["augmentation_seed"]
    assert not list(folder.parent.glob("teacher*/model.safetensors"))  # no second copy
    image = next(photographs.glob("red/*.png"))
    capsys.readouterr()
    main(["predict", str(folder.parent), str(image)])
    main(["predict", str(folder / "export" / "model.onnx"), str(image)])
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == second.split()

    (folder / "export" / "model.onnx").unlink()
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    main(["export", str(copied), "--prune", "0.5"])  # finished: it only exports
    assert (folder / "export" / "model.onnx").exists()
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert main(["export", str(copied), "--prune", "0.5", "--epochs", "2"]) == 2
    assert "epochs: was 1, now 2" in capsys.readouterr().err


def test_early_stopping_does_not_end_a_training_before_its_quantization_aware_part(copied):
    patience = "student.training.early_stopping_patience=2"
    for sets, fraction in (((), 0.5), ((patience,), 1.0), ((patience, "student.training.qat_fraction=0"), 0.0)):
        recipe = PrunedStudent(copied, None, Finetuning(sets=sets, int8=True)).recipe
        assert recipe.stage_training("student").qat_fraction == fraction
        load_recipe(parse_yaml(dump_recipe(recipe), "").value, recorded=True)  # as when it is resumed


def test_shrink_keeps_the_smallest_file_that_passes_on_val(copied, photographs, monkeypatch, capsys):
    """Reference for the counts: the predictions of student and file, read back one by one."""
    monkeypatch.setattr(shrinking, "MAX_STEPS", 1)
    assert main(["shrink", str(copied), "--max-loss", "99"]) == 0
    printed = capsys.readouterr().out
    folder = copied / "shrink" / "distilled"
    found = read_checksummed_json(folder / "shrink.json")
    whole, half = found["candidates"]
    assert (whole["how"], half["how"]) == ("as it is", "pruned and fine-tuned")
    assert found["chosen"] == 1
    assert half["bytes"] < whole["bytes"] < found["reference"]["bytes"]
    assert 0.6 < half["weights"] / whole["weights"] <= 0.75
    model = folder / "export" / "model-int8.onnx"
    assert model.stat().st_size == half["bytes"]  # what was compared is what is left
    assert "qat_fraction: 0.5" in (folder / "candidates" / "int8-01" / "finetuned" / "recipe.yaml").read_text()
    rows = list(csv.DictReader((copied / "splits.csv").read_text(encoding="utf-8").splitlines()))
    for split, expected in (("val", (half["lost"], half["gained"])), ("test", None)):
        right = {}
        for source in (copied, model):
            images = [photographs / row["name"] for row in rows if row["split"] == split]
            predictions = potstill.predict(source, images)
            right[source] = [each.classes[0][0] == each.path.parent.name for each in predictions]
        pairs = list(zip(right[copied], right[model], strict=True))
        lost, gained = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
        if expected is not None:
            assert (lost, gained) == expected
        else:
            assert found["test"]["difference"]["value"] == pytest.approx((gained - lost) / len(pairs))
            assert found["test"]["file"]["value"] == pytest.approx(sum(b for _, b in pairs) / len(pairs))
    assert str(model) in printed
    page = (folder / "shrink.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "chosen" in page
    assert 'href="shrink/distilled/shrink.html"' in (copied / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "2"], "--prune"),
        (["--prune", "1.5"], "from 0 to below 1"),
        (["--prune", "2M"], "did you mean 'MB'"),
        (["--prune", "0.5", "--model", "teacher"], "only students"),
        (["--prune", "0.5", "--int8", "--format", "torch-export"], "--int8 goes with"),
        (["--prune", "3kB"], "Nearest:"),
        (["--prune", "0.5", "--set", "training.epoch=3"], "training.epoch"),
    ],
)
def test_bad_input(copied, arguments, message, capsys):
    assert main(["export", str(copied), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (copied / "pruned" / "distilled-0.5" / "finetuned").exists()


def test_a_model_outside_of_a_run_is_not_pruned(copied, capsys):
    assert main(["export", str(copied / "distilled"), "--prune", "0.5"]) == 2
    assert "no run folder" in capsys.readouterr().err


def test_a_loss_that_the_val_images_cannot_show_ends_before_training(copied, capsys):
    assert main(["shrink", str(copied), "--max-loss", "1"]) == 2
    error = capsys.readouterr().err
    assert "9 val images cannot show" in error
    assert "Nearest: --max-loss 28.3" in error  # 3.537 / (9 + 3.537): the 97 % quantile is 1.8808
    assert "at least 351 val images" in error
    assert main(["shrink", str(copied), "--max-loss", "1e-9"]) == 2  # at once: no search for the number
    assert "353,738,459,643" in capsys.readouterr().err  # z² (1 - 1e-11) / 1e-11
    assert not (copied / "shrink").exists()
    assert main(["shrink", str(copied), "--max-loss", "0"]) == 2


def test_the_search_ends_at_the_second_failure():
    """The digits in LOG.md, at 3 points: the third file is smaller than the second, which fails, and loses less."""
    test = LossTest(3.0)
    found = [(test.judge(*each, 269), test.ended) for each in ((1, 0), (6, 1), (2, 0), (6, 2))]
    assert [each["passes"] for each, _ in found] == [True, False, True, False]
    assert [each["confidence"] for each, _ in found] == [0.97, 0.97, 0.98, 0.98]
    assert [ended for _, ended in found] == [False, False, False, True]


def test_files_that_lose_too_much_are_seldom_chosen():
    """Each of many files loses 3 points in truth, and 3 are allowed: 5 % of the searches may choose one."""
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(2000):
        test = LossTest(3.0)
        while not test.ended:
            lost, gained, _ = rng.multinomial(600, (0.04, 0.01, 0.95))
            if test.judge(int(lost), int(gained), 600)["passes"]:
                wrong += 1
                break
    assert 0.03 < wrong / 2000 < 0.062  # 5 % and two and a half standard errors


def test_a_file_after_the_first_failure_may_be_the_chosen_one(monkeypatch):
    """From the failed network the search goes on, and its next file passes."""
    search = object.__new__(shrinking._Search)
    search.int8, search.test, search.note = False, LossTest(3.0), lambda line: None
    counts = iter([(6, 1), (2, 0), (9, 0)])
    pruned = []
    student = SimpleNamespace(name="whole")
    search.work = SimpleNamespace(student=student, prune=lambda start, share: pruned.append(start.name))

    def finetune(step, start):
        start()
        return Path(f"step-{step}")

    def attempt(folder, how):
        row = {"folder": str(folder), **search.test.judge(*next(counts), 269)}
        return shrinking._Candidate(folder, b"", row)

    search._finetune, search._try = finetune, attempt
    monkeypatch.setattr(model_file, "load_model", lambda folder: SimpleNamespace(name=str(folder)))
    chosen = search._try_all()
    assert chosen.folder == Path("step-2")
    assert pruned == ["whole", "step-1", "step-2"]


def test_targets():
    assert parse_target("5 ms, 2MB").text == "5ms,2MB"
    assert parse_target("0.50").text == "0.5"
    with pytest.raises(UsageError, match="--prune 1: "):
        parse_target("1")
