"""Each rule speaks where its facts are there and give cause, and is silent a step before."""

from pathlib import Path
from typing import Any

import pytest

from potstill.config.recipe import load_recipe
from potstill.report import advice
from potstill.report.advice import RULES, collect_advice
from potstill.report.overview import advice_context
from potstill.report.render import deployment_command
from potstill.report.run_reader import Run, StageResult


def run(stages: dict[str, dict[str, Any]] | None = None, *, recipe: str | None = "name: made\n", **results: Any) -> Run:
    """A run with these figures: {"teacher": {"test": {...}, "training": {...}}}."""
    made = {
        name: StageResult(
            name,
            Path("runs/made") / name,
            {key: facts.get(key) for key in ("training", "head", "model")},
            metrics={split: facts[split] for split in ("train", "val", "test") if split in facts},
        )
        for name, facts in (stages or {}).items()
    }
    return Run(Path("runs/made"), results, made, recipe)


def gain(value: float, low: float, high: float, **more: Any) -> dict[str, Any]:
    return {"top1_gain": value, "top1_gain_low": low, "top1_gain_high": high, "test_images": 400} | more


def test_nothing_is_said_where_nothing_is_known() -> None:
    assert collect_advice(run()) == []
    assert (
        collect_advice(run({"teacher": {}, "baseline": {}, "distilled": {}}, comparison={}, method={}, data={})) == []
    )
    assert advice_context(run()) is None


def test_every_rule_has_a_line_of_its_own() -> None:
    assert len(RULES) == len(set(RULES)) == 15
    assert all(rule.__doc__ for rule in RULES)


@pytest.mark.parametrize(
    ("counts", "f1", "recipe", "said"),
    [
        ({"a": 500, "b": 100}, 0.84, "", True),
        ({"a": 499, "b": 100}, 0.84, "", False),  # less than five times
        ({"a": 500, "b": 100}, 0.86, "", False),  # and it hardly shows
        ({"a": 500, "b": 100}, 0.84, "data:\n  class_balance: weights\n", False),  # done already
        ({"a": 500}, 0.84, "", False),
    ],
)
def test_imbalance(counts: dict[str, int], f1: float, recipe: str, said: bool) -> None:
    found = advice.imbalance(
        run({"distilled": {"test": {"top1": 0.9, "f1_macro": f1}}}, recipe=recipe, data={"counts": {"train": counts}})
    )
    assert (found is not None) == said
    if found is not None:
        assert "5 times as many training images" in found.evidence
        assert "6.0 points below top-1 (90.0 %)" in found.evidence


def test_weak_teacher() -> None:
    assert advice.weak_teacher(run(comparison=gain(0.0, 0, 0, gap=0.001))) is None
    assert "3.0 points below" in str(advice.weak_teacher(run(comparison=gain(0.0, 0, 0, gap=-0.03))))
    assert "equals the baseline" in str(advice.weak_teacher(run(comparison=gain(0.0, 0, 0, gap=0.0))))
    other = "teacher: {model: timm/resnet50.a1_in1k, weights: pretrained}"
    found = advice.weak_teacher(run(comparison=gain(0.0, 0, 0, gap=-0.03), recipe=other))
    assert getattr(found, "flags", None) == ()  # it is the one that would be advised


def test_still_improving() -> None:
    def stopped(best: int, epochs: int, top1: float = 0.8) -> Run:
        facts = {"training": {"best_epoch": best, "epochs": epochs}, "val": {"top1": top1}}
        return run({"teacher": facts, "distilled": facts})

    for rule in (advice.teacher_still_improving, advice.still_improving):
        assert rule(stopped(89, 100)) is None
        assert rule(stopped(4, 4)) is None  # so few epochs say nothing
        assert "90 of 100" in str(rule(stopped(90, 100)))
        assert "11 of 12" in str(rule(stopped(11, 12)))
    assert advice.teacher_still_improving(stopped(100, 100, 0.995)) is None  # there is nothing to improve
    assert advice.teacher_still_improving(stopped(10, 10)).settings == ("teacher.training.epochs=20",)  # type: ignore[union-attr]


