"""Reference values of the authors' code: ``POTSTILL_GOLDEN`` names the folder."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(os.environ.get("POTSTILL_GOLDEN", Path(__file__).parents[3] / "shared" / "golden"))


def golden_cases(*methods: str) -> list:
    """One pytest parameter a case, or one that skips with the reason."""
    if not (GOLDEN / "index.json").exists():
        return [pytest.param(None, None, marks=pytest.mark.skip(reason=f"no reference values in {GOLDEN.name}/"))]
    index = json.loads((GOLDEN / "index.json").read_text())
    return [
        pytest.param(entry["method"], case, id=f"{entry['method']}-{case['name']}")
        for entry in index["methods"]
        for case in entry["cases"]
        if entry["method"] in methods
    ]


def golden_arrays(method: str, case: dict) -> dict[str, dict[str, np.ndarray]]:
    """The case's arrays by kind (in, param, out, grad, gradparam, paper) and name."""
    arrays: dict[str, dict[str, np.ndarray]] = {}
    with np.load(GOLDEN / f"{method}.npz", allow_pickle=False) as file:
        for key in file.files:
            name, kind, rest = key.split("/", 2)
            if name == case["name"]:
                arrays.setdefault(kind, {})[rest] = file[key]
    return arrays
