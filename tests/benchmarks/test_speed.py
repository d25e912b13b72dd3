"""Every measure runs on tiny input, prints what it promises, and says when others used the machine."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.speed import clock, starting
from benchmarks.speed.__main__ import MEASURES

REPOSITORY = Path(__file__).parents[2]
CIFAR = "--student cifar/resnet8 --batch 5"
TIMM = "--student timm/test_resnet --batches 5"


def ratio(printed, line):
    """(median, least, most) of a line."""
    found = re.search(re.escape(line) + r":? +([\d.]+)  \(([\d.]+) to ([\d.]+)\)  goal", printed)
    assert found, printed
    middle, least, most = map(float, found.groups())
    assert 0 < least <= middle <= most < math.inf
    return middle


@pytest.fixture
def neighbour(request, monkeypatch):
    """The mark that is expected: others take 30 % of the CPU, or nothing."""
    share = getattr(request, "param", 0.3)
    monkeypatch.setattr(clock.Watch, "others", lambda self: share)
    return "(noisy: others took 30% of the CPU)" if share else ""


# One function makes the mark of all measures: that it may be left out is seen where nothing is measured.
alone_too = pytest.mark.parametrize("neighbour", [0.0, 0.3], indirect=True)


def check_marks(printed, mark, lines):
    assert printed.count("noisy") == (lines if mark else 0)
    assert mark in printed


def test_steps(measured, neighbour):
    printed = measured("steps", CIFAR)
    ratio(printed, "(a)  stored step / plain step")
    ratio(printed, "(a') stored epoch / plain epoch")
    share = re.search(r"\(j\)  metrics / epoch +([\d.]+)  goal <= 0.01", printed)
    assert 0 < float(share[1]) < 1
    # 4096 images held: 4 float32 logits and an int64 label each; sums of some hundred bytes.
    assert int(re.search(r"held by metrics +(\d+) KiB for 4 classes", printed)[1]) == 96
    check_marks(printed, neighbour, 2)


def test_pipeline(measured, neighbour):
    printed = measured("pipeline", CIFAR)
    ratio(printed, "packed / resident")
    ratio(printed, "JPEG / resident")
    check_marks(printed, neighbour, 1)


def test_live(measured, neighbour):
    printed = measured("live", CIFAR)
    ratio(printed, "live / torchvision")
    check_marks(printed, neighbour, 1)


def test_compute(measured, neighbour):
    printed = measured("compute", CIFAR + " --matrix 64")
    rows = {line.split("  ")[0]: line.split() for line in printed.splitlines()[2:]}
    shares = {name: float(words[-3 if words[-2] == ">=" else -1]) for name, words in rows.items()}
    assert set(shares) == {
        "training", "teacher", "matrix product of 64", "convolution 256 x 16 x 16", "convolution 512 x 8 x 8",
    }  # fmt: skip
    yardsticks = [share for name, share in shares.items() if " " in name]
    assert max(yardsticks) == 1.0
    assert all(0 <= share <= 1 for share in yardsticks)
    check_marks(printed, neighbour, 1)


def test_operations_are_those_of_the_layers_by_hand():
    import torch
    from benchmarks.speed.compute import _flops
    from torch import nn

    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    first, last = 2 * 2 * 16 * 9 * 3 * 8, 2 * 2 * 8 * 16 * 5  # two images of 4 x 4; a product and a sum are two
    images = torch.zeros(2, 3, 4, 4)
    assert _flops(network, images, backward=False) == first + last
    # Backward: gradients of weights and of inputs, but nobody asks for those of the images.
    assert _flops(network, images, backward=True) == 2 * first + 3 * last


def test_filling(measured, neighbour):
    printed = measured("filling", CIFAR + " --samples 5000")
    ratio(printed, "filling / resident")
    found = re.findall(r"^(\d+) classes, (\w+) +([\d.]+)(?: +<= (\d+))?", printed, re.MULTILINE)
    sizes = {(int(classes), kind): (float(size), goal) for classes, kind, size, goal in found}
    assert list(sizes) == [(4, "float16"), (64, "float16"), (100, "float16"), (100, "top16"), (1000, "top16")]
    assert [goal for _, goal in sizes.values()] == ["10", "130", "", "76", "76"]
    assert all(size <= float(goal) for size, goal in sizes.values() if goal)
    assert sizes[100, "float16"][0] == pytest.approx(204, abs=2)
    check_marks(printed, neighbour, 1)


def test_race(measured, neighbour):
    printed = measured("race", TIMM)
    names = ["naive tutorial loop", "timm task, float32", "timm task, bf16 + channels last"]
    names += [f"potstill, {kind}" for kind in ("live teacher", "cold store", "warm store", "labels alone")]
    for name in names:
        row = re.search(rf"^{re.escape(name)}  +(\d+)((?:  +[\d.]+)+)$", printed, re.MULTILINE)
        assert row, printed
        assert int(row[1]) > 0
        assert all(0 < float(word) < math.inf for word in row[2].split())
    for rival in ("naive", "timm's best"):
        for kind in ("warm", "cold"):
            ratio(printed, f"potstill, {kind} store / {rival}")
    assert re.search(r"decoding once, before: [\d.]+ ms/image; .* [\d.]+ x naive", printed)
    check_marks(printed, neighbour, 1)


def test_scaling(measured, neighbour, monkeypatch, tmp_path):
    from benchmarks.speed import scaling

    asked = []

    def elsewhere(chosen):
        asked.append(chosen)
        return list(scaling.point(tmp_path / str(len(asked)), *chosen))

    monkeypatch.setattr(scaling, "_elsewhere", elsewhere)
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    printed = measured("scaling", "--images 10 12 --classes 2 3 --views 1 2 --teachers 1 2", tiny="")
    assert asked[:2] == [[10, 2, 1, 1], [12, 2, 1, 1]]
    assert asked[2:] == [[10, 2, 1, 1], [10, 3, 1, 1], [10, 2, 1, 1], [10, 2, 2, 1], [10, 2, 1, 1], [10, 2, 1, 2]]
    rows = printed.splitlines()[2:]
    assert [row.split()[0] for row in rows] == [
        name for name in ("images", "classes", "views", "teachers") for _ in "ab"
    ]
    assert all(float(word) > 0 for row in rows for word in row.split()[2:])
    check_marks(printed, neighbour, 1)


def test_a_point_of_scaling_in_a_process_of_its_own():
    from benchmarks.speed.scaling import _elsewhere

    asking, reading, disk, memory = _elsewhere([10, 2, 1, 1])
    assert min(asking, reading, disk) > 0
    assert 50 < memory < 5000


@pytest.mark.slow
def test_the_first_step_is_that_of_a_student_whose_teacher_is_recorded(tmp_path, monkeypatch):
    from benchmarks.speed.scene import make_images

    make_images(tmp_path / "images", 16, 2, 32)
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    sets = [f"data.source={tmp_path / 'images'}", "teacher.model=cifar/resnet8", "training.batch_size=4"]
    first = starting.prepare("quickstart", sets, tmp_path)  # ends where the teacher was asked again
    assert (tmp_path / "again" / "distilled" / "metrics.jsonl").exists()
    seconds = starting.take_time({"first step": first}, 1)
    # Over before the first epoch was; the folder was made anew.
    assert (tmp_path / "again" / "distilled" / "metrics.jsonl").read_text() == ""
    assert list(seconds) == ["first step"]


@alone_too
def test_starting(measured, neighbour, monkeypatch):
    runs = []
    monkeypatch.setattr(starting, "prepare", lambda *_: ["first"])
    monkeypatch.setattr(starting, "_run", lambda command, expect=0: runs.append((command[-1], expect)))
    printed = measured("starting", "--rounds 2", tiny="")
    assert runs == 2 * [("pass", 0), ("import torch", 0), ("--help", 0), ("first", starting.FIRST_STEP)]
    assert re.search(r"\(e\) first step - import torch: -?[\d.]+ s  goal <= 1 s", printed)
    assert re.search(r"\(f\) --help: [\d.]+ s  goal <= 0.15 s", printed)
    check_marks(printed, neighbour, 1)


def test_what_start_and_help_cost_by_hand():
    seconds = {"bare Python": [0.1], "import torch": [3.0, 2.0], "--help": [0.3, 0.2, 0.1], "first step": [2.5, 4.0]}
    lines = starting.report(seconds).splitlines()
    assert lines[2] == "--help         0.100 s at least, 0.200 s in the middle"
    assert lines[4:] == ["(e) first step - import torch: 0.50 s  goal <= 1 s", "(f) --help: 0.100 s  goal <= 0.15 s"]


def test_what_there_is_to_measure_is_told_without_torch():
    script = "import sys; import benchmarks.speed.__main__ as m; sys.argv = ['speed']\ntry: m.main()\n"
    script += "except SystemExit as end: print(end)\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.splitlines()[-1] == "False"
    assert all(f"\n  {name}" in done.stdout for name in MEASURES)
