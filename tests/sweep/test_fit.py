"""potstill fit: the budget by a fake clock, the choice of students from a table, and one search on digits."""

import random
import shlex
from functools import partial
from pathlib import Path

import pytest
import typer

import potstill
from potstill.cli import main
from potstill.config.recipe import load_recipe
from potstill.config.yaml import dump_yaml
from potstill.errors import NonFiniteError, UsageError
from potstill.io import read_checksummed_json
from potstill.models.model_table import Limits, ModelRow
from potstill.report.sweep import render_sweep
from potstill.sweep import fit, halving
from potstill.sweep.fit import find_families, find_in_either_precision, parse_duration
from potstill.sweep.halving import MAX_STRETCH, Costs, HalvingSearch, Student, Trained

SETTINGS = {"recipe": "name: x", "data": "0" * 64, "space": [], "grid": True}


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class FakeTrainings:
    """Trainings that take time of a fake clock only, other than estimated, and whose results are known."""

    measure = "top1"
    classes = 10

    def __init__(self, clock, *, error=1.0, teacher=20.0, accuracy=None, epoch=None, files=None, noise=0.0):
        self.clock, self.error, self.teacher, self.noise = clock, error, teacher, noise
        self.accuracy = accuracy or {}
        self.real = epoch or {"a": 2.0, "b": 1.0, "c": 0.5}
        self.files, self.done, self.cached = files or {}, [], 0
        self.draw, self.again = random.Random(0), {}

    def spend(self, seconds):
        self.clock.now += seconds * (1 + self.noise * self.draw.uniform(-1, 1))

    def measure_student(self, student):
        self.spend(3.0)
        return self.files[student.name]

    def estimate(self, students):
        return self.teacher / self.error, 0.3 / self.error, {s.name: self.real[s.name] / self.error for s in students}

    def base_epochs(self, student):
        return 8

    def learning_rate(self, student):
        return 0.1

    def views(self):
        return 8

    def student_settings(self, student):
        return {}

    def train_teacher(self):
        if ("teacher",) not in self.done:
            self.done.append(("teacher",))
            self.spend(self.teacher)

    def train(self, role, student, settings, epochs, name):
        views = max(0, min(epochs, 8) - self.cached) if role == "distilled" else 0
        self.cached += views
        inside = epochs * self.real[student.name] + 0.3 * views
        self.spend(inside + 1.5)
        self.done.append((role, student.name, dict(settings), epochs))
        value = self.accuracy.get((student.name, settings.get("method.temperature")), 0.5)
        if value is None:
            raise NonFiniteError("the loss became NaN")
        if role == "baseline":
            value = {None: 0.4, "0.05": 0.6}.get(settings.get("student.training.lr"), 0.3)
        return Trained(value, epochs, inside)

    def train_again(self, trainings, epochs, seeds, *, evaluate):
        more = seeds - self.again.get("seeds", 0)
        for student, _ in trainings.values():
            self.spend(more * (epochs * self.real[student.name] + 1.5))
            if evaluate:
                self.spend(seeds * 0.4 * self.real[student.name])
        self.again = {"seeds": seeds, "epochs": epochs, "trainings": trainings, "evaluate": evaluate}

    def export(self):
        self.spend(5.0)
        return {"role": "distilled", "file": "model.onnx", "ms": 1.0, "bytes": 10, "val": {}}


def search(tmp_path, clock, trainings, *, within, limits=None, seeds=3, name="fit"):
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    return HalvingSearch(
        trainings, folder, SETTINGS, limits=limits or Limits(), within=within, seeds=seeds, clock=clock
    )


FAMILIES = [[(Student(name), None)] for name in ("a", "b", "c")]


@pytest.mark.parametrize("within", [120, 200, 400, 1800])
@pytest.mark.parametrize("error", [0.5, 1.0, 1.8])
@pytest.mark.parametrize("noise", [0.0, 0.15])
def test_the_budget_is_kept(tmp_path, within, error, noise):
    clock = Clock()
    trainings = FakeTrainings(clock, error=error, noise=noise, accuracy={("b", "1.0"): 0.9})
    work = search(tmp_path, clock, trainings, within=float(within))
    found, problem = {}, ""
    try:
        found = work.work(FAMILIES)
    except UsageError as raised:
        problem = str(raised)
    if problem:  # found out after the teacher at the latest
        assert "too short" in problem
        assert clock.now - 100 <= 1.2 * 20
        return
    assert clock.now - 100 <= 1.05 * within
    assert found["seconds"] == pytest.approx(clock.now - 100, abs=0.1)
    assert trainings.again["evaluate"]


