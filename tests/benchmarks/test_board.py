"""The board: which cells there are, how each is trained, and what the page says of them."""

import json

import pytest
from benchmarks.board import Cell, list_cells, page

from benchmarks import board
from potstill.config.recipe import load_recipe

CONTESTANTS = ["labels", "kd", "at, auto"]


def write(root, cell, top1):
    folder = root / cell.name / cell.stage
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"test": {"top1": top1, "ece": 0.05, "nll": 0.5}}))
    (root / cell.name / "results.json").write_text("{}")


@pytest.mark.parametrize("name", board.CONTESTANTS)
def test_the_settings_of_a_contestant_are_a_recipes(name):
    assert load_recipe("quickstart", board.CONTESTANTS[name]).name == "quickstart"


def test_cells_come_seed_by_seed_and_have_folders_of_their_own():
    cells = list_cells(["quickstart", "some/where.yaml"], [4, 12], list(board.CONTESTANTS), 3)
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    assert len({cell.name for cell in cells}) == len(cells) == 2 * 2 * 3 * len(board.CONTESTANTS)


def test_the_page_has_means_paired_gains_and_the_names_of_what_is_missing(tmp_path):
    cells = list_cells(["quickstart"], [4], CONTESTANTS, 2)
    for cell, top1 in zip(cells, [0.80, 0.82, None, 0.84, 0.85, None], strict=True):
        if top1 is not None:
            write(tmp_path, cell, top1)
    text = "\n".join(page(cells, tmp_path, " --seeds 2"))
    # Gains 2 and 1 points: 1.5 with a standard deviation of 0.7071, and t(0.975, 1) = 12.706
    assert "| kd | 2 | 83.50 ± 2.12 | +1.50 (-4.85 to +7.85) | 5.0 ± 0.0 | 0.500 ± 0.000 |" in text
    assert "| labels | 2 | 82.00 ± 2.83 |  | 5.0" in text
    assert "Not trained: at, auto (seed 0), at, auto (seed 1)." in text
    assert "potstill train quickstart --stage baseline --epochs 4 --seed 0 --output-dir runs/board --name" in text


def test_what_is_done_is_not_trained_again_and_what_was_cut_off_is_resumed(tmp_path, monkeypatch):
    cells, commands = list_cells(["quickstart"], [4], CONTESTANTS, 1), []
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
    assert [Cell("quickstart", 4, name, 0).stage for name in CONTESTANTS] == ["baseline", "distilled", "distilled"]
