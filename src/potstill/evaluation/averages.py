"""Micro, macro and weighted figures from counts per class."""

from typing import Any

import numpy as np

Figures = dict[str, float | None]
Array = np.ndarray[Any, Any]


def precision_recall_f1(hits: Array, predicted: Array, support: Array) -> tuple[Array, Array, Array]:
    """Precision, recall and F1 of each class; a quotient of zero by zero counts as 0, as in scikit-learn.

    Args:
        hits: [K] images of the class that were called so.
        predicted: [K] images that were called so.
        support: [K] images of the class.
    """
    return _ratio(hits, predicted), _ratio(hits, support), _ratio(2 * hits, predicted + support)


def classification_figures(hits: Array, predicted: Array, support: Array) -> Figures:
    """``precision_``, ``recall_`` and ``f1_`` + ``micro``, ``macro`` and ``weighted``.

    Macro is the mean over the classes that have images here: equal to scikit-learn with ``labels=np.unique(y_true),
    zero_division=0``.  Weighted goes by the number of images; micro pools all K classes.
    """
    names = ("precision", "recall", "f1")
    per_class = precision_recall_f1(hits, predicted, support)
    pooled = precision_recall_f1(hits.sum(keepdims=True), predicted.sum(keepdims=True), support.sum(keepdims=True))
    figures: Figures = {}
    for name, values, micro in zip(names, per_class, pooled, strict=True):
        figures[f"{name}_micro"] = float(micro[0])
        figures[f"{name}_macro"] = float(values[support > 0].mean())
        figures[f"{name}_weighted"] = float(np.average(values, weights=support))
    return figures


def auc_figures(per_class: Array, micro: float, support: Array) -> Figures:
    """``auc_`` + ``micro``, ``macro`` and ``weighted``, one class against the rest.

    Args:
        per_class: [K] areas; NaN where a class has no image, or no image is of another class: those are skipped.
        micro: area over the scores of all classes pooled.
        support: [K] images of the class, the weights.
    """
    defined = ~np.isnan(per_class)
    if not defined.any():
        macro = weighted = None
    else:
        macro = float(per_class[defined].mean())
        weighted = float(np.average(per_class[defined], weights=support[defined]))
    return {"auc_micro": None if np.isnan(micro) else float(micro), "auc_macro": macro, "auc_weighted": weighted}


def _ratio(part: Array, whole: Array) -> Array:
    ratio: Array = np.divide(part, whole, out=np.zeros(len(whole)), where=whole > 0)
    return ratio