def test_no_room_and_as_good_as_teacher() -> None:
    assert advice.no_room(run({"baseline": {"test": {"top1": 0.989}}})) is None
    assert advice.no_room(run({"baseline": {"test": {"top1": 0.99}}})) is not None
    level = {"teacher": {"test": {"top1": 0.9}}, "distilled": {"test": {"top1": 0.9}}}
    assert advice.as_good_as_teacher(run(level, comparison=gain(0.02, 0, 0, gap=0.02))) is not None
    assert advice.as_good_as_teacher(run(level, comparison=gain(0.02, 0, 0, gap=-0.02))) is None
    behind = level | {"distilled": {"test": {"top1": 0.899}}}
    assert advice.as_good_as_teacher(run(behind, comparison=gain(0.02, 0, 0, gap=0.02))) is None
    unlearned = level | {"distilled": {"test": {"top1": 0.9, "at_chance": True}}}
    assert advice.as_good_as_teacher(run(unlearned, comparison=gain(0.02, 0, 0, gap=0.02))) is None


@pytest.mark.parametrize("part", ["seeds", "folds"])
def test_advice_on_top1_is_on_the_mean_over_seeds_as_the_verdict(part: str) -> None:
    tests = {
        name: {"test": {"top1": top1}} for name, top1 in (("teacher", 0.9), ("baseline", 0.99), ("distilled", 0.91))
    }
    means = {"top1": {"n": 5, "mean_a": 0.8, "mean_b": 0.85}}
    repeats = {"seeds": 5, "folds": 5, "figures": means, "gap": 0.1, "top1_gain": {"value": 0.05}}
    made = run(tests, comparison=gain(-0.08, 0, 0, gap=-0.09) | {part: repeats})
    assert advice.as_good_as_teacher(made) is None
    assert advice.no_room(made) is None
    means["top1"] |= {"mean_a": 0.99, "mean_b": 0.95}
    found = advice.as_good_as_teacher(made)
    assert found is not None
    assert "top-1 of 95.0 %" in found.evidence
    assert "top-1 of 99.0 %" in advice.no_room(made).evidence  # type: ignore[union-attr]


def test_overfitting() -> None:
    def made(train: float, best: int) -> Run:
        training = {"best_epoch": best, "epochs": 20}
        return run({"distilled": {"train": {"top1": train}, "val": {"top1": 0.8}, "training": training}})

    assert advice.overfitting(made(0.89, 3)) is None
    assert "best epoch" not in str(advice.overfitting(made(0.95, 11)))
    assert "best epoch was 10 of 20" in str(advice.overfitting(made(0.95, 10)))
    probe = made(0.95, 20)
    probe.stages["distilled"].facts["head"] = {"taken": "probe"}  # of no epoch, and without augmentation
    assert advice.overfitting(probe) is None
    assert probe.stages["distilled"].best_epoch is None


def test_only_stronger_augmentation_is_advised() -> None:
    """``photos`` mirrors already, and crops more than the first advice would."""

    def settings(augment: str) -> tuple[str, ...]:
        stages = {"distilled": {"train": {"top1": 0.99}, "val": {"top1": 0.8}, "training": {}}}
        found = run(stages, recipe=f"data:\n  augment: {augment}\n")
        return getattr(advice.overfitting(found), "settings", ())

    crop, mirror = "data.augment.crop_scale=[0.5, 1]", "data.augment.hflip=true"
    assert settings("null") == (crop, mirror)
    assert settings("{crop_scale: [0.8, 1.0], hflip: true}") == (crop, "data.augment.color_jitter=0.3")
    photos = "crop_scale: [0.35, 1.0], hflip: true"
    assert settings(f"{{{photos}}}") == ("data.augment.color_jitter=0.3", "data.augment.auto_augment=trivialaugment")
    assert settings(f"{{{photos}, auto_augment: trivialaugment}}") == ("data.augment.erasing=0.25",)
    assert settings(f"{{{photos}, auto_augment: trivialaugment, erasing: 0.1}}") == ()


