"""The board: which cells there are, how each is trained, and what the page says of them."""

import json
from pathlib import Path

import pytest
from benchmarks.board import Cell, Data, list_cells, page

from benchmarks import board
from potstill.config.recipe import load_recipe
from potstill.errors import UsageError

CONTESTANTS = ["labels", "kd", "at, auto"]
QUICKSTART = Data("quickstart")


def write(root, cell, top1):
    folder = root / cell.name / cell.stage
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"test": {"top1": top1, "ece": 0.05, "nll": 0.5}}))
    (root / cell.name / "results.json").write_text("{}")


@pytest.mark.parametrize("name", board.CONTESTANTS)
def test_the_settings_of_a_contestant_are_a_recipes(name):
    assert load_recipe("quickstart", board.CONTESTANTS[name]).name == "quickstart"


def test_cells_come_seed_by_seed_and_have_folders_of_their_own():
    cells = list_cells([QUICKSTART, Data("some/where.yaml")], [4, 12], list(board.CONTESTANTS), 3)
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    assert len({cell.name for cell in cells}) == len(cells) == 2 * 2 * 3 * len(board.CONTESTANTS)


def test_the_page_has_means_paired_gains_and_the_names_of_what_is_missing(tmp_path):
    cells = list_cells([QUICKSTART], [4], CONTESTANTS, 2)
    for cell, top1 in zip(cells, [0.80, 0.82, None, 0.84, 0.85, None], strict=True):
        if top1 is not None:
            write(tmp_path, cell, top1)
    text = "\n".join(page(cells, tmp_path, " --seeds 2"))
    # Gains 2 and 1 points: 1.5 with a standard deviation of 0.7071, and t(0.975, 1) = 12.706
    assert "| kd | 2 | 83.50 ± 2.12 | +1.50 (-4.85 to +7.85) | 5.0 ± 0.0 | 0.500 ± 0.000 |" in text
    assert "| labels | 2 | 82.00 ± 2.83 |  | 5.0" in text
    assert "Not trained: at, auto (seed 0, 1)." in text
    assert "potstill train quickstart --stage baseline --output-dir runs/board --epochs 4 --seed 0\n" in text
    distilled = "--stage distilled --output-dir runs/board --teacher runs/board/quickstart-teacher"
    assert f"potstill train quickstart {distilled} --epochs 4 --seed 0\n" in text
    assert "| kd | `--set 'method={name: kd, temperature: 1.0, alpha: 0.5, scaling: paper}'` |" in text
    assert "| contestant | quickstart, 4 |" in text
    assert "| kd | +1.5 |" in text
    assert "| at, auto |  |" in text


def test_the_summary_marks_differences_beyond_doubt(tmp_path):
    cells = list_cells([QUICKSTART], [4], ["labels", "kd"], 3)
    for cell, top1 in zip(cells, [0.80, 0.82, 0.84, 0.8601, 0.81, 0.83], strict=True):
        write(tmp_path, cell, top1)
    assert "| kd | **+2.0** |" in list(page(cells, tmp_path, ""))
    assert "| kd | +2.0 |" in list(page(cells[:4], tmp_path, ""))  # two seeds


@pytest.mark.parametrize("recipe", [name for name in board.DATA if name.endswith(".yaml")])
def test_the_boards_recipes_want_images(recipe):
    file = str(Path(board.__file__).parents[1] / recipe)
    with pytest.raises(UsageError, match=r"data\.source is missing"):
        load_recipe(file, [])
    assert load_recipe(file, ["data.source=digits"]).data.augmentation_seed == 0


def test_images_and_a_ready_teacher_are_passed_on(tmp_path, monkeypatch):
    cells, commands = list_cells([Data("clothing.yaml", "photos", "teacher.th")], [4], ["labels", "kd"], 1), []
    monkeypatch.setattr(board, "train", lambda command, folder: commands.append(list(command)) or True)
    board.train_missing(cells, tmp_path, until=float("inf"))
    labels, kd = commands  # no teacher is trained
    assert labels[:6] == ["train", "clothing.yaml", "--stage", "baseline", "--data", "photos"]
    assert "--teacher" not in labels
    assert kd[kd.index("--teacher") + 1] == "teacher.th"


def test_what_is_done_is_not_trained_again_and_what_was_cut_off_is_resumed(tmp_path, monkeypatch):
    cells, commands = list_cells([QUICKSTART], [4], CONTESTANTS, 1), []
    write(tmp_path, cells[0], 0.8)
    (tmp_path / cells[1].name).mkdir()

    def run(command, **_):
        commands.append([word for word in command[3:] if word not in ("--output-dir", str(tmp_path))])
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(board.subprocess, "run", run)
    board.train_missing(cells, tmp_path, until=float("inf"))
    teacher, kd, again, at = commands  # no teacher was there after the first command
    assert teacher[:4] == again[:4] == ["train", "quickstart", "--stage", "teacher"]
    assert kd[-1] == "--resume"
    assert at[-1] != "--resume"
    assert kd[:6] == ["train", "quickstart", "--stage", "distilled", "--teacher", str(tmp_path / "quickstart-teacher")]
    commands.clear()
    board.train_missing(cells, tmp_path, until=0.0)
    assert commands == []


def test_a_cells_stage_follows_from_its_method():
    assert [Cell(QUICKSTART, 4, name, 0).stage for name in CONTESTANTS] == ["baseline", "distilled", "distilled"]
