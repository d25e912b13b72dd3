"""Advice on the images."""

import re
import shlex

from potstill.amounts import count, number, percent, points
from potstill.data.doctor.findings import KINDS
from potstill.report.advice.rule import Advice, figure
from potstill.report.contents import Run

IMBALANCE = 5.0  # times as many images in the largest class as in the smallest
F1_BEHIND = 0.05  # below top-1: small classes are learned visibly worse


def leakage(run: Run) -> Advice | None:
    """`potstill check`, or the run itself, found training images in val or test."""
    found = _found(run, "across-splits")
    if not found:
        return None
    return Advice(
        "Images leak between the splits",
        f"{count(found)} images lie in more than one split, so every figure on test says too much.",
        f"Take them out of one split and run again; `{_check(run)}` names them.",
    )


def contradictory_labels(run: Run) -> Advice | None:
    """The same picture under two labels."""
    found = _found(run, "two-labels")
    if not found:
        return None
    return Advice(
        "Images under two labels",
        f"{count(found)} images stand under two labels; no model can be right on both.",
        f"Keep the right label of each; `{_check(run)}` names them.",
    )


def imbalance(run: Run) -> Advice | None:
    """Classes of very different sizes, and it shows: macro F1 lies well below top-1."""
    counts = (run.data.get("counts") or {}).get("train")
    sizes = [size for each in (counts or {}).values() if (size := number(each))] if isinstance(counts, dict) else []
    top1, f1 = (figure(run, "distilled", "test", key) for key in ("top1", "f1_macro"))
    if len(sizes) < 2 or top1 is None or f1 is None or _balanced(run):
        return None
    if max(sizes) < IMBALANCE * min(sizes) or top1 - f1 < F1_BEHIND:
        return None
    return Advice(
        "Small classes are learned worse",
        f"The largest class has {max(sizes) / min(sizes):.0f} times as many training images as the smallest, and macro "
        f"F1 ({percent(f1)}) lies {points(top1 - f1, signed=False)} points below top-1 ({percent(top1)}).",
        "Weigh the classes, or draw them equally often.",
        settings=("data.balance=weights",),
    )


def _balanced(run: Run) -> bool:
    """Whether the recipe balances already."""
    return re.search(r"^\s*balance:\s*[\"']?(weights|sampling)\b", run.recipe or "", re.MULTILINE) is not None


def _found(run: Run, kind: str) -> int:
    """How many of a kind the run warned of."""
    pattern = rf": ([\d,]+) x {re.escape(KINDS[kind].what)} \("
    found = (re.search(pattern, str(warning)) for warning in run.results.get("warnings") or [])
    return sum(int(match[1].replace(",", "")) for match in found if match)


def _check(run: Run) -> str:
    return shlex.join(["potstill", "check", str(run.data.get("source") or "DATA")])
