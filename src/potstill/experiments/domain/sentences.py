"""What the verdict says of a run between two domains: how the networks fare at home, and what was learned from."""

from collections.abc import Mapping
from typing import Any

from potstill.experiments.verdict.several_seeds import figure


def domains(comparison: Mapping[str, Any]) -> str:
    """What adapting alone brings, top-1 on the source's test, and what was learned from and picked by; "" without a
    target.

    Args:
        comparison: of results.json.
    """
    found = comparison.get("domain")
    if not found:
        return ""
    said = [f"{name} {100 * share:.1f} %" for name, share in (found.get("source_top1") or {}).items()]
    parts = [f"On the source's test: {', '.join(said)}."] if said else []
    alone = figure(found, "adapted_baseline_top1")
    if alone is not None:
        given = "Given the target's BatchNorm statistics and nothing else"
        parts.insert(0, f"{given}, the baseline has {100 * alone:.1f} %.")
    return " ".join([*parts, _learned_from(found)])


def _learned_from(found: Mapping[str, Any]) -> str:
    share, count, every = (figure(found, key) or 0.0 for key in ("target_labels", "images", "of"))
    teacher = "the teacher, given the target's BatchNorm statistics," if found.get("adapted") else "the teacher"
    sure = f"{teacher} was at least {100 * (figure(found, 'confidence') or 0.0):g} % sure"
    images = f"{count:,.0f} of {every:,.0f} target images"
    if share:
        return (
            f"The baseline learned from the source's labels and {100 * share:g} % of the target's; the distilled "
            f"student from {images}: those with the same labels, and those of whose class {sure}. Both were picked by "
            "the target's labelled val images, the teacher by the source's val."
        )
    return (
        f"The baseline learned from the source's labels alone; the distilled student from {images}, of whose class "
        f"{sure}, and from no label. All were picked by the source's val: no label of the target took part."
    )
