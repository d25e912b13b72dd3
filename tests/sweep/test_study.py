"""The study alone: what mattered, what is pruned, what is damaged."""

import pytest

from potstill.config.recipe import load_recipe
from potstill.errors import ArtifactError
from potstill.sweep import baseline_space, parse_space, recipe_values, study
from potstill.sweep.worker import Pruned, PruningObserver
from potstill.training.callbacks import SilentObserver

optuna = pytest.importorskip("optuna", reason='needs the extra "sweep"')


def opened(folder, **options):
    return study.open_study(folder, **{"minimize": False, "seed": 0, "grid": False, "epochs": 4} | options)


def test_a_hopeless_trial_is_pruned_by_its_student_alone(tmp_path):
    found = opened(tmp_path)
    for _ in range(study.STARTUP_TRIALS):
        good = found.ask()
        for epoch in range(1, 5):
            good.report(0.9, epoch)
        found.tell(good, 0.9)
    bad = PruningObserver(found.ask(), "top1", "distilled", SilentObserver())
    bad.stage("assistant-1", "")  # its figures are not the student's
    for epoch in range(1, 5):
        bad.epoch_start(epoch, 4, 1, 1)
        bad.epoch_end({"epoch": epoch, "val": {"top1": 0.1}})
    bad.stage("distilled", "")
    bad.epoch_start(1, 4, 1, 1)
    bad.epoch_end({"epoch": 1, "val": {"top1": 0.1}})  # too early to say
    with pytest.raises(Pruned):
        bad.epoch_end({"epoch": 2, "val": {"top1": 0.1}})


def test_a_grid_is_not_pruned(tmp_path):
    assert isinstance(opened(tmp_path, grid=True).pruner, optuna.pruners.NopPruner)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("student.training.lr=0.001..0.01:log", {"student.training.lr": "0.002"}),
        ("student.training.lr=1e-3,2e-3", {"student.training.lr": "2e-3", "student.training.weight_decay": "0.0001"}),
        ("student.training.lr=1e-3,1e-2", {"student.training.weight_decay": "0.0001"}),  # without the recipe's own
        ("student.training.optimizer_options.eps=1e-8,1e-6", {"student.training.lr": "0.002"}),
    ],
)
def test_the_first_baseline_has_the_recipe_s_values_if_they_are_in_the_space(text, first, tmp_path):
    recipe = load_recipe("quickstart")
    space = baseline_space(parse_space([text, "method.alpha=0..1"], "quickstart", [], {}), recipe, 20)
    found = opened(tmp_path)
    found.enqueue_trial(recipe_values(space, recipe))
    chosen = study.suggest_settings(found.ask(), space)
    assert chosen.keys() == {dimension.key for dimension in space.dimensions}
    assert first.items() <= chosen.items()


def test_a_damaged_journal_is_said(tmp_path):
    opened(tmp_path)
    (tmp_path / study.JOURNAL_FILE).write_text("nonsense\n" * 3)
    with pytest.raises(ArtifactError, match="damaged"):
        opened(tmp_path)
