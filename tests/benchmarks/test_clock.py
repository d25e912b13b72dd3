"""Turns, ratios and the share of others, by hand."""

import multiprocessing
import os
import time

import pytest
from benchmarks.speed import clock
from benchmarks.speed.clock import Result, Watch, cpu_seconds, mark_of, table, take_turns


def test_each_has_its_turn_in_each_round_and_the_first_changes():
    order = []
    turns = {name: lambda name=name: order.append(name) for name in "abc"}
    result = take_turns(turns, 4, warm_up=2)
    assert "".join(order) == "abcabc" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(found) for name, found in result.seconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_warm_up_is_not_timed(monkeypatch):
    now = iter([1.0, 1.5, 10.0, 12.0])
    turns = []
    watch = type("Still", (), {"others": lambda self: 0.0})
    monkeypatch.setattr(clock, "Watch", watch)
    monkeypatch.setattr(clock, "clock_of", lambda wall: lambda: next(now))
    assert take_turns({"one": lambda: turns.append(1)}, 2, warm_up=1).seconds == {"one": [0.5, 2.0]}
    assert len(turns) == 3


def test_ratios_are_taken_round_by_round():
    result = Result({"ours": [1.0, 20.0, 3.0], "theirs": [2.0, 10.0, 3.0]})
    assert result.ratio("ours", "theirs") == (1.0, 0.5, 2.0)  # the ratio of medians would be 3 / 3, of means 8 / 5
    assert result.ratio("theirs", "ours") == (1.0, 0.5, 2.0)
    assert result.median("ours") == 3.0


@pytest.mark.parametrize(("busy", "share"), [(0.0, 0.0), (0.1, 0.05), (0.5, 0.25), (2.0, 1.0)])
def test_the_share_of_others_is_what_all_used_but_this_process(monkeypatch, busy, share):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(clock.time, "perf_counter", iter([0.0, 10.0]).__next__)
    monkeypatch.setattr(clock, "cpu_seconds", iter([5.0, 12.0]).__next__)
    monkeypatch.setattr(clock, "_machine", iter([100.0, 107.0 + 10 * busy]).__next__)
    assert Watch().others() == pytest.approx(share)


def test_results_are_marked_above_five_percent():
    assert mark_of(0.0) == mark_of(0.05) == Result(others=0.04).mark == ""
    assert mark_of(0.06) == Result(others=0.06).mark == "  (noisy: others took 6% of the CPU)"


def _spin(seconds, go_on):
    while cpu_seconds() < seconds:
        pass
    go_on.wait()


def test_children_that_still_run_are_not_others():
    context = multiprocessing.get_context("fork")
    go_on = context.Event()
    before, own = cpu_seconds(), time.process_time()

    def spent():
        return cpu_seconds() - before - (time.process_time() - own)

    child = context.Process(target=_spin, args=(0.3, go_on))
    child.start()
    try:
        for _ in range(1000):
            if spent() > 0.15:
                break
            child.join(0.01)
        assert child.is_alive()
        assert spent() > 0.15
    finally:
        go_on.set()
        child.join()
    assert spent() > 0.15  # its time is kept once it is over


def test_tables_are_aligned():
    assert table(("a", "number"), [("longer", "1"), ("b", "20")]) == "a       number\nlonger       1\nb           20"
