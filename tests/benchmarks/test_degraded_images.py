"""The documented degradation, pixel by pixel."""

import runpy
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "degraded_images.py"


@pytest.fixture(scope="module")
def degraded():
    return runpy.run_path(str(SCRIPT))["degraded"]


def test_a_flat_image_loses_contrast_and_gets_lighter(degraded):
    flat = np.full((40, 40), 100, np.uint8)
    found = degraded(flat, seed=3).astype(float)
    assert found.mean() == pytest.approx(110, abs=1.5)  # half of 100, and 60; blurring changes nothing here
    assert found.std() == pytest.approx(15, rel=0.1)
    half = degraded(flat, seed=3, strength=0.5).astype(float)
    assert half.mean() == pytest.approx(105, abs=1)  # three quarters of 100, and 30
    assert half.std() == pytest.approx(7.5, rel=0.1)
    assert (degraded(flat, seed=3) == degraded(flat, seed=3)).all()
    assert (degraded(flat, seed=4) != degraded(flat, seed=3)).any()
    assert (degraded(flat, seed=3, strength=0.0) == flat).all()


def test_an_edge_is_blurred(degraded):
    edge = np.zeros((40, 40), np.uint8)
    edge[:, 20:] = 200
    rows = degraded(edge, seed=0).astype(float).mean(axis=0)  # noise of 15 over 40 rows: 2.4
    assert rows[:15] == pytest.approx(60, abs=10)
    assert rows[25:] == pytest.approx(160, abs=10)
    assert 75 < rows[19] < 110 < rows[20] < 145
