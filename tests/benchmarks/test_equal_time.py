"""Each contestant trains the same student for the time that it is given, and what took longer is no result."""

import json

import pytest
import torch
from benchmarks.speed.scene import make_images

from benchmarks import equal_time
from potstill.models.factory import create_model

SETTINGS = ["data.size=32", "student.model=cifar/resnet8", "teacher.model=cifar/resnet8", "training.batch_size=8"]


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The arguments of a comparison on 16 training images, from a teacher in a file."""
    monkeypatch.setenv("POTSTILL_CACHE", "")  # which it changes for its process
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    for split, count in (("train", 16), ("val", 8), ("test", 8)):
        make_images(tmp_path / "images" / split, count, 2, 40)
    torch.save(create_model("cifar/resnet8", 2, size=32).state_dict(), tmp_path / "teacher.pth")
    sets = [part for text in (*SETTINGS, "training.min_steps=0") for part in ("--set", text)]
    files = ["--data", tmp_path / "images", "--teacher", tmp_path / "teacher.pth", "--output-dir", tmp_path / "out"]
    numbers = ["--epochs", "1", "--minutes", "0.5", "--rates", "0.1", "0.01", "--seeds", "2"]
    return [*map(str, files), *sets, *numbers]


def test_a_peer_trains_for_its_time_and_reads_the_same_files(command, capsys):
    short = [*command, "--minutes", "0.01", "--one", "timm", "0.1", "0"]
    equal_time.main(short)
    result = json.loads(capsys.readouterr().out)
    assert 0.6 <= result["seconds"] < 6
    assert result["epochs"] > 0
    assert {result["val"], result["test"]} <= {number / 8 for number in range(9)}


def test_potstills_own_time_has_all_that_its_process_did(command, capsys):
    before = equal_time.CLOCK()
    equal_time.main([*command, "--one", "potstill", "0.1", "0"])
    result = json.loads(capsys.readouterr().out)
    assert before < result["seconds"] <= equal_time.CLOCK()
    assert result["epochs"] == 1


def test_the_rate_is_chosen_on_val_and_test_is_of_that_rate(command, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    sets = [*SETTINGS, "training.min_steps=0"]
    for name, rate, seed, val, test in (
        ("timm", 0.1, 0, 0.5, 0.9),
        ("timm", 0.01, 0, 0.6, 0.4),
        ("timm", 0.01, 1, 0.6, 0.6),
        ("potstill", 0.1, 0, 0.7, 0.7),
        ("potstill", 0.01, 0, 0.6, 0.9),
        ("potstill", 0.1, 1, 0.7, 0.75),
    ):
        settings = {"data": command[1], "teacher": command[3], "recipe": "cifar10", "set": str(sets), "minutes": "0.5"}
        settings |= {"own epochs": "1"} if name == "potstill" else {}
        result = {"val": val, "test": test, "epochs": 3, "seconds": 30.0, "settings": settings}
        (out / f"{name}-{rate:g}-{seed}.json").write_text(json.dumps(result))
    contestants = ["--contestants", "timm", "potstill"]
    equal_time.main([*command, *contestants])
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "| timm | 0.01 | 3 | 0.5 | 60.0 ± 0.0 | 50.0 ± 14.1 |",
        "| potstill | 0.1 | 3 | 0.5 | 70.0 ± 0.0 | 72.5 ± 3.5 |",
    ]
    with pytest.raises(SystemExit, match="other settings"):  # results of ten minutes are none of thirty
        equal_time.main([*command, *contestants, "--minutes", "30"])
    (out / "potstill-0.1-1.json").write_text(json.dumps(result | {"seconds": 40.0}))
    with pytest.raises(SystemExit, match="give fewer --epochs"):
        equal_time.main([*command, *contestants])
