"""Methods that deploy another network than the student: it is trained, saved, counted and loaded."""

import json
import shutil

import pytest
import torch

from potstill.errors import ArtifactError
from potstill.experiment import pipeline
from potstill.models.model_file import load_model
from potstill.training.callbacks import SilentObserver

ALONE = ("teacher", "distilled")  # without a baseline


def results(path):
    return json.loads((path / "results.json").read_text())


def answers(path, stage="distilled"):
    model = load_model(path / stage)
    generator = torch.Generator().manual_seed(0)
    return model, model.predict(torch.randn(5, 3, 8, 8, generator=generator))


@pytest.mark.parametrize(
    ("method", "deployed"),
    [("simkd", "projected_head"), ("norm", "merged_stage"), ("dho, alpha: 0.5, beta: 1.0", "dual_head")],
)
def test_what_was_evaluated_is_what_is_saved(method, deployed, recipe, tmp_path):
    changes = {"method": f"{{name: {method}}}", "training.epochs": 2, "training.ema_decay": 0.5}
    path = pipeline.run(recipe(**changes), output_dir=tmp_path)
    model, said = answers(path)
    found = results(path)["stages"]["distilled"]["model"]
    assert found["remodelled"] == model.remodelled["name"] == deployed
    assert found["parameters"] == sum(parameter.numel() for parameter in model.module.parameters())
    assert found["parameters"] != results(path)["stages"]["baseline"]["model"]["parameters"]
    assert f"parameters   {found['parameters']:,}" in (path / "distilled" / "summary.txt").read_text()
    assert said.shape == (5, 3)
    # predictions_test.csv was written before the file was read back
    lines = (path / "distilled" / "predictions_test.csv").read_text().splitlines()[1:]
    right = sum(line.split(",")[1] == line.split(",")[2] for line in lines)
    assert results(path)["stages"]["distilled"]["test"]["top1"] == pytest.approx(right / len(lines))
    epochs = (path / "distilled" / "metrics.jsonl").read_text().splitlines()
    best = max(json.loads(line)["val"]["top1"] for line in epochs)
    assert results(path)["stages"]["distilled"]["val"]["top1"] == pytest.approx(best)


def test_how_two_heads_count_is_chosen_on_val_and_saved(recipe, tmp_path):
    changes = {"method": "{name: dho}", "training.epochs": 3, "training.lr": 0.01}
    path = pipeline.run(recipe(**changes), output_dir=tmp_path, stages=ALONE)
    model, said = answers(path)
    chosen = model.remodelled
    assert model.module.heads.alpha == chosen["alpha"]
    assert model.module.heads.beta == chosen["beta"]
    assert torch.isfinite(said).all()
    stage = results(path)["stages"]["distilled"]
    epochs = (path / "distilled" / "metrics.jsonl").read_text().splitlines()
    best = max(json.loads(line)["val"]["top1"] for line in epochs)
    assert stage["val"]["top1"] == pytest.approx(model.facts["val"]["top1"])
    assert stage["val"]["top1"] >= best  # 0.5 and 1, which every epoch has, are among the candidates
    again = pipeline.run(recipe(**changes), output_dir=tmp_path, stages=ALONE, resume=True)
    assert torch.equal(answers(again)[1], said)


def test_a_merged_student_has_no_wide_layers_left(recipe, tmp_path):
    settings = {"method": "{name: norm}", "training.epochs": 1, "training.keep_checkpoint": True}
    path = pipeline.run(recipe(**settings), output_dir=tmp_path)
    model, _ = answers(path)
    plain = results(path)["stages"]["baseline"]["model"]["parameters"]
    # One 1x1 convolution on 64 channels besides the student: 64 * 64 weights and 64 biases.
    assert sum(parameter.numel() for parameter in model.module.parameters()) == plain + 64 * 64 + 64
    checkpoint = (path / "distilled" / "checkpoints" / "last.checkpoint").stat().st_size
    assert checkpoint > 3 * (path / "distilled" / "model.safetensors").stat().st_size  # trained wide


def test_a_killed_run_of_a_remodelled_student_ends_the_same(recipe, tmp_path):
    class Killed(Exception):
        pass

    class Killer(SilentObserver):
        current = ""

        def stage(self, name, detail):
            self.current = name

        def epoch_start(self, epoch, *_):
            if (self.current, epoch) == ("distilled", 2):
                raise Killed

    made = recipe(method="{name: simkd}")
    how = {"output_dir": tmp_path, "stages": ALONE, "evaluate": False}
    whole = pipeline.run(made, name="whole", **how)
    with pytest.raises(Killed):
        pipeline.run(made, name="cut", observer=Killer(), **how)
    cut = pipeline.run(made, name="cut", resume=True, **how)
    assert torch.equal(answers(cut)[1], answers(whole)[1])


def test_a_remodelled_network_teaches_but_gets_no_new_head(photographs, recipe, tmp_path):
    made = recipe(**{"method": "{name: simkd}", "training.epochs": 1})
    path = pipeline.run(made, output_dir=tmp_path, name="first", stages=ALONE, evaluate=False)
    teacher = {"teacher": f"{{weights: '{path / 'distilled'}'}}", "training.epochs": 1}
    again = pipeline.run(recipe(**teacher), output_dir=tmp_path, name="second", stages=ALONE)
    assert torch.equal(answers(again, "teacher")[1], answers(path)[1])
    assert load_model(again / "teacher").remodelled == load_model(path / "distilled").remodelled
    for name in ("blue", "red"):
        shutil.copytree(photographs / name, tmp_path / "two" / name)
    changes = {**teacher, "data.source": f"'{tmp_path / 'two'}'", "teacher.new_head": True}
    with pytest.raises(ArtifactError, match=r"layers of method projected_head: it cannot get a new head"):
        pipeline.run(recipe(**changes), output_dir=tmp_path, name="third")