def test_harm() -> None:
    hurt = several(3, -0.03, -0.01) | {"gap": 0.1}
    hurt["seeds"] |= {"gap": 0.1}
    found = advice.harmed(run(comparison=hurt))
    assert found is not None
    assert found.settings == ()
    methods = {
        "{name: dkd, scaling: paper}": True,
        "{name: dkd, preset: cifar100/vgg13-vgg8}": True,
        "{name: dkd, preset: cifar100/vgg13-vgg8, scaling: auto}": False,
        "{name: dkd}": False,
        "{name: kd}": False,
    }
    for method, bound in methods.items():
        found = advice.harmed(run(comparison=hurt, recipe=f"name: made\nmethod: {method}\n"))
        assert found is not None
        assert (found.settings == ("method.scaling=auto",)) is bound
    hurt["seeds"] |= {"gap": -0.1}
    assert advice.harmed(run(comparison=hurt)) is None  # the teacher is to blame, which another rule names
    assert advice.harmed(run(comparison=gain(0.0, -0.01, 0.01, gap=0.1))) is None


def test_students_from_scratch_that_gained_nothing_by_kd_get_another_method() -> None:
    def find(teacher: str = "{model: resnet18, weights: pretrained}", student: str = "{model: resnet10t}", **more: Any):
        recipe = f"name: made\nteacher: {teacher}\nstudent: {student}\n"
        results = {"comparison": gain(0.0, -0.01, 0.01), "method": {"name": "kd"}} | more
        return advice.other_method(run(recipe=recipe, **results))

    found = find()
    assert found is not None
    assert found.flags == ("--method", "auto")
    assert "embeddings" in found.title
    found = find(teacher="{model: resnet18}")  # trained by the run
    assert found is not None
    assert "correlate" in found.action
    assert find(student="{model: resnet10t, weights: pretrained}") is None
    given, hidden = "{model: python/teach, weights: given}", {"teacher": {"model": {"parameters": None}}}
    for stages, title in (({}, "embeddings"), (hidden, "Another method")):  # a module, a function
        made = run(stages, recipe=f"name: made\nteacher: {given}\nstudent: {{model: resnet10t}}\n",
                   comparison=gain(0.0, -0.01, 0.01), method={"name": "kd"})  # fmt: skip
        found = advice.other_method(made)
        assert found is not None
        assert title in found.title
    assert find(method={"name": "srd"}) is None
    assert find(comparison=several(3, 0.001, 0.1)) is None
    assert find(comparison=None) is None


def several(count: int, low: float, high: float) -> dict[str, Any]:
    value, p = (low + high) / 2, 0.01 if low > 0 or high < 0 else 0.5
    whole = {"value": value, "low": low, "high": high, "p": p, "confidence": 0.95, "seed_share": 0.7}
    return gain(0.01, 0.0, 0.02) | {"seeds": {"figures": {"top1": {"n": count}}, "top1_gain": whole}}


def test_one_seed_and_few_seeds() -> None:
    took = {"baseline": {"training": {"seconds": 60.0}}, "distilled": {"training": {"seconds": 65.0}}}
    found = advice.one_seed(run(took, comparison=gain(0.01, 0.0, 0.02)))
    assert found is not None
    assert "2 min 05 s as this one did" in found.evidence
    assert advice.one_seed(run(comparison=several(2, -0.1, 0.1))) is None
    assert advice.few_seeds(run(comparison=gain(0.01, 0.0, 0.02))) is None
    assert advice.few_seeds(run(comparison=several(4, -0.1, 0.1))) is not None
    assert advice.few_seeds(run(comparison=several(5, -0.1, 0.1))) is None
    assert advice.few_seeds(run(comparison=several(3, 0.001, 0.1))) is None  # clear already


