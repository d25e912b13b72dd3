"""Runs between two domains, end to end on image files."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from potstill.config.recipe import load_recipe
from potstill.data.datasets import load_data
from potstill.data.image_sets import RelabeledSet, Subset
from potstill.data.loader import Loader
from potstill.errors import ArtifactError, DataError, UsageError
from potstill.experiment import pipeline, reproduce
from potstill.experiment.cache_verification import verify_cache
from potstill.experiment.domain_adaptation import Domains
from potstill.experiment.plan import PlannedStage
from potstill.export.evaluate import evaluate
from potstill.models.model_file import load_model, save_model
from potstill.report import render as data_section
from potstill.report.run_reader import read_run
from potstill.training.callbacks import SilentObserver
from potstill.training.devices import create_compute

COLOURS = {"blue": (30, 60, 200), "green": (40, 180, 60), "red": (210, 40, 30)}
NOW = {"teacher_cache": "off"}


@pytest.fixture(scope="session")
def night(tmp_path_factory):
    """The classes of ``photographs``, fifteen darker and bluer images each."""
    folder = tmp_path_factory.mktemp("night")
    random = np.random.default_rng(1)
    for name, colour in COLOURS.items():
        (folder / name).mkdir()
        for i in range(15):
            pixels = np.clip(random.normal(np.array(colour) * 0.7 + (0, 0, 20), 45, (16, 20, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"n{i:02d}.png")
    return folder


@pytest.fixture(scope="session")
def between(photographs, night):
    """A recipe from the one to the other; further settings as after --set."""

    def make(*sets, **more):
        value = {
            "name": "tiny",
            "data": {"source": str(photographs), "target": str(night), "size": 8, "workers": 0},
            "domain": {"confidence": 0.5},
            "teacher": {"model": "cifar/resnet8", "training": {"epochs": 4}},
            "student": {"model": "cifar/resnet8"},
            "method": {"name": "kd", "temperature": 2.0, "alpha": 0.5},
            "training": {"epochs": 2, "batch_size": 16, "lr": 0.003, "precision": "float32", "checkpoint_seconds": 0},
        }
        return load_recipe(value | more, sets)

    return make


@pytest.fixture(scope="module")
def done(between, tmp_path_factory):
    """A whole run with AdaBN and stored answers, in two seeds."""
    root = tmp_path_factory.mktemp("domains")
    recipe = between("domain.adapt_batch_norm=true", f"teacher_cache.folder={root / 'stores'}", "seeds=2")
    return pipeline.run(recipe, output_dir=root)


class Listening(SilentObserver):
    def __init__(self):
        self.said = []

    def note(self, message):
        self.said.append(message)

    def warn(self, message):
        self.said.append(message)


class Impatient(SilentObserver):
    """Ends a run after an epoch of a stage."""

    def __init__(self, stage, epoch):
        self.wanted, self.current = (stage, epoch), ""

    def stage(self, name, detail):
        self.current = name

    def epoch_end(self, record):
        if (self.current, record["epoch"]) == self.wanted:
            raise KeyboardInterrupt


def results(path):
    return json.loads((path / "results.json").read_text())


def epochs(path, stage):
    return [json.loads(line) for line in (path / stage / "metrics.jsonl").read_text().splitlines()]


def weights(path, stage="distilled"):
    return (path / stage / "model.safetensors").read_bytes()


def rows(path, stage, split):
    with (path / stage / f"predictions_{split}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def domains(recipe, data=None, observer=None):
    observer = observer or SilentObserver()
    return Domains(recipe, data or load_data(recipe.data), create_compute(recipe.training), observer, observer.warn)


def classifier(recipe, seed=0):
    """An untrained teacher."""
    from potstill.experiment.builders import build_network
    from potstill.models.model_file import Classifier

    torch.manual_seed(seed)
    start = build_network(recipe, recipe.network("teacher"), ("blue", "green", "red"))
    return Classifier(start.module, start.architecture, ("blue", "green", "red"), start.input)


def test_figures_are_of_the_target_and_those_of_the_source_stand_beside(done, between):
    found = results(done)
    data = load_data(between().data)
    assert found["data"]["source"] == data.target.source
    assert found["data"]["counts"] == data.target.counts()
    assert found["data"]["source_domain"]["source"] == data.source
    assert found["data"]["source_domain"]["counts"] == data.counts()
    for stage in ("teacher", "baseline", "distilled"):
        own = rows(done, stage, "test")
        assert [row["path"] for row in own] == list(data.target.test.names)
        right = np.mean([row["label"] == row["prediction"] for row in own])
        assert found["stages"][stage]["test"]["top1"] == pytest.approx(right)
        model = load_model(done / stage)
        loader = Loader(data.test, model.input, batch_size=4)
        with torch.no_grad():
            said = torch.cat([model.module(batch.images).argmax(dim=1) for batch in loader.epoch()])
        top1 = float((said.numpy() == data.test.labels).mean())
        assert found["stages"][stage]["source_test"]["top1"] == pytest.approx(top1), stage
        assert found["stages"][stage]["source_test"]["count"] == len(data.test)


def test_the_comparison_says_what_was_learned_from(done, between):
    found, data = results(done)["comparison"]["domain"], load_data(between().data)
    chosen = load_model(done / "distilled").facts["domain"]
    assert found["images"] == chosen["images"] == sum(chosen["counts"].values()) > 0
    assert found["of"] == len(data.target.train)
    assert (found["labelled"], found["target_labels"], found["confidence"]) == (0, 0.0, 0.5)
    assert found["adapted"] is True
    assert found["picked_by"] == "the source's val"
    both = results(done)
    means = [
        np.mean([both["stages"][name]["source_test"]["top1"], both["repeats"][f"{name}-2"]["source_test"]["top1"]])
        for name in ("baseline", "distilled")
    ]
    assert [found["source_top1"][name] for name in ("baseline", "distilled")] == pytest.approx(means)
    verdict = results(done)["comparison"]["verdict"]
    assert "Top-1 on the target's test" in verdict
    assert "On the source's test" in verdict
    assert "no label of the target was used" in verdict
    assert f"{found['images']} of 33 target images" in verdict
    assert "test images of the target" in verdict
    facts = dict(data_section.data_context(read_run(done))["facts"])
    assert facts["Source domain"].startswith(str(data.source))
    assert facts["Target domain, of which all figures are"] == data.target.source


def test_what_adapting_alone_brings_the_baseline_is_told(done, between):
    """The same statistics by hand: a copy of the baseline, asked of every test image of the target."""
    data, found = load_data(between().data), []
    for stage in ("baseline", "baseline-2"):
        model = load_model(done / stage)
        domains(between("domain.adapt_batch_norm=true"), data).take_statistics(model, stage)
        with torch.no_grad():
            batches = list(Loader(data.target.test, model.input, batch_size=4).epoch())
            said = torch.cat([model.module.eval()(batch.images).argmax(dim=1) for batch in batches])
        found.append(float((said.numpy() == data.target.test.labels).mean()))
    comparison = results(done)["comparison"]
    assert comparison["domain"]["adapted_baseline_top1"] == pytest.approx(np.mean(found))
    assert "With the target's BatchNorm statistics only, the baseline has" in comparison["verdict"]


def test_labels_of_the_target_cannot_leak_into_training(between, tmp_path):
    """With the labels of train and val shuffled, every weight is the same."""
    recipe = between("domain.adapt_batch_norm=true", **NOW)
    data = load_data(recipe.data)
    random, target = np.random.default_rng(5), data.target
    mixed = {split: RelabeledSet(target.split(split), random.permutation(target.split(split).labels)) for split in
             ("train", "val")}  # fmt: skip
    assert (mixed["train"].labels != target.train.labels).any()
    plain = load_recipe(recipe.model_dump(), ["data.target=null", "domain=null"])
    kept = {name: value for name, value in recipe.model_dump().items() if name != "data"}
    without = recipe.__class__.model_validate(kept | {"data": plain.data.model_dump()})
    for name, each in (("as-they-are", target), ("mixed", replace(target, train=mixed["train"], val=mixed["val"]))):
        pipeline.run(without, output_dir=tmp_path, name=name, data=replace(data, target=each), evaluate=False)
    for stage in ("teacher", "baseline", "distilled"):
        assert weights(tmp_path / "mixed", stage) == weights(tmp_path / "as-they-are", stage), stage


def test_teacher_and_baseline_are_those_of_a_run_without_a_target(between, photographs, tmp_path):
    """But for the statistics that AdaBN takes anew, the target changes nothing of them."""
    with_target = pipeline.run(between(**NOW), output_dir=tmp_path, name="with", evaluate=False)
    value = between(**NOW).model_dump(mode="json") | {"domain": None}
    value["data"] |= {"target": None}
    alone = pipeline.run(load_recipe(value), output_dir=tmp_path, name="alone", evaluate=False)
    for stage in ("teacher", "baseline"):
        assert weights(with_target, stage) == weights(alone, stage)
    assert weights(with_target) != weights(alone)


def test_the_adapted_teacher_has_statistics_of_the_target_and_the_trained_weights(done, between, tmp_path):
    plain = pipeline.run(between(**NOW), output_dir=tmp_path, stages=("teacher",), evaluate=False)
    before, after = (load_model(path / "teacher").module.state_dict() for path in (plain, done))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    data, model = load_data(between().data), load_model(done / "teacher")
    first = next(module for module in model.module.modules() if isinstance(module, torch.nn.Conv2d))
    images = torch.cat([batch.images for batch in Loader(data.target.train, model.input, batch_size=4).epoch()])
    with torch.no_grad():
        wanted = first(images).double().mean(dim=(0, 2, 3))
    norm = next(module for module in model.module.modules() if isinstance(module, torch.nn.BatchNorm2d))
    assert norm.running_mean.double().numpy() == pytest.approx(wanted.numpy(), rel=1e-4, abs=1e-5)
    assert model.facts["batch_norm"] == {"of": data.target.source, "images": len(data.target.train)}


def test_the_student_sees_only_images_of_which_the_teacher_is_sure_in_balanced_draws(between):
    recipe = between("domain.confidence=0.35")
    listening = Listening()
    own = domains(recipe, observer=listening)
    data, teacher = own.data, classifier(recipe)
    seen = own.stage_data(PlannedStage("distilled", ("teacher",), distils=True), {"teacher": teacher})
    teacher.module.eval()
    loader = Loader(data.target.train, teacher.input, batch_size=5)
    with torch.no_grad():
        said = torch.cat([teacher.module(batch.images).softmax(dim=1) for batch in loader.epoch()])
    sure = (said.max(dim=1).values >= 0.35).numpy()
    assert 0 < sure.sum() < len(sure)
    assert seen.train.names == tuple(np.array(data.target.train.names)[sure])
    assert set(seen.train.labels.tolist()) == {-100}
    assert seen.draws.groups.tolist() == said.argmax(dim=1).numpy()[sure].tolist()
    assert seen.draws.length == len(data.train)  # as many images per epoch as the baseline sees
    assert seen.val is data.val
    assert seen.test is data.target.test is own.stage_data(PlannedStage("teacher"), {}).test
    assert any(f"{sure.sum()} of {len(sure)} target images are used for training" in text for text in listening.said)
    unseen = set(range(3)) - set(seen.draws.groups.tolist())
    assert any("the teacher predicts no target image" in text for text in listening.said) == bool(unseen)


def test_statistics_are_taken_from_mixed_batches_of_all_images(between):
    """Listed, they come class by class, and a batch would be normalised by what is special to its class."""
    own = domains(between(f"training.batch_size={len(COLOURS) * 11 - 1}"))  # one would be left over
    loader = own._loader(classifier(own.recipe), shuffled=3)
    ids = np.concatenate(loader.ids_of(0))
    assert sorted(ids.tolist()) == list(range(33))
    own = domains(between("training.batch_size=8"))
    batches = own._loader(classifier(own.recipe), shuffled=3).ids_of(0)
    assert len(batches) == 4  # not 8, 8, 8, 8 and 1
    assert all(len(set(own.data.target.train.labels[ids].tolist())) > 1 for ids in batches)


def test_without_balancing_every_image_is_shown_equally_often(between):
    recipe = between("domain.confidence=0", "domain.class_balance=false")
    own = domains(recipe)
    seen = own.stage_data(PlannedStage("distilled", ("teacher",), distils=True), {"teacher": classifier(recipe)})
    assert len(seen.train) == len(own.data.target.train)
    assert seen.draws.groups is None
    assert seen.draws.length == len(own.data.train)


def test_a_share_of_labels_teaches_both_students_and_picks_both(between):
    recipe = between("data.target_labels=0.4", "domain.confidence=1")
    own = domains(recipe)
    data, teacher = own.data, classifier(recipe)
    baseline = own.stage_data(PlannedStage("baseline"), {})
    distilled = own.stage_data(PlannedStage("distilled", ("teacher",), distils=True), {"teacher": teacher})
    known = dict(zip(distilled.train.names, distilled.train.labels.tolist(), strict=True))
    true = dict(zip(data.target.train.names, data.target.train.labels, strict=True))
    assert known == {name: true[name] for name in known}
    assert np.bincount(list(known.values())).tolist() == [4, 4, 4]  # of 11 each: 40 %
    assert baseline.train.names == (*data.train.names, *known)
    assert baseline.train.labels.tolist() == [*data.train.labels.tolist(), *known.values()]
    assert baseline.val.names == distilled.val.names
    assert set(baseline.val.names) <= set(data.target.val.names)
    assert sorted(set(baseline.val.labels.tolist())) == [0, 1, 2]
    assert distilled.draws.length == len(baseline.train)
    assert own.stage_data(PlannedStage("teacher"), {}).train is data.train
    assert own.stage_data(PlannedStage("teacher"), {}).val is data.val


def test_a_run_with_some_labels(between, tmp_path):
    run = pipeline.run(between("data.target_labels=0.4", **NOW), output_dir=tmp_path)
    found = results(run)["comparison"]["domain"]
    assert found["labelled"] == 12
    assert found["picked_by"] == "the target's labelled val"
    assert "40 % of the target's" in results(run)["comparison"]["verdict"]
    terms = [record["train"]["terms"] for record in epochs(run, "distilled")]
    assert all(each["ce"] > 0 and each["kd"] > 0 for each in terms)


def test_without_labels_the_label_term_is_nothing(done):
    for record in epochs(done, "distilled"):
        assert record["train"]["terms"]["ce"] == 0
        assert record["train"]["top1"] is None
        assert record["val"]["count"] == 9  # of the source


def test_more_images_without_labels_join_those_of_the_target(between, night, tmp_path):
    for i in range(4):
        Image.fromarray(np.full((16, 20, 3), 20 * i, np.uint8)).save(tmp_path / f"more{i}.png")
    recipe = between("domain.confidence=0", f"data.unlabeled={tmp_path}")
    own = domains(recipe)
    seen = own.stage_data(PlannedStage("distilled", ("teacher",), distils=True), {"teacher": classifier(recipe)})
    assert seen.train.names[-4:] == tuple(f"more{i}.png" for i in range(4))
    assert len(seen.train) == len(own.data.target.train) + 4
    assert seen.unlabeled is None


# resuming, repeating, storing


@pytest.mark.parametrize(("stage", "epoch"), [("teacher", 4), ("distilled", 1)])
def test_an_interrupted_run_goes_on_to_the_same_weights(between, done, tmp_path, stage, epoch):
    recipe = between("domain.adapt_batch_norm=true", f"teacher_cache.folder={tmp_path / 'stores'}")
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(recipe, output_dir=tmp_path, observer=Impatient(stage, epoch))
    again = pipeline.run(recipe, output_dir=tmp_path, resume=True)
    for each in ("teacher", "baseline", "distilled"):
        assert weights(again, each) == weights(done, each), each
    assert results(again)["comparison"]["domain"]["images"] == results(done)["comparison"]["domain"]["images"]


def test_a_teacher_that_was_saved_but_not_yet_adapted_is_adapted_on_resuming(between, done, tmp_path):
    recipe = between("domain.adapt_batch_norm=true", f"teacher_cache.folder={tmp_path / 'stores'}")
    run = pipeline.run(recipe, output_dir=tmp_path, stages=("teacher",), evaluate=False)
    plain = pipeline.run(between(**NOW), output_dir=tmp_path, name="plain", stages=("teacher",), evaluate=False)
    model, facts = load_model(plain / "teacher"), load_model(run / "teacher").facts
    model.facts = {key: value for key, value in facts.items() if key != "batch_norm"}
    save_model(model, run / "teacher")
    assert weights(run, "teacher") != weights(done, "teacher")
    listening = Listening()
    pipeline.run(recipe, output_dir=tmp_path, resume=True, observer=listening)
    assert weights(run, "teacher") == weights(done, "teacher")
    assert weights(run) == weights(done)
    assert sum("AdaBN" in text for text in listening.said) == 1


def test_a_ready_made_teacher_is_adapted_too(between, done, photographs, tmp_path):
    plain = pipeline.run(between(**NOW), output_dir=tmp_path, name="plain", stages=("teacher",), evaluate=False)
    recipe = between(
        "domain.adapt_batch_norm=true", f"teacher.weights={plain / 'teacher'}", "teacher.training={}", **NOW
    )
    run = pipeline.run(recipe, output_dir=tmp_path, name="ready", stages=("teacher",), evaluate=False)
    assert weights(run, "teacher") == weights(done, "teacher")


def test_a_run_is_repeated_byte_for_byte(done, tmp_path):
    record = reproduce.read_run_record(done)
    recipe = load_recipe(done / "recipe.yaml")
    again = pipeline.run(recipe, output_dir=tmp_path, reproduce=record)
    outcome = reproduce.compare(record, pipeline.RunFolder(again))
    assert outcome.equal, outcome.lines


def test_other_target_images_are_refused_on_resuming(between, night, tmp_path):
    other = tmp_path / "night"
    shutil.copytree(night, other)
    recipe = between(f"data.target={other}", **NOW)
    run = pipeline.run(recipe, output_dir=tmp_path, stages=("teacher",), evaluate=False)
    shutil.copy(other / "red" / "n00.png", other / "red" / "n77.png")
    with pytest.raises(UsageError, match=r"(?s)same images.*red/n77\.png"):
        pipeline.run(recipe, output_dir=tmp_path, resume=True)
    (other / "red" / "n77.png").unlink()
    with pytest.raises(UsageError, match=r"domain\.confidence: was 0\.5, now 0\.6"):
        pipeline.run(between(f"data.target={other}", "domain.confidence=0.6", **NOW), output_dir=tmp_path, resume=True)
    assert (run / "teacher" / "model.json").exists()


def test_stored_answers_give_the_same_weights_and_can_be_verified(done, between, tmp_path):
    live = pipeline.run(between("domain.adapt_batch_norm=true", **NOW), output_dir=tmp_path)
    every = results(done)["stages"]["distilled"]["teaching"]
    assert every["computed"] + every["read"] > 0
    stores = sorted(path for path in (done.parent / "stores").iterdir() if path.is_dir())
    assert stores
    kept = load_model(live / "distilled").module.state_dict()
    for name, value in load_model(done / "distilled").module.state_dict().items():
        # Stored in half precision, and shown in the same views only where all epochs are drawn.
        assert torch.allclose(value.float(), kept[name].float(), atol=0.05), name
    found = [verify_cache(path) for path in stores]
    assert sum(each.records for each in found) > 0
    assert all(each.same_class == 1 for each in found)
    assert max(each.largest for each in found) < 0.05


# evaluating later


def test_evaluate_knows_both_domains_of_a_run(done, between, photographs, night):
    found = results(done)["stages"]["distilled"]
    for folder, key in ((night, "test"), (photographs, "source_test")):
        figures = evaluate(done, str(folder))
        assert figures["data"].endswith("test split of the run")
        assert figures["top1"] == pytest.approx(found[key]["top1"])
        assert figures["count"] == found[key]["count"]


# refusals


def test_a_threshold_that_leaves_nothing_ends_the_run_before_the_student(between, tmp_path):
    with pytest.raises(UsageError, match=r"leaves none of 33 target images.*\n.*at 0\.5") as caught:
        pipeline.run(between("domain.confidence=1", **NOW), output_dir=tmp_path)
    assert "adapt_batch_norm=true" in str(caught.value)
    assert not (tmp_path / "tiny" / "distilled" / "model.json").exists()
    pipeline.run(between("domain.confidence=1", **NOW), output_dir=tmp_path, name="b", stages=("baseline",))


def test_what_cannot_work_is_refused_before_training(between, tmp_path):
    for sets, message in (
        (("method={name: crd}",), r"crd.*leave data\.target out"),
        (("method={name: dkd}",), r"dkd needs the label of every image.*leave data\.target out"),
        (("data.augment={mixup: 0.5}",), "mixes labels, which target images do not have"),
        (("method={name: supervised}",), "learns from no teacher"),
        (
            ("teacher.model=timm/vit_tiny_patch16_224", "data.size=16", "domain.adapt_batch_norm=true"),
            r"teacher timm/vit_tiny_patch16_224 has no BatchNorm",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            pipeline.run(between(*sets, **NOW), output_dir=tmp_path)
        assert not (tmp_path / "tiny").exists()


def test_images_from_python_without_a_target_are_refused(between, tmp_path):
    recipe = load_recipe("domain", data_needed=False)
    data = replace(load_data(between().data), target=None)
    with pytest.raises(UsageError, match=r"needs data\.target, which is not given"):
        pipeline.run(recipe, output_dir=tmp_path, data=data)


def test_classes_that_differ_are_refused_before_training(between, night, tmp_path):
    shutil.copytree(night, tmp_path / "night")
    (tmp_path / "night" / "red").rename(tmp_path / "night" / "reds")
    with pytest.raises(DataError, match=r"no 'red'; did you mean 'reds'"):
        pipeline.run(between(f"data.target={tmp_path / 'night'}"), output_dir=tmp_path)


def test_a_store_of_several_teachers_cannot_be_verified(between, tmp_path):
    recipe = between(
        "teacher=[{model: cifar/resnet8, training: {epochs: 1}}, {model: cifar/resnet8, training: {epochs: 1}}]",
        "domain.confidence=0", f"teacher_cache.folder={tmp_path / 'stores'}",
    )  # fmt: skip
    run = pipeline.run(recipe, output_dir=tmp_path)
    assert results(run)["together"]["teachers"]["of"] == ["teacher", "teacher-2"]
    with pytest.raises(ArtifactError, match=r"data\.target and several teachers"):
        verify_cache(next(path for path in (tmp_path / "stores").iterdir() if path.is_dir()))


def test_a_subset_of_the_candidates_is_what_the_distilled_store_is_of(between):
    """Whoever changes the threshold gets other sample ids, and so another store."""
    recipe = between("domain.confidence=0.35")
    own = domains(recipe)
    seen = own.stage_data(PlannedStage("distilled", ("teacher",), distils=True), {"teacher": classifier(recipe)})
    assert isinstance(seen.train.images, Subset)
    assert seen.fingerprint != own.data.fingerprint != own.data.target.fingerprint
