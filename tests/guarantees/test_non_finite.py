"""G10: what is not finite ends the run with exit code 6, says where, and is never kept."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from potstill.cli import main
from potstill.models.model_file import load_model, save_model
from potstill.training import trainer
from potstill.training.checkpointing import load_checkpoint


def stage_of(root, stage):
    return root / "tiny" / stage


def refused(capsys, *arguments):
    capsys.readouterr()
    assert main([str(part) for part in arguments]) == 6
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.partition("error: ")[2]


def test_a_learning_rate_beyond_all_bounds(tiny_recipe, tmp_path, capsys):
    """The teacher before it stays; of the student there is neither a model nor a checkpoint that is not finite."""
    root = tmp_path / "runs"
    rates = ["--set", "training.lr=1e20", "--set", "teacher.training.lr=0.003"]
    error = refused(capsys, "run", tiny_recipe, "--output-dir", root, *rates)
    assert error.startswith("epoch 1, val: at step 1 the loss term ce is nan, on blue/")
    assert "Lower the learning rate (training.lr)" in error
    assert (stage_of(root, "teacher") / "model.json").exists()
    assert not (stage_of(root, "baseline") / "model.json").exists()
    for path in stage_of(root, "baseline").glob("checkpoints/*.checkpoint"):
        tensors, _ = load_checkpoint(path)
        assert all(bool(value.isfinite().all()) for value in tensors.values() if value.is_floating_point())


def test_the_last_finite_checkpoint_goes_on(tiny_recipe, tmp_path, capsys):
    """A rate beyond all bounds from the second epoch on: what the first one saved stays, is finite, and is named."""
    root = tmp_path / "runs"
    flags = [
        "--set",
        "training.epochs=3",
        "--set",
        "training.max_grad_norm=1e30",
        "--set",
        "training.precision=float32",
    ]
    arguments = ["train", tiny_recipe, "--stage", "baseline", "--output-dir", root, "--name", "tiny", *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "_update", exploding(trainer.Trainer._update, after=2))
        error = refused(capsys, *arguments)
    assert error.startswith("epoch 2, val: at step 1 ")
    assert ".png" in error
    assert "the last checkpoint is finite" in error
    tensors, facts = load_checkpoint(stage_of(root, "baseline") / "checkpoints" / "last.checkpoint")
    assert facts["epoch"] == 1
    assert all(bool(value.isfinite().all()) for value in tensors.values() if value.is_floating_point())
    assert main([*map(str, arguments), "--resume"]) == 0


def exploding(update, after):
    """After so many updates the weights become infinite."""
    done = []

    def updated(self):
        update(self)
        done.append(1)
        if len(done) == after:
            with torch.no_grad():
                next(self.distiller.student.parameters()).fill_(float("inf"))

    return updated


@pytest.mark.parametrize("store", ["auto", "off"])
def test_a_teacher_that_says_nan(store, finished_run, tiny_recipe, tmp_path, capsys):
    """Live and recorded: the step, the term and images are named."""
    model = load_model(finished_run / "teacher")
    with torch.no_grad():
        list(model.module.parameters())[-1][0] = float("nan")
    save_model(model, tmp_path / "teacher")
    root = tmp_path / "runs"
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(tiny_recipe.read_text().replace("/store}", f"/store-{store}}}"))
    error = refused(
        capsys,
        "run",
        recipe,
        "--output-dir",
        root,
        "--teacher",
        tmp_path / "teacher",
        "--set",
        f"teacher_cache.mode={store}",
    )
    assert re.match(r"a logit of the teacher on val, \w+/\d\d.png, is NaN or infinite \(4 of 4 images\)", error)
    assert not (stage_of(root, "distilled") / "model.json").exists()
    assert not (root / "tiny" / "results.json").exists()


def test_nothing_infinite_stands_in_a_finished_run(finished_run):
    for stage in ("teacher", "baseline", "distilled"):
        weights = load_file(finished_run / stage / "model.safetensors")
        assert all(bool(value.isfinite().all()) for value in weights.values() if value.is_floating_point())
        for line in (finished_run / stage / "metrics.jsonl").read_text().splitlines():
            json.loads(line, parse_constant=pytest.fail)