def test_a_test_split_of_other_images_is_said() -> None:
    counts = {"val": {"a": 400}, "test": {"a": 400}}
    tops = {"teacher": (0.97, 0.80), "baseline": (0.72, 0.50), "distilled": (0.76, 0.55)}

    def made(**changed: tuple[float, float]) -> Run:
        both = {name: {"val": {"top1": val}, "test": {"top1": test}} for name, (val, test) in (tops | changed).items()}
        return run(both, data={"counts": counts})

    found = advice.test_is_other(made())
    assert "The baseline has a top-1 of 72.0 % on val and 50.0 % on test" in str(found)
    assert advice.test_is_other(made(distilled=(0.76, 0.67))) is None  # one network is less than 10 points worse
    counts = {"val": {"a": 60}, "test": {"a": 60}}
    assert advice.test_is_other(made()) is None  # chance explains so much with few images
    assert advice.test_is_other(run({"baseline": {"val": {"top1": 0.9}}}, data={"counts": counts})) is None


def test_test_too_small() -> None:
    # +- 4 points where the gain is 1: 16 times the 400 images
    found = advice.test_too_small(run(comparison=gain(0.01, -0.03, 0.05)))
    assert found is not None
    assert "about 6,400 images" in found.action
    assert advice.test_too_small(run(comparison=gain(0.01, -0.019, 0.039))) is None
    assert advice.test_too_small(run(comparison=gain(0.05, 0.01, 0.09))) is None
    assert "would tell" not in str(advice.test_too_small(run(comparison=gain(0.0, -0.04, 0.04))))


def test_what_is_advised_can_be_typed() -> None:
    """Settings are those of a recipe, and the command names this run's own recipe."""
    made = run(
        {
            "teacher": {
                "train": {"nll": 0.01},
                "val": {"nll": 0.5, "top1": 0.8},
                "training": {"best_epoch": 9, "epochs": 9},
            },
            "distilled": {
                "train": {"top1": 1.0, "agreement": 0.5},
                "val": {"top1": 0.8},
                "test": {"top1": 0.7, "f1_macro": 0.5},
                "training": {"best_epoch": 9, "epochs": 9},
            },
        },
        comparison=gain(0.0, -0.05, 0.05, gap=0.2, parameter_ratio=50.0),
        method={"name": "kd", "temperature": 4.0},
        data={"counts": {"train": {"a": 90, "b": 9}, "val": {"a": 9, "b": 9}}},
    )
    found = collect_advice(made)
    settings = [each.settings for each in found if each.settings]
    assert len(settings) >= 3
    for each in settings:
        load_recipe("quickstart", each)
    commands = [command for *_, command in (advice_context(made) or {})["advice"] if command]
    assert commands
    assert all(command.startswith("potstill run runs/made/recipe.yaml --") for command in commands)
    assert not any(
        command for *_, command in (advice_context(run(recipe=None, comparison=several(3, -1, 1))) or {})["advice"]
    )


def test_commands_of_a_recipe_that_names_code_allow_it() -> None:
    for model, allowed in (("mine.py:Small", True), ("cifar/resnet8", False)):
        made = run(recipe=f"student: {{model: '{model}'}}\n", comparison=gain(0.01, -0.1, 0.12, fold=None))
        commands = [command for *_, command in (advice_context(made) or {})["advice"] if command]
        assert commands
        assert all(
            each.endswith(" --allow-code") == allowed for each in [*commands, " ".join(deployment_command(made))]
        )


