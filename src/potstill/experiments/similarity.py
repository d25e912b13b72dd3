"""``cka`` of results.json: how alike teacher and students see the images of val, stage by stage."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potstill.data.splits import DataSplits
from potstill.errors import PotstillError
from potstill.evaluation.cka import FEWEST, stage_similarity
from potstill.experiments.loaders import split_loader
from potstill.experiments.recipe import Recipe
from potstill.models.classifier import Classifier
from potstill.training.devices import Compute

IMAGES = 512  # of val at most
_BATCH = 64
_SPLIT = "val"


def describe_similarity(
    models: dict[str, Classifier], recipe: Recipe, data: DataSplits, compute: Compute
) -> dict[str, Any] | None:
    """Linear CKA between the stages of the first teacher and those of baseline and distilled, on images of val.

    Returns:
        ``split``, ``images``, ``layers`` (by stage of the run: paths), ``values`` (by student: a row for each stage of
        the teacher, a column for each of its own) and ``left_out``; ``failed`` alone where it cannot be had; None where
        there is no teacher or no student.
    """
    names = [name for name in ("teacher", "baseline", "distilled") if name in models]
    if names[:1] != ["teacher"] or len(names) < 2:
        return None
    if len(data.val) < FEWEST:
        return {"split": _SPLIT, "failed": f"val has fewer than {FEWEST} images"}
    try:
        found = stage_similarity(
            {name: models[name].module for name in names},
            _batches({name: models[name] for name in names}, recipe, data, compute),
        )
    except (PotstillError, RuntimeError) as error:  # RuntimeError: of torch, no memory among them
        return {"split": _SPLIT, "failed": str(error).splitlines()[0] if str(error) else type(error).__name__}
    return {
        "split": _SPLIT,
        "images": found.images,
        "layers": {name: list(paths) for name, paths in found.layers.items()},
        "values": {name: [[_rounded(value) for value in row] for row in rows] for name, rows in found.values.items()},
        "left_out": {name: list(paths) for name, paths in found.left_out.items()},
    }


def _batches(
    models: dict[str, Classifier], recipe: Recipe, data: DataSplits, compute: Compute
) -> Iterator[dict[str, Tensor]]:
    """Images spread evenly over val, and so over its classes where it is sorted by them; so is each batch."""
    count = min(IMAGES, len(data.val))
    chosen = np.linspace(0, len(data.val) - 1, count).round().astype(np.int64)
    loaders = {
        name: split_loader(data, _SPLIT, model.input, recipe, recipe.stage_training(name), compute, shared=False)
        for name, model in models.items()
    }
    batches = max(1, min(-(-count // _BATCH), count // FEWEST))
    for start in range(batches):
        ids = torch.from_numpy(chosen[start::batches])
        yield {name: loader.view(ids, 0) for name, loader in loaders.items()}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
