"""How often a run has looked at test, what was trained after a look, and with which teacher it resumes."""

import pytest

from potstill.config.recipe import dump_recipe, load_recipe
from potstill.errors import UsageError
from potstill.experiment.plan import plan_stages
from potstill.experiment.resume import (
    check_same_recipe,
    describe_test_evaluations,
    record_test_evaluation,
    recorded_test_evaluations,
)
from potstill.experiment.run_folder import RunFolder


def looked(folder, *sets):
    recipe = load_recipe("quickstart", sets)
    stages = plan_stages(recipe)
    record_test_evaluation(folder, recipe, stages)
    return describe_test_evaluations(recorded_test_evaluations(folder), recipe, stages)


def test_seeds_and_epochs_that_are_added_after_a_look(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_environment({"threads": 1})
    first = looked(folder, "seeds=2", "training.epochs=12")
    assert first == {
        "test_evaluations": 1,
        "seeds": 2,
        "seeds_at_first_look": 2,
        "seeds_added_after_look": 0,
        "epochs_added_after_look": 0,
        "test_every_epoch": False,
        "augmentation_seeds": 2,
    }
    assert looked(folder, "seeds=2", "training.epochs=12") == first  # an interrupted evaluation, done again
    assert looked(folder, "seeds=5", "training.epochs=12")["seeds_added_after_look"] == 3
    last = looked(folder, "seeds=9", "training.epochs=20")
    assert last["test_evaluations"] == 3
    assert (last["seeds_at_first_look"], last["seeds_added_after_look"], last["epochs_added_after_look"]) == (2, 7, 8)
    assert folder.read_environment()["threads"] == 1


def test_views_that_no_seed_varies(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_environment({"threads": 1})
    found = looked(folder, "seeds=4", "data.augmentation_seed=7", "training.evaluate_test_every_epoch=true")
    assert found["augmentation_seeds"] == 1
    assert found["test_every_epoch"]


def test_another_teacher_is_refused_with_the_ways_to_go_on(tmp_path):
    recipe, folder = load_recipe("quickstart"), RunFolder(tmp_path)

    def taught_by(weights):
        return recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"weights": weights})})

    folder.write_recipe(dump_recipe(taught_by("runs/my teacher/teacher")))
    for weights in ("runs/other/teacher", None):  # None: --teacher was left out
        with pytest.raises(UsageError) as caught:
            check_same_recipe(folder, taught_by(weights))
        message = str(caught.value)
        for words in ("  teacher.weights: was", "--teacher 'runs/my teacher/teacher'", "--name", "--overwrite"):
            assert words in message
    folder.write_recipe(dump_recipe(recipe))
    with pytest.raises(UsageError, match=r"without these changes, start another run"):
        check_same_recipe(folder, taught_by("runs/other/teacher"))