def test_folds() -> None:
    def folds(count: int, seeds: int, low: float, high: float, share: float) -> dict[str, Any]:
        whole = {"value": 0.01, "low": low, "high": high, "p": 0.5, "confidence": 0.95, "seed_share": share}
        found = {"folds": count, "seeds": seeds, "figures": {"top1": {"n": count}}, "top1_gain": whole}
        return gain(0.01, low, high, folds=found)

    assert advice.one_seed(run(comparison=folds(5, 1, -0.1, 0.1, 0.8))) is None
    found = advice.few_seeds(run(comparison=folds(5, 1, -0.1, 0.1, 0.8)))
    assert found is not None
    assert found.flags == ("--resume", "--seeds", "3")
    assert "80 % of its variance" in found.evidence
    assert advice.few_seeds(run(comparison=folds(5, 3, -0.1, 0.1, 0.8))) is None
    assert advice.few_seeds(run(comparison=folds(5, 1, -0.1, 0.1, 0.4))) is None  # images decide
    few = advice.test_too_small(run(comparison=folds(5, 1, -0.1, 0.1, 0.4)))
    assert few is not None
    assert few.flags == ()  # each image is tested already
    one = advice.test_too_small(run(comparison=gain(0.01, -0.03, 0.05)))
    assert one is not None
    assert one.flags == ("--folds", "5")
    many = advice.test_too_small(run(comparison=gain(0.01, -0.03, 0.05) | {"test_images": 2000}))
    assert many is not None
    assert many.flags == ()
    assert collect_advice(run(comparison=gain(0.01, -0.03, 0.05, fold="fold 1 of 5"))) == []


def test_unlabeled_images() -> None:
    stages = {"teacher": {"val": {"top1": 0.9}}, "distilled": {"train": {"top1": 0.95}, "val": {"top1": 0.8}}}
    counts = {"train": {"a": 30, "b": 70}}
    found = advice.unlabeled_images(run(stages, data={"counts": counts}))
    assert found is not None
    assert "With 100 training images" in found.evidence
    assert "15.0 points below" in found.evidence
    assert advice.unlabeled_images(run(stages, data={"counts": counts, "unlabeled": {"images": 5}})) is None
    assert advice.unlabeled_images(run({"distilled": stages["distilled"]})) is None  # no teacher
    stages["distilled"]["val"]["top1"] = 0.9
    assert advice.unlabeled_images(run(stages)) is None


def test_more_labels() -> None:
    def probe(*points: tuple[int, float]) -> dict[str, Any]:
        return {"head": {"learning_curve": [{"images": images, "top1": top1} for images, top1 in points]}}

    rising = probe((200, 0.6), (400, 0.7), (800, 0.775))
    found = advice.more_labels(run({"teacher": rising}))
    assert found is not None
    assert "embeddings of the teacher" in found.evidence
    assert "60.0 % with 200, 70.0 % with 400, 77.5 % with 800 training images" in found.evidence
    assert "bring it 5.6 points" in found.evidence  # 0.225 x 0.25
    flat = probe((200, 0.77), (400, 0.772), (800, 0.775))
    assert advice.more_labels(run({"teacher": rising, "distilled": flat})) is None  # the student's own counts
    assert "embeddings of the student" in (advice.more_labels(run({"distilled": rising})) or found).evidence
    assert advice.more_labels(run({"teacher": probe((199, 0.6), (398, 0.7), (796, 0.775))})) is None  # too few to tell
    assert advice.more_labels(run({"teacher": probe((400, 0.7), (800, 0.775))})) is None
    for broken in (None, 5, [5, {"images": "many", "top1": 0.5}, {"images": 800, "top1": 7.0}]):
        assert advice.more_labels(run({"teacher": {"head": {"learning_curve": broken}}})) is None


def test_the_expected_gain_is_that_of_a_power_law() -> None:
    assert advice.expected_gain([(100, 0.6), (400, 0.8)]) == pytest.approx(0.2 - 0.2 / 2**0.5, abs=1e-6)
    assert advice.expected_gain([(100, 0.8), (200, 0.7), (400, 0.6)]) == 0  # a falling curve promises nothing
    assert advice.expected_gain([(100, 0.9), (200, 1.0), (400, 1.0)]) < 0.00125  # half an image
