"""The metrics of a split in the order and the words in which people read them."""

from collections.abc import Callable
from typing import Any

from potstill.amounts import decimal, percent

Format = Callable[[Any], str]


def metric_rows(best_k: int = 3) -> list[tuple[str, str, Format]]:
    """(key in metrics.json, name, how to print it)."""
    averages = ("micro", "macro", "weighted")
    groups = (("precision", "Precision", percent), ("recall", "Recall", percent), ("f1", "F1", percent))
    return [
        ("loss", "Loss", decimal),
        ("top1", "Top-1", percent),
        ("top3", f"Top-{best_k}", percent),
        *((f"{key}_{average}", f"{name}, {average}", form) for key, name, form in groups for average in averages),
        *((f"auc_{average}", f"AUC, {average}", decimal) for average in averages),
        ("ece", "ECE", percent),
        ("nll", "NLL", decimal),
        ("agreement", "Agreement with teacher", percent),
        ("kl_to_teacher", "KL to teacher", decimal),
    ]
