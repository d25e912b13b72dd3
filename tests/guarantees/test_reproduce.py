"""``potstill run --reproduce RUN``: the same weights, or what differs."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from potstill.cli import main
from potstill.config.recipe import load_recipe
from potstill.experiment import pipeline
from potstill.experiment.reproduce import (
    environment_differences,
    largest_metric_difference,
    largest_weight_difference,
    read_run_record,
)
from potstill.experiment.run_folder import RunFolder
from potstill.io import read_checksummed_json, write_checksummed_json
from potstill.models.model_file import load_model, save_model


@pytest.fixture
def replay(finished_run, tmp_path, capsys):
    """Repeats the run, or another, below ``tmp_path``: exit code, and what was said."""

    def repeat(*flags, run=finished_run):
        code = main(["run", "--reproduce", str(run), "--output-dir", str(tmp_path / "again"), *flags])
        found = capsys.readouterr()
        return code, found.out, found.err

    return repeat


@pytest.fixture
def changed_run(finished_run, tmp_path):
    """A copy of the run, to be changed."""
    return shutil.copytree(finished_run, tmp_path / "tiny")


def test_the_same_weights(replay, finished_run, tmp_path):
    code, out, _ = replay()
    assert code == 0
    for stage in ("teacher", "baseline", "distilled"):
        assert f"  {stage}: the same weights, byte for byte" in out.splitlines()
        again = tmp_path / "again" / "tiny-reproduced" / stage / "model.safetensors"
        assert again.read_bytes() == (finished_run / stage / "model.safetensors").read_bytes()
    environments = [
        read_checksummed_json(folder / "environment.json")
        for folder in (finished_run, tmp_path / "again" / "tiny-reproduced")
    ]
    assert environment_differences(*environments) == []


def test_the_same_stages(replay, tiny_recipe, tmp_path):
    arguments = ["train", str(tiny_recipe), "--stage", "baseline", "--output-dir", str(tmp_path), "--name", "one"]
    assert main([*arguments, "--set", "training.epochs=1"]) == 0
    code, out, _ = replay("--name", "two", run=tmp_path / "one")
    assert code == 0
    assert "baseline: the same weights" in out
    assert not (tmp_path / "again" / "two" / "teacher").exists()


def with_other_weights(run, stage="baseline"):
    model = load_model(run / stage)
    next(model.module.parameters()).data[0, 0, 0, 0] += 0.25
    save_model(model, run / stage)


def test_other_weights_in_the_same_surroundings_are_a_bug(replay, changed_run):
    with_other_weights(changed_run)
    code, out, _ = replay(run=changed_run)
    assert code == 1
    assert "teacher: the same weights, byte for byte" in out
    assert "baseline: other weights, by 0.25 at most; top-1 on test +0.00 points" in out
    assert "the recorded environments are equal: the weights should have been equal" in out


def test_other_weights_elsewhere_are_a_result(replay, changed_run):
    with_other_weights(changed_run)
    path = changed_run / "environment.json"
    facts = read_checksummed_json(path)
    facts["packages"]["torch"] = "1.0.0"
    write_checksummed_json(path, facts)
    code, out, _ = replay(run=changed_run)
    assert code == 0
    import torch

    assert f"  differs: packages.torch: was 1.0.0, is {torch.__version__.partition('+')[0]}" in out


def test_other_images_are_named_before_anything_is_trained(tiny_recipe, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    text = tiny_recipe.read_text()
    source = next(line.split("source: ")[1].split(",")[0] for line in text.splitlines() if "source: " in line)
    images = shutil.copytree(source, tmp_path / "images")
    recipe.write_text(text.replace(source, str(images)))
    root = ["--output-dir", str(tmp_path / "runs")]
    assert main(["train", str(recipe), "--stage", "baseline", *root, "--name", "one"]) == 0

    def refused():
        capsys.readouterr()
        assert main(["run", "--reproduce", str(tmp_path / "runs" / "one"), *root]) == 3
        assert not (tmp_path / "runs" / "one-reproduced").exists()
        return capsys.readouterr().err

    pixels = np.asarray(Image.open(images / "blue" / "00.png"))
    Image.fromarray(255 - pixels).save(images / "blue" / "00.png")
    assert "of other content: " in refused()
    (images / "blue" / "00.png").rename(images / "blue" / "zz.png")
    said = refused()
    assert "gone: " in said
    assert "new: " in said
    assert "zz.png" in said


@pytest.mark.parametrize("flags", [["--set", "seed=1"], ["quickstart"], ["--data", "x"], ["--seed", "0"]])
def test_nothing_else_can_be_changed(replay, flags):
    code, _, err = replay(*flags)
    assert code == 2
    assert "without changes" in err
    assert (flags[0] if flags[0].startswith("--") else "RECIPE") in err


def test_what_is_no_run(replay, changed_run, tmp_path):
    assert replay(run=tmp_path / "nowhere")[0] == 2
    text = (changed_run / "splits.csv").read_text()
    (changed_run / "splits.csv").write_text(text)
    (changed_run / "results.json").unlink()
    code, _, err = replay(run=changed_run)
    assert code == 4
    assert "is not finished" in err


def test_a_damaged_record(replay, changed_run):
    path = changed_run / "recipe.yaml"
    path.write_text(path.read_text().replace("alpha: 0.5", "alpha: 0.6"))
    code, _, err = replay(run=changed_run)
    assert code == 4
    assert "recipe.yaml" in err


def test_damaged_weights(replay, changed_run, tmp_path):
    """There would be nothing to compare with, which is said before anything is trained."""
    path = changed_run / "distilled" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    code, _, err = replay(run=changed_run)
    assert code == 4
    assert "distilled/model.safetensors" in err
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_not_in_its_own_place(flag, changed_run, tmp_path, capsys):
    link = tmp_path / "link"
    link.symlink_to(changed_run)
    assert main(["run", "--reproduce", str(link), "--output-dir", str(tmp_path), "--name", "tiny", flag]) == 2
    assert "give another --name" in capsys.readouterr().err
    assert (changed_run / "results.json").exists()


def test_a_replay_goes_on(replay, tiny_recipe, tmp_path, monkeypatch):
    """As any run; and what it finds is the same."""

    class Killed(Exception):
        pass

    def killed(*_, **__):
        raise Killed

    assert main(["train", str(tiny_recipe), "--stage", "baseline", "--output-dir", str(tmp_path), "--name", "one"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "evaluate_stages", killed)
        with pytest.raises(Killed):
            pipeline.run(
                load_recipe(tmp_path / "one" / "recipe.yaml"), output_dir=tmp_path / "again", name="one-reproduced",
                stages=("baseline",), reproduce=read_run_record(tmp_path / "one"),
            )  # fmt: skip
    code, out, _ = replay("--resume", run=tmp_path / "one")
    assert code == 0
    assert "baseline: the same weights, byte for byte" in out


def test_further_seeds_are_compared(tiny_recipe, tmp_path, capsys):
    root = ["--output-dir", str(tmp_path)]
    sets = ["--set", "training.epochs=1", "--set", "method={name: supervised}"]
    assert main(["run", str(tiny_recipe), *root, *sets, "--seeds", "2"]) == 0
    with_other_weights(tmp_path / "tiny", "baseline-2")
    capsys.readouterr()
    assert main(["run", "--reproduce", str(tmp_path / "tiny"), *root]) == 1
    out = capsys.readouterr().out.splitlines()
    assert "  distilled-2: the same weights, byte for byte" in out
    assert any(line.startswith("  baseline-2: other weights, by 0.25 at most") for line in out)


def test_neither_recipe_nor_run(capsys):
    assert main(["run"]) == 2
    assert "give a RECIPE" in capsys.readouterr().err


def test_environment_has_all_that_results_depend_on(finished_run):
    facts = json.loads((finished_run / "environment.json").read_text())
    assert {"packages", "python", "threads", "processes", "device", "seeds", "git", "data_fingerprint"} <= facts.keys()
    assert {"python", "platform", "potstill", "processor", "source_sha256"} <= facts.keys()
    assert facts["recipe_sha256"] == hashlib.sha256(RunFolder(finished_run).read_recipe().encode()).hexdigest()
    assert {"torch", "torchvision", "timm", "numpy", "pillow"} <= facts["packages"].keys()
    assert facts["seeds"] == {"seed": 0, "split_seed": 0, "augmentation_seed": 0}


def test_differences_of_environments():
    before = {"a": 1, "packages": {"torch": "1", "numpy": "2"}, "calibration": {"1": 0.5}}
    after = {"a": 1, "packages": {"torch": "2", "numpy": "2"}, "calibration": {}, "git": None}
    assert environment_differences(before, after) == ["packages.torch: was 1, is 2"]
    here = {"git": {"here": None, "potstill": {"commit": "a", "changed": False}}, "source_sha256": "1"}
    there = {"git": {"here": {"commit": "b", "changed": True}, "potstill": {"commit": "c", "changed": False}}}
    assert environment_differences(here, there | {"source_sha256": "1"}) == []  # the commit changed other files
    changes = ["git.potstill.commit: was a, is c", "source_sha256: was 1, is 2"]
    assert environment_differences(here, there | {"source_sha256": "2"}) == changes


def test_the_figure_that_differs_most():
    before = {"train": {"top1": 0.5, "nll": 1.0, "count": 9}, "test": {"top1": 0.5, "auc_macro": None}}
    after = {"train": {"top1": 0.25, "nll": 1.125, "count": 4}, "test": {"top1": 0.5, "auc_macro": 0.5}}
    assert largest_metric_difference(before, after) == "of all figures top1 on train differs most, by 0.25"
    assert largest_metric_difference(before, before) == "all figures are the same"


def test_largest_difference(changed_run, finished_run):
    with_other_weights(changed_run)
    assert largest_weight_difference(finished_run / "baseline", changed_run / "baseline") == pytest.approx(
        0.25, abs=1e-6
    )
    assert largest_weight_difference(finished_run / "teacher", finished_run / "teacher") == 0
