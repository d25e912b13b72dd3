"""The cost of a large distillation: numbers that fit on a sheet of paper, and a simulation that agrees with them."""

import pytest
from benchmarks.scale import Plan, main, make_files, measure_start, on_paper, simulated, simulated_epoch

# 1,000 images in 5 steps of 2 processes with 100 images each: 0.1 s to train on a batch, 0.2 s more with the teacher.
SMALL = Plan(
    images=1000, classes=10, epochs=10, students=2, views=4, record=20, image_bytes=1e4, side=8,
    teacher_rate=500, student_rate=1000, parameters=1e6, batch=100, machines=1, processes=2,
    jitter=0, failures=1e12,
)  # fmt: skip


def test_on_paper():
    cost = on_paper(SMALL)
    assert SMALL.steps == 5
    assert cost.live * 3600 == pytest.approx(10 * 0.5 + 10 * 1.5)  # the baseline, and the student with its teacher
    assert cost.stored * 3600 == pytest.approx(2 * 10 * 0.5 + 4 * 1.0)  # the teacher answers in four epochs
    assert cost.store == 1000 * 4 * 20
    assert cost.pixels == 1000 * 8 * 8 * 3
    assert cost.reading == 0
    assert cost.sending == 5 * 2 * 0.5 * 4e6  # of two processes each sends half of a gradient twice


def test_reading_is_the_limit_where_a_disk_is_slow():
    slow = Plan(**{**vars(SMALL), "side": 0, "disk": 1e6})
    cost = on_paper(slow)
    assert cost.reading == 1000 * 1e4
    assert cost.stored * 3600 == pytest.approx(2 * 10 * 5 * 2.0)  # 2 MB for the two processes of a step


def test_machines_pay_for_their_network():
    two = Plan(**{**vars(SMALL), "machines": 2, "network": 1e8})
    assert two.steps == 3
    step = 0.1 + 2 * 3 / 4 * 4e6 / 1e8
    assert on_paper(two).stored * 3600 == pytest.approx(2 * 10 * 3 * step + 4 * 3 * 0.2)


def test_the_simulation_without_chance_is_the_paper():
    assert simulated(SMALL)[0] == pytest.approx(on_paper(SMALL).live)
    assert simulated(SMALL)[1] == pytest.approx(on_paper(SMALL).stored)
    slow = Plan(**{**vars(SMALL), "side": 0, "disk": 1e6})
    assert simulated_epoch(slow, asked=False) == pytest.approx(
        5 * 2.0 + 0.1
    )  # the last batch is trained on after it is read


def test_waiting_for_the_slowest_costs_more_with_more_processes():
    def share(processes):
        plan = Plan(images=1e6, jitter=0.1, failures=1e12, processes=processes)
        return simulated_epoch(plan, asked=False) / (plan.steps * plan.batch / plan.student_rate)

    # The mean of the larger of two normal values lies 0.564 deviations above the mean; of the largest of eight 1.42.
    assert share(1) == pytest.approx(1, abs=0.01)
    assert share(2) == pytest.approx(1 + 0.1 * 0.564, abs=0.01)
    assert share(8) == pytest.approx(1 + 0.1 * 1.424, abs=0.015)


def test_failures_cost_what_is_done_twice():
    often = Plan(**{**vars(SMALL), "failures": 1.0, "checkpoint": 60, "restart": 330})
    assert simulated_epoch(often, asked=False) == pytest.approx(0.5 * (1 + 360 / 3600))


def test_the_table(capsys):
    main(["--images", "1000", "--machines", "2"])
    assert "| yours |" in capsys.readouterr().out


def test_measured_files_are_all_different_and_enough_for_each_class(tmp_path, monkeypatch):
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    make_files(tmp_path / "images", 25, 3, 16)
    contents = [path.read_bytes() for path in sorted((tmp_path / "images").rglob("*.jpg"))]
    assert len(contents) == len(set(contents)) == 30  # ten of each class
    found = measure_start(tmp_path / "images", 16)
    assert set(found) == {"check", "batch", "memory"}
    assert found["memory"] > 2**20