def test_time_is_used_and_more_of_it_trains_longer(tmp_path):
    epochs, times = [], []
    for within in (300, 600, 1200):
        clock = Clock()
        trainings = FakeTrainings(clock, accuracy={("a", "1.0"): 0.9})
        found = search(tmp_path, clock, trainings, within=float(within), name=str(within)).work(FAMILIES)
        epochs.append(found["final_epochs"])
        times.append(clock.now - 100)
    assert epochs == sorted(epochs)
    assert epochs[0] < epochs[-1] <= MAX_STRETCH * 8
    assert all(time > 0.75 * within for time, within in zip(times, (300, 600), strict=False))


def test_little_time_still_compares_candidates(tmp_path):
    """Better two networks in a short race than the first of the list, unseen."""
    clock = Clock()
    trainings = FakeTrainings(clock, accuracy={("b", None): 0.9})
    found = search(tmp_path, clock, trainings, within=80.0).work(FAMILIES)
    assert (found["plan"]["candidates"], found["winner"]["student.model"]) == (2, "b")
    assert (found["final_epochs"], found["fresh_seeds"]) == (11, 1)  # not 3 seeds of 2 epochs
    assert clock.now - 100 <= 80


def test_without_a_budget_all_candidates_are_raced_with_the_recipe_s_epochs(tmp_path):
    clock = Clock()
    trainings = FakeTrainings(clock, accuracy={("b", None): 0.9, ("b", "1.0"): 0.85, ("c", "1.0"): 0.8})
    found = search(tmp_path, clock, trainings, within=None).work(FAMILIES)
    distilled = [entry for entry in trainings.done if entry[0] == "distilled"]
    assert [sum(entry[3] == epochs for entry in distilled) for epochs in (2, 4, 8)] == [12, 6, 3]
    assert found["winner"] == {"student.model": "b", "method.name": "dist", "method.ce_weight": "1.0"}
    # b had four trials, then two that are kept by their value, then two: the baseline has as many, over its lr
    of_b = [sum(entry[1] == "b" and entry[3] == epochs for entry in distilled) for epochs in (2, 4, 8)]
    baseline = [entry for entry in trainings.done if entry[0] == "baseline"]
    assert [sum(entry[3] == epochs for entry in baseline) for epochs in (2, 4, 8)] == [n for n in of_b if n > 1]
    assert {entry[1] for entry in baseline} == {"b"}
    assert found["baseline"]["chosen"]["student.training.lr"] == "0.05"
    assert found["baseline"]["trials"] == len(baseline)
    assert trainings.again["seeds"] == found["fresh_seeds"] == 3
    assert trainings.again["trainings"]["baseline"][1] == {"student.training.lr": "0.05"}
    assert trainings.done.count(("teacher",)) == 1


def test_students_from_scratch_are_first_taught_by_dist_and_pretrained_ones_by_kd(tmp_path):
    clock = Clock()
    trainings = FakeTrainings(clock)
    families = [[(Student("a", "pretrained"), None)], [(Student("b"), None)]]
    search(tmp_path, clock, trainings, within=None).work(families)
    first_rung = [(entry[1], entry[2]["method.name"]) for entry in trainings.done if entry[0] == "distilled"][:8]
    assert first_rung[:2] == [("a", "kd"), ("b", "dist")]
    assert len(set(first_rung)) == 4


def test_two_classes_are_not_taught_by_dist(tmp_path):
    clock = Clock()
    trainings = FakeTrainings(clock)
    trainings.classes = 2
    search(tmp_path, clock, trainings, within=None).work(FAMILIES)
    assert {entry[2].get("method.name") for entry in trainings.done if entry[0] == "distilled"} == {"kd"}


def test_less_time_than_planned_ends_the_race(tmp_path):
    clock = Clock()
    trainings = FakeTrainings(clock, accuracy={("b", "1.0"): 0.9})
    train, slow, notes = trainings.train, iter([1.0] * 4), []

    def suddenly_slow(*arguments):
        trained = train(*arguments)
        clock.now += 0.0 if next(slow, None) else 60.0
        return trained

    trainings.train = suddenly_slow
    work = search(tmp_path, clock, trainings, within=400.0)
    work.observer.note = work.observer.warn = notes.append
    found = work.work(FAMILIES)
    assert clock.now - 100 <= 400
    assert "no time left for another rung" in notes
    assert len(found["rungs"]) == 1
    assert found["winner"]["student.model"] == "b"


