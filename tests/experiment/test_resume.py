"""How often a run has looked at test, and what was trained after a look."""

from potstill.config.recipe import load_recipe
from potstill.experiment.plan import plan_stages
from potstill.experiment.resume import describe_test_evaluations, record_test_evaluation, recorded_test_evaluations
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
