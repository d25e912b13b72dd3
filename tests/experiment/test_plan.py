from potstill.config.recipe import Recipe, load_recipe
from potstill.experiment.plan import plan_stages


def recipe(**changes: object) -> Recipe:
    source = {"teacher": {"model": "a"}, "student": {"model": "b"}, **changes}
    return load_recipe(source, data_needed=False)


def shown(made: Recipe, *parts: str) -> dict[str, tuple[str, ...]]:
    return {stage.name: stage.teachers for stage in (plan_stages(made, parts) if parts else plan_stages(made))}


def test_a_plain_run() -> None:
    assert shown(recipe()) == {"teacher": (), "baseline": (), "distilled": ("teacher",)}
    assert [stage.distils for stage in plan_stages(recipe())] == [False, False, True]


def test_several_teachers_teach_the_first_assistant_and_the_last_assistant_the_student() -> None:
    several = recipe(teacher=[{"model": "a"}, {"model": "c"}], assistants=[{"model": "d"}, {"model": "e"}])

    assert shown(several) == {
        "teacher": (),
        "teacher-2": (),
        "baseline": (),
        "assistant-1": ("teacher", "teacher-2"),
        "assistant-2": ("assistant-1",),
        "distilled": ("assistant-2",),
    }


def test_each_generation_learns_from_the_one_before_and_the_last_is_distilled() -> None:
    born_again = recipe(born_again_generations=3, feature_pairs=[["x", "y"]])

    assert shown(born_again, "teacher", "distilled") == {
        "teacher": (),
        "generation-1": ("teacher",),
        "generation-2": ("generation-1",),
        "distilled": ("generation-2",),
    }
    pairs = {stage.name: stage.feature_pairs for stage in plan_stages(born_again)}
    assert pairs["generation-1"] == (("x", "y"),)
    assert pairs["distilled"] == (("x", "x"),)  # the same network on both sides
    assert pairs["baseline"] is None


def test_every_network_has_random_streams_of_its_own_but_for_the_two_that_are_compared() -> None:
    stages = plan_stages(recipe(teacher=[{"model": "a"}] * 2, born_again_generations=2))

    assert [stage.seed for stage in stages] == ["teacher", "teacher-2", "student", "generation-1", "student"]


def test_a_method_without_teacher_trains_none() -> None:
    alone = {"method": {"name": "tfkd_reg"}}

    assert shown(recipe(**alone)) == {"baseline": (), "distilled": ()}
    assert shown(load_recipe({"student": {"model": "b"}, **alone}, data_needed=False)) == {
        "baseline": (),
        "distilled": (),
    }


def test_parts_of_a_run() -> None:
    assert shown(recipe(teacher=[{"model": "a"}] * 2), "teacher") == {"teacher": (), "teacher-2": ()}
    assert shown(recipe(), "baseline") == {"baseline": ()}