def test_a_candidate_that_fails_loses(tmp_path):
    clock = Clock()
    trainings = FakeTrainings(
        clock, accuracy={("a", "1.0"): None, ("a", "2.0"): None, ("a", None): None, ("c", "1.0"): 0.7}
    )
    found = search(tmp_path, clock, trainings, within=None).work(FAMILIES)
    assert found["winner"]["student.model"] == "c"
    failed = [row for row in found["trials"] if row["state"] == "fail"]
    assert {row["chosen"]["student.model"] for row in failed} == {"a"}
    assert all("NaN" in row["error"] for row in failed)
    trainings = FakeTrainings(clock, accuracy={(name, t): None for name in "abc" for t in ("1.0", "2.0", None)})
    with pytest.raises(UsageError, match=r"no candidate could be trained:\nthe loss became NaN"):
        search(tmp_path, clock, trainings, within=None, name="other").work(FAMILIES)


def test_an_interrupted_search_goes_on_and_its_time_counts(tmp_path):
    clock = Clock()
    trainings = FakeTrainings(clock, accuracy={("b", "1.0"): 0.9})
    whole = search(tmp_path, clock, trainings, within=400.0, name="whole").work(FAMILIES)
    trained = list(trainings.done)

    clock = Clock()
    trainings = FakeTrainings(clock, accuracy={("b", "1.0"): 0.9})
    train, left = trainings.train, iter([True] * 5)

    def stop_after_five(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return train(*arguments)

    trainings.train = stop_after_five
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, clock, trainings, within=400.0).work(FAMILIES)
    trainings.train = train
    clock.now += 1000.0  # between the two
    found = search(tmp_path, clock, trainings, within=400.0).work(FAMILIES)
    assert trainings.done == trained
    assert found["winner"] == whole["winner"]
    assert found["seconds"] == pytest.approx(whole["seconds"], abs=0.1)
    changed = SETTINGS | {"recipe": "name: x\n--under: 1ms"}
    other = HalvingSearch(trainings, tmp_path / "fit", changed, limits=Limits(), within=None)
    with pytest.raises(UsageError, match=r"--under: was None, now '1ms'"):
        other.work(FAMILIES)


def test_students_that_miss_a_limit_are_dropped_by_name(tmp_path):
    clock, notes = Clock(), []
    files = {"a": (9.0, 500), "b": (4.0, 3000), "c": (2.0, 400)}
    trainings = FakeTrainings(clock, files=files, accuracy={("c", "1.0"): 0.9})
    work = search(tmp_path, clock, trainings, within=None, limits=Limits(5.0, 1000))
    work.observer.note = notes.append
    found = work.work(FAMILIES)
    assert [(row["name"], row["dropped"]) for row in found["students"]] == [("a", True), ("b", True), ("c", False)]
    assert [note.partition(":")[0] for note in notes if "dropped" in note] == ["a", "b"]
    assert {entry[1] for entry in trainings.done if entry[0] == "distilled"} == {"c"}
    trainings = FakeTrainings(clock, files=files)
    with pytest.raises(UsageError, match=r"no student is below 1ms,100B when exported.\nNearest: c, 2.00 ms"):
        search(tmp_path, clock, trainings, within=None, limits=Limits(1.0, 100), name="none").work(FAMILIES)
    assert trainings.done == []  # not even the teacher
    assert not (tmp_path / "none" / "fit.json").exists()  # the name can be used again


def test_the_largest_of_a_family_that_is_within_the_limits_is_taken(tmp_path):
    clock = Clock()
    trainings = FakeTrainings(clock, files={"a": (6.0, 10), "b": (3.0, 10), "c": (1.0, 10)})
    family = [(Student("a"), 60.0), (Student("b"), 8.0), (Student("c"), 2.0)]
    found = search(tmp_path, clock, trainings, within=None, limits=Limits(5.0)).work([family])
    assert [(row["name"], row["dropped"]) for row in found["students"]] == [("b", False)]  # a: not even measured


def test_too_short_a_budget_says_what_is_needed(tmp_path):
    clock = Clock()
    trainings = FakeTrainings(clock)
    with pytest.raises(UsageError, match=r"--within 30.0 s is too short for one candidate, a: .* the teacher 20.0 s"):
        search(tmp_path, clock, trainings, within=30.0).work(FAMILIES)
    assert trainings.done == []


def test_costs_by_hand():
    costs = Costs({"a": 2.0, "b": 1.0}, view=10.0, views=4)
    assert costs.training("a", 3) == 5.0 + 3 * 2.0 + 3 * 10.0
    assert costs.training("a", 3, distilled=False) == 5.0 + 3 * 2.0
    costs.record("a", 2, seconds=75.0, inside=72.0, distilled=True)  # predicted: 2 * 2 + 2 * 10 = 24, so three times
    assert costs.epoch("a") == 6.0
    assert costs.epoch("b") == 3.0
    assert costs.training("b", 4) == pytest.approx(3.0 + 4 * 3.0 + 2 * 30.0)  # two of four views are cached
    assert costs.training("b", 8) == pytest.approx(3.0 + 8 * 3.0 + 2 * 30.0)


@pytest.fixture
def tiny(recipe, tmp_path, monkeypatch):
    """A recipe of one epoch, and a race of one student with two settings."""
    pytest.importorskip("onnxruntime", reason='needs the extra "export"')
    monkeypatch.setattr(halving, "SETTINGS", halving.SETTINGS[:2])
    path = tmp_path / "tiny.yaml"
    settings = {"training.epochs": 1, "teacher.training.epochs": 1}
    path.write_text(dump_yaml(recipe(**settings).model_dump(mode="json")), encoding="utf-8")
    return path


def test_a_search_from_images_to_the_exported_file(tiny, photographs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("potstill.evaluation.cost.measure_reference", lambda: 20.0)
    command = ["fit", str(photographs), "--recipe", str(tiny), "--students", "cifar/resnet8", "--under", "60s,1MB"]
    command += ["--seeds", "2", "--name", "mine"]
    seen = []
    export = fit.RecipeTrainings.export

    def remember(self):
        seen.extend(folder.rglob("results.json"))
        return export(self)

    folder = Path("runs/mine")
    monkeypatch.setattr(fit.RecipeTrainings, "export", remember)
    assert main(command) == 0
    said = capsys.readouterr().out
    found = read_checksummed_json(folder / "fit.json")
    assert found["students"][0]["bytes"] < 1_000_000
    assert found["exported"]["file"] == "runs/mine/export/model.onnx"
    assert Path(found["exported"]["file"]).stat().st_size == found["exported"]["bytes"]
    assert found["fresh_seeds"] == 2
    assert {path.parent.name for path in seen} == {"distilled", "baseline"}  # test was read once, after the search
    assert not list((folder / "trials").rglob("*test*"))
    rows = found["trials"]
    assert [row["role"] for row in rows] == ["distilled", "distilled", "baseline", "baseline"]
    best = max(rows[:2], key=lambda row: row["value"])
    assert found["winner"] == best["chosen"]
    # one teacher, whose answers to the first trial's views serve all further trainings
    assert len(list(folder.rglob("teacher/metrics.jsonl"))) == 1
    facts = [read_checksummed_json(path)["facts"] for path in sorted(folder.rglob("distilled*/model.json"))]
    assert len({each["views"]["sha256"] for each in facts}) == 1
    assert {each["seed"] for each in facts} == {0, 1, 2}
    assert [each["training"]["planned_epochs"] for each in facts] == [1] * 4
    repeat = next(line for line in said.splitlines() if "potstill run" in line and "--reproduce" not in line)

    def load_only(source, settings, flags, **_):
        loaded.append(load_recipe(source, settings or (), flags=flags))
        raise typer.Exit

    loaded = []
    monkeypatch.setattr("potstill.cli.run._run_pipeline", load_only)
    assert main(shlex.split(repeat)[1:]) == 0
    assert loaded[0].student.model == "cifar/resnet8"
    assert loaded[0].stage_training("student").epochs == 1
    assert loaded[0].method["name"] == found["winner"]["method.name"]
    assert main(command) == 2
    assert "--resume" in capsys.readouterr().err
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("model.json")}
    assert potstill.fit(
        photographs, recipe=tiny, students=["cifar/resnet8"], under="60s,1MB", seeds=2, name="mine", resume=True
    ) == Path("runs/mine")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("model.json")} == before
    page, lines = render_sweep(folder)
    assert "from scratch" in page.read_text(encoding="utf-8")
    assert any(line.startswith("winner: student.model=cifar/resnet8") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--under", "1kB"], 2, "Nearest: cifar/"),
        (["--under", "5lightyears"], 2, "unknown unit"),
        (["--within", "5lightyears"], 2, "unknown unit"),
        (["--students", "resnet81"], 2, "did you mean"),
        (["--teacher", "resnet81"], 2, "did you mean"),
        (["--name", "../x"], 2, "--name must be"),
        (["--resume"], 2, "nothing to resume"),
    ],
)
def test_a_mistake_costs_one_message(arguments, code, says, tiny, photographs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", str(photographs), "--recipe", str(tiny), *arguments]) == code
    output = capsys.readouterr()
    assert says in output.err
    assert "Traceback" not in output.err
    assert not list(tmp_path.rglob("model.json"))


def test_no_images(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    assert main(["fit", "empty", "--recipe", str(tiny)]) == 3
    assert "Traceback" not in capsys.readouterr().err


TABLE = [
    ModelRow("cifar/resnet8", 32, 70_000, 65, 9, 12_000_000, 0.02),
    ModelRow("cifar/resnet20", 32, 270_000, 65, 21, 40_000_000, 0.06),
    ModelRow("cifar/vgg8", 32, 4_000_000, 513, 8, 100_000_000, 0.06),
    ModelRow("efficientnet-lite0", 224, 3_400_000, 1281, 50, 380_000_000, 0.5),
    ModelRow("efficientnet-lite2", 260, 4_800_000, 1281, 65, 860_000_000, 1.0),
    ModelRow("timm/mobilenetv3_small_050", 224, 580_000, 1025, 54, 23_000_000, 0.1),
    ModelRow("timm/mobilenetv3_small_100", 224, 1_500_000, 1025, 54, 55_000_000, 0.15),
    ModelRow("timm/resnet18", 224, 11_000_000, 513, 21, 1_800_000_000, 1.0),
    ModelRow("timm/huge", 224, 90_000_000, 1025, 54, 55_000_000_000, None),
]


def families(monkeypatch, size, limits, *, names=(), int8=False, at_hand=()):
    monkeypatch.setattr(fit, "read_table", lambda: TABLE)
    return find_families(
        size, 10, limits, int8=int8, reference=lambda: 20.0, names=names,
        pretrained=lambda name: "pretrained" if name in at_hand else None,
    )  # fmt: skip


def test_students_are_taken_from_the_table(monkeypatch):
    def names(*arguments, **options):
        return [[student.name for student, _ in family] for family in families(monkeypatch, *arguments, **options)]

    small = ["timm/mobilenetv3_small_100", "timm/mobilenetv3_small_050"]
    assert names(224, Limits()) == [["efficientnet-lite2", "efficientnet-lite0"], small, ["timm/resnet18"]]
    assert names(224, Limits(None, 7_000_000)) == [small]
    assert names(224, Limits(2.4, None)) == [small]  # 4.8 ms estimated for an exported file: lite0 misses
    assert names(32, Limits(None, 1_200_000)) == [["cifar/resnet20", "cifar/resnet8"]]
    assert names(32, Limits(None, 5_000_000), int8=True) == [["cifar/resnet20", "cifar/resnet8"], ["cifar/vgg8"]]
    assert names(224, Limits(None, 1_000_000)) == [["cifar/resnet8"]]  # of no family for this size, but it fits
    found = families(monkeypatch, 224, Limits(), at_hand=["timm/mobilenetv3_small_050", "efficientnet-lite0"])
    assert [family[0][0] for family in found] == [
        Student("efficientnet-lite0", "pretrained"),
        Student("timm/mobilenetv3_small_050", "pretrained"),
        Student("timm/resnet18"),
    ]
    ((pair,),) = families(monkeypatch, 112, Limits(5.0, None), names=["mobilenetv3_small_050"])
    assert pair == (Student("mobilenetv3_small_050"), pytest.approx(0.1 * 20.0 / 4))
    with pytest.raises(UsageError, match=r"Nearest: cifar/resnet8, 280 kB \(estimated\)$"):
        families(monkeypatch, 224, Limits(None, 50_000))


def test_int8_is_taken_where_no_file_in_float32_is_within_the_limits(monkeypatch):
    def found(limits, *, int8=False):
        families_of, is_int8 = find_in_either_precision(partial(families, monkeypatch, 224, limits), int8=int8)
        return [[student.name for student, _ in family] for family in families_of], is_int8

    small = ["timm/mobilenetv3_small_100", "timm/mobilenetv3_small_050"]
    assert found(Limits(None, 7_000_000)) == ([small], False)
    assert found(Limits(5.0, 2_000_000)) == ([small], True)  # 580,000 parameters: 2.3 MB in float32
    assert found(Limits(None, 7_000_000), int8=True)[1]
    with pytest.raises(UsageError, match="no network is below that"):
        found(Limits(None, 50_000))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("30", "no unit"),
        ("5parsec", "unknown unit 'parsec'"),
        ("soon", "write a number"),
        ("0s", "above 0"),
        ("9" * 400 + "h", "finite"),
    ],
)
def test_times_that_make_no_sense(text, says):
    with pytest.raises(UsageError, match=says):
        parse_duration(text)
