"""The verdict on distillation, as sentences.  Without torch and scipy, so that reports can import it.

"Helped" and "hurt" need three seeds or five folds or more, and an interval over these and test images together that
excludes 0. With one seed the verdict states what was measured on that seed. Sentences are "" if their numbers are
missing.
"""

from collections.abc import Mapping
from typing import Any, Literal

from potstill.config import sort_stages, stage_role
from potstill.formatting import format_duration, format_names, format_number, format_percent, format_points

MIN_SEEDS, MIN_FOLDS = 3, 5  # for "helped" and "hurt"


def repeats_of(comparison: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return ``folds`` of a comparison, else its ``seeds``; None if there is only one seed."""
    found = (comparison or {}).get("folds") or (comparison or {}).get("seeds")
    if not isinstance(found, Mapping):
        return None
    top1 = (found.get("figures") or {}).get("top1")
    return found if isinstance(top1, Mapping) and (finite_figure(top1, "n") or 0) > 1 else None


def folds_of(comparison: Mapping[str, Any] | None) -> int:
    """Return the number of folds of a comparison; 0 if it is no cross-validation."""
    found = (comparison or {}).get("folds")
    return int(finite_figure(found, "folds") or 0) if isinstance(found, Mapping) else 0


def seeds_count(comparison: Mapping[str, Any] | None) -> int:
    """Return the number of seeds of baseline and distilled, in each fold if there are folds.

    Example:
        >>> seeds_count({"folds": {"folds": 5, "seeds": 3, "figures": {"top1": {"n": 5}}}}), seeds_count(None)
        (3, 1)
    """
    found = repeats_of(comparison) or {}
    number = found.get("seeds") if folds_of(comparison) else (found.get("figures") or {}).get("top1", {}).get("n")
    return int(format_number(number) or 1)


def first_seed_note(comparison: Mapping[str, Any] | None) -> str:
    """Return which models figures that are no means are of; "" with one seed.

    Example:
        >>> first_seed_note({"seeds": {"figures": {"top1": {"n": 3}}}})
        'Baseline and distilled in this table: the first of 3 seeds.'
    """
    count = seeds_count(comparison)
    return f"Baseline and distilled in this table: the first of {count} seeds." if count > 1 else ""


def _repeats_text(comparison: Mapping[str, Any] | None) -> str:
    """Return ``5 seeds``, ``5 folds``, or ``5 folds of 3 seeds``."""
    found = repeats_of(comparison) or {}
    count = f"{finite_figure((found.get('figures') or {}).get('top1'), 'n') or 0:.0f}"
    if not folds_of(comparison):
        return f"{count} seeds"
    seeds = seeds_count(comparison)
    return f"{count} folds" + (f" of {seeds} seeds" if seeds > 1 else "")


def interval_scope(comparison: Mapping[str, Any] | None) -> str:
    """Return what the interval of the gain is over: ``seeds and test images``, ``folds and images``."""
    if not folds_of(comparison):
        return "test images only" if repeats_of(comparison) is None else "seeds and test images"
    return "folds, seeds and images" if seeds_count(comparison) > 1 else "folds and images"


def average_over_seeds(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """Return the comparison with gain, interval, gap and ``seeds_count`` over all seeds or folds, if several."""
    seeds, found = repeats_of(comparison), dict(comparison)
    if seeds is None:
        return found
    top1, whole = seeds["figures"]["top1"], seeds.get("top1_gain") or {}
    found |= {"top1_gain": whole.get("value"), "seeds_count": top1.get("n")}
    found |= {f"top1_gain_{end}": whole.get(end) for end in ("low", "high")}
    found |= {key: whole.get(key) for key in ("p", "confidence", "looks", "seed_share")}
    keys = ("gap", "gap_low", "gap_high", "gap_closed", "gap_closed_low", "gap_closed_high")
    return found | {key: seeds.get(key) for key in keys}


def seeds_lines(comparison: Mapping[str, Any] | None) -> list[str]:
    """Return a line for each seed, or each fold, if there are several.

    Example:
        >>> pair = {"seed": 0, "top1_gain": 0.01, "fixed": 5, "broken": 2, "mcnemar_p": 0.45}
        >>> comparison = {"seeds": {"each": [pair, pair | {"seed": 1}], "figures": {"top1": {"n": 2}}}}
        >>> print(*seeds_lines(comparison), sep=chr(10))
        seed 0: +1.0 points of top-1, distilled against baseline (5 images newly right, 2 newly wrong)
        seed 1: +1.0 points of top-1, distilled against baseline (5 images newly right, 2 newly wrong)
    """
    lines = []
    for each in (repeats_of(comparison) or {}).get("each") or []:
        gain = finite_figure(each, "top1_gain")
        if gain is None:
            continue
        text = f"{format_points(gain)} points of top-1, distilled against baseline"
        if "fold" in each:
            lines.append(f"fold {each['fold']}: {text} ({finite_figure(each, 'images') or 0:,.0f} test images)")
        else:
            changed = f"({each.get('fixed')} images newly right, {each.get('broken')} newly wrong)"
            lines.append(f"seed {each.get('seed')}: {text} {changed}")
    return lines


def finite_figure(values: Mapping[str, Any] | None, key: str) -> float | None:
    """Return a value of a mapping if it is a finite number, else None."""
    return format_number((values or {}).get(key))


Effect = Literal["helped", "hurt", "unclear", "one_seed", "unknown"]
MAX_CLASSES_NAMED = 5


def warning_sentences(stages: Mapping[str, Any], comparison: Mapping[str, Any]) -> list[str]:
    """Return sentences on what invalidates the results: chance, missing classes, a weak teacher, an unchanged probe."""
    tests = {name: (stages.get(name) or {}).get("test") or {} for name in sort_stages(stages)}
    judged = {name: test for name, test in tests.items() if stage_role(name) in ("teacher", "baseline", "distilled")}
    at_chance, seeds = [name for name, test in judged.items() if test.get("at_chance")], seeds_count(comparison)
    first = f" (first of {seeds} seeds)" if seeds > 1 else ""
    labels = {name: name if stage_role(name) == "teacher" else f"{_stage_label(name)}{first}" for name in judged}
    sentences = [
        f"The {labels[name]} is not clearly better than chance on test: top-1 "
        f"{format_percent(judged[name].get('top1'))}, where always "
        f"predicting the most frequent class gives {format_percent(judged[name].get('largest_class'))}; "
        + (
            "the distilled student had nothing to learn from it."
            if stage_role(name) == "teacher"
            else "it has not learned."
        )
        for name in at_chance
    ]
    for name, test in judged.items():
        missing = [] if name in at_chance else list(test.get("never_predicted") or [])
        if missing:
            listed = format_names(list(map(str, missing)), MAX_CLASSES_NAMED)
            classes = "one class" if len(missing) == 1 else f"{len(missing)} classes"
            sentences.append(f"The {labels[name]} never predicts {classes} of the test split: {listed}.")
    for each in comparison.get("teacher_below_baseline") or []:
        if each.get("teacher") not in at_chance:
            teacher, baseline = each.get("teacher_val_top1"), each.get("baseline_val_top1")
            top1 = f"{format_percent(teacher)} against {format_percent(baseline)}"
            advice = (
                "it seems to have the classes in another order; the warnings of the run show the setting to write"
                if each.get("other_class_order")
                else "train it longer or give a better one"
            )
            sentences.append(f"The {each.get('teacher')} is below the baseline on val (top-1 {top1}): {advice}.")
    sentences += [f"{str(each).rstrip('.')}." for each in comparison.get("views_differ") or []]
    if ((stages.get("distilled") or {}).get("head") or {}).get("taken") == "probe":
        where = "In fold 1, the" if folds_of(comparison) else "The"
        sentences.append(
            f"{where} {labels['distilled']} is the probe that it started from, since no epoch was better on val: the "
            "teacher changed nothing in it; train it longer."
        )
    return sentences


def _stage_label(stage: str) -> str:
    return "distilled student" if stage == "distilled" else stage


def format_confidence(confidence: float) -> str:
    """Return a confidence level in percent: ``95 %``, ``99.75 %``."""
    return f"{100 * confidence:.4g} %"


def accuracy_sentence(stages: Mapping[str, Any], comparison: Mapping[str, Any]) -> str:
    """Return top-1 of each stage on test, and of several teachers together."""
    top1 = ((repeats_of(comparison) or {}).get("figures") or {}).get("top1") or {}
    means = {"baseline": finite_figure(top1, "mean_a"), "distilled": finite_figure(top1, "mean_b")}
    if folds_of(comparison):  # of all images: folds differ in size, so their mean is another number
        means |= {name: finite_figure((repeats_of(comparison) or {}).get("top1"), name) for name in means}
    sentences = []
    for name in sort_stages(stages):
        share = means.get(name)
        if share is None:
            share = finite_figure((stages.get(name) or {}).get("test"), "top1")
        if share is not None:
            sentences.append(f"{name} {100 * share:.1f} %")
    together = finite_figure(comparison, "teachers_top1")
    if sentences and together is not None and (finite_figure(comparison, "teachers") or 0) > 1:
        sentences.append(f"the teachers together {100 * together:.1f} %")
    mean = " (baseline and distilled: mean over the seeds)" if seeds_count(comparison) > 1 else ""
    split = "the target's test" if comparison.get("domain") else "test"
    if folds_of(comparison):
        split = "all images, each in the fold that tests it"
    return f"Top-1 on {split}: {', '.join(sentences)}{mean}." if len(sentences) > 1 else ""


def gap_sentence(comparison: Mapping[str, Any], found: Effect) -> str:
    """Return the teacher's lead over the baseline, and the share of it that the distilled student has closed."""
    gap, closed = finite_figure(comparison, "gap"), finite_figure(comparison, "gap_closed")
    if gap is None:
        return ""
    several = (finite_figure(comparison, "teachers") or 1) > 1
    if gap <= 0:
        how = "no better than" if gap == 0 else f"{format_points(-gap, signed=False)} points worse than"
        who = "The teachers together are" if several else "The teacher is"
        return f"{who} {how} the baseline, so there was no gap to close: a better teacher comes first."
    who = "The teachers together lead" if several else "The teacher leads"
    lead = f"{who} the baseline by {format_points(gap, signed=False)} points"
    low, high = finite_figure(comparison, "gap_low"), finite_figure(comparison, "gap_high")
    if low is not None and high is not None and finite_figure(comparison, "gap_closed_low") is None:
        interval = f"95 % interval {format_points(low)} to {format_points(high)}"
        return f"{lead}, which may be sampling noise in the test set ({interval})."
    if found == "one_seed":
        if closed is None or closed <= 0:
            return f"{lead}."
        return f"{lead}; on this seed the distilled student closed {_closed(closed)} of this gap{_range(comparison)}."
    if found == "unclear":
        what = (
            "this test split" if finite_figure(comparison, "seeds_count") is None else "these seeds and this test split"
        )
        what = "these folds" if folds_of(comparison) else what
        return f"{lead}; {what} cannot tell how much of that gap distillation closed."
    if found == "hurt":
        return f"{lead}; distillation did not close this gap but widened it."
    if closed is None or closed <= 0:
        return f"{lead}."
    return f"{lead}; the distilled student closed {_closed(closed)} of this gap{_range(comparison)}."


def _closed(closed: float) -> str:
    return "all" if closed >= 1 else f"{100 * closed:.0f} %"


def _range(comparison: Mapping[str, Any]) -> str:
    low, high = finite_figure(comparison, "gap_closed_low"), finite_figure(comparison, "gap_closed_high")
    return "" if low is None or high is None else f" (95 % interval {100 * low:.0f} to {100 * high:.0f} %)"


MAX_LATENCY_NOISE = 1.5  # of two measurements of the same network, in turn; on an idle machine below 1.1


def cost_sentence(comparison: Mapping[str, Any]) -> str:
    """Return how many times smaller and faster the student is than the teacher."""
    small, fast = finite_figure(comparison, "parameter_ratio"), finite_figure(comparison, "latency_ratio")
    size, speed = _format_ratio(small, "smaller", "larger"), _format_ratio(fast, "faster", "slower")
    noise = finite_figure(comparison, "latency_noise") or 1.0
    noisy = (
        f" Latencies were measured on a busy machine: baseline and distilled student, the same network, differ by a "
        f"factor of {noise:.1f}; export measures again."
        if speed and noise > MAX_LATENCY_NOISE
        else ""
    )
    speed = "" if noisy else speed
    ratios = [text for text in (size and f"{size} in parameters", speed and f"{speed} for one image") if text]
    several = (finite_figure(comparison, "teachers") or 1) > 1
    return (
        f"Against the teacher{'s together' if several else ''}, the student is {' and '.join(ratios)}.{noisy}"
        if ratios
        else noisy.strip()
    )


def time_sentence(stages: Mapping[str, Any], *, folds: bool = False) -> str:
    """Return the training time beyond the baseline's, with that of teachers that were trained in this run."""
    taken = {name: finite_figure((stages[name] or {}).get("training"), "seconds") for name in sort_stages(stages)}
    baseline, distilled = taken.get("baseline"), taken.get("distilled")
    if baseline is None or distilled is None:
        return ""
    others = {name: seconds for name, seconds in taken.items() if name not in ("baseline", "distilled")}
    parts = [
        f"{name} {'not trained' if seconds is None else format_duration(seconds)}" for name, seconds in others.items()
    ]
    parts += [f"distilled {format_duration(distilled)}", f"baseline {format_duration(baseline)}"]
    more = sum(seconds or 0.0 for seconds in others.values()) + distilled - baseline
    cost = f"{format_duration(more)} more training than the baseline alone" if more > 0 else "no more training time"
    where = "In fold 1 it" if folds else "It"
    return f"{where} cost {cost} ({', '.join(parts)})."


def limits_sentence(comparison: Mapping[str, Any]) -> str:
    """Return what the interval does not cover."""
    seeds, folds = repeats_of(comparison), folds_of(comparison)
    if seeds is None and (fold := comparison.get("fold")):
        return (
            "" if fold == "all" else f"This is {fold}; the report of the folder above has the verdict over all folds."
        )
    if seeds is None:
        return (
            "One seed cannot separate the effect of distillation from that of the seed: the interval covers the choice "
            "of test images only (--resume --seeds 5 continues from here)."
        )
    sentences = []
    looks = finite_figure(seeds.get("top1_gain"), "looks") or 1
    if looks > 1:
        sentences.append(
            f"This is evaluation {looks:.0f} on the test split, so the interval is wider than 95 %: seeds or epochs "
            "that are added after an evaluation raise the chance of a false result."
        )
    if not folds and finite_figure(comparison.get("looks"), "augmentation_seeds") == 1:
        sentences.append("All seeds saw the same augmented views: the variation of views is not covered either.")
    if folds:
        sentences.append(
            "The training sets of the folds overlap, so their part of the interval is widened (Nadeau and Bengio)."
        )
    elif finite_figure(comparison, "teachers"):
        sentences.append("All seeds learn from the same teacher: another teacher is not covered by the interval.")
    return " ".join(sentences)


def _format_ratio(ratio: float | None, more: str, less: str) -> str:
    if ratio is None or ratio <= 0:
        return ""
    if 0.95 < ratio < 1.05:
        return f"neither {more} nor {less}"
    word, factor = (more, ratio) if ratio > 1 else (less, 1 / ratio)
    return f"{factor:.1f} times {word}" if factor < 100 else f"{factor:,.0f} times {word}"


def format_test_images(comparison: Mapping[str, Any]) -> str:
    """Return ``270 test images``, with "of the target" if there is one."""
    count, suffix = finite_figure(comparison, "test_images"), " of the target" if comparison.get("domain") else ""
    if count is None:
        return f"the test images{suffix}"
    return f"1 test image{suffix}" if count == 1 else f"{count:,.0f} test images{suffix}"


def unlabeled_sentence(comparison: Mapping[str, Any]) -> str:
    """Return what the two students did not have in common: images without labels; "" if there were none."""
    count = finite_figure(comparison, "unlabeled_images")
    if not count:
        return ""
    return (
        f"Of the two, only the distilled student learned from the {count:,.0f} images without labels; the baseline has "
        "no use for them."
    )


def domain_sentence(comparison: Mapping[str, Any]) -> str:
    """Return what domain adaptation gave (AdaBN alone, top-1 on the source, images); "" without a target."""
    found = comparison.get("domain")
    if not found:
        return ""
    top1 = [f"{name} {100 * share:.1f} %" for name, share in (found.get("source_top1") or {}).items()]
    parts = [f"On the source's test: {', '.join(top1)}."] if top1 else []
    alone = finite_figure(found, "adapted_baseline_top1")
    if alone is not None:
        parts.insert(0, f"With the target's BatchNorm statistics only, the baseline has {100 * alone:.1f} %.")
    return " ".join([*parts, _training_images_sentence(found)])


def _training_images_sentence(found: Mapping[str, Any]) -> str:
    share, count, every = (finite_figure(found, key) or 0.0 for key in ("target_labels", "images", "of"))
    teacher = "the teacher, with the target's BatchNorm statistics," if found.get("adapted") else "the teacher"
    sure = f"{teacher} was at least {100 * (finite_figure(found, 'confidence') or 0.0):g} % sure"
    images = f"{count:,.0f} of {every:,.0f} target images"
    if share:
        return (
            f"The baseline learned from the source's labels and {100 * share:g} % of the target's; the distilled "
            f"student from {images}: those with the same labels, and those of whose class {sure}. The best epoch of "
            "both was selected on the target's labelled val images, that of the teacher on the source's val."
        )
    return (
        f"The baseline learned from the source's labels alone; the distilled student from {images}, of whose class "
        f"{sure}, and from no label. All best epochs were selected on the source's val: no label of the target was "
        "used."
    )


def verdict(comparison: Mapping[str, Any] | None, stages: Mapping[str, Any] | None = None) -> str:
    """Return the verdict of a run as text, from ``comparison`` and ``stages`` of results.json.

    Example:
        >>> found = {"top1_gain": 0.018, "top1_gain_low": 0.004, "top1_gain_high": 0.032, "test_images": 270}
        >>> print(headline(found))  # doctest: +NORMALIZE_WHITESPACE
        On this seed, the distilled student's top-1 is 1.8 points above the baseline's on 270 test images (95 %
        interval over test images +0.4 to +3.2); repeat with --seeds 5 to know whether distillation helps.
    """
    return " ".join(verdict_sentences(comparison, stages))


def verdict_sentences(comparison: Mapping[str, Any] | None, stages: Mapping[str, Any] | None = None) -> list[str]:
    """Return the sentences of ``verdict``: warnings first, then the headline."""
    found = effect_of(comparison)
    sentences = [*warning_sentences(stages or {}, comparison or {}), headline(comparison)]
    if comparison is None or found == "unknown":
        return sentences
    whole = average_over_seeds(comparison)
    sentences += [
        unlabeled_sentence(comparison),
        accuracy_sentence(stages or {}, comparison),
        domain_sentence(comparison),
        gap_sentence(whole, found),
        cost_sentence(comparison),
        time_sentence(stages or {}, folds=folds_of(comparison) > 0),
    ]
    sentences.append(limits_sentence(comparison))
    return [sentence for sentence in sentences if sentence]


def effect_of(comparison: Mapping[str, Any] | None) -> Effect:
    """Return the effect of distillation.

    ``helped`` or ``hurt`` need ``MIN_SEEDS`` seeds or ``MIN_FOLDS`` folds, an interval of the top-1 gain over these and
    images on one side of 0, and a significant test; ``one_seed``: any result of one seed.
    """
    if comparison is None:
        return "unknown"
    whole = average_over_seeds(comparison)
    gain, low, high = (finite_figure(whole, key) for key in ("top1_gain", "top1_gain_low", "top1_gain_high"))
    if gain is None or low is None or high is None:
        return "unknown"
    if repeats_of(comparison) is None:
        return "one_seed"
    p, confidence = finite_figure(whole, "p"), finite_figure(whole, "confidence")
    if p is None or confidence is None:
        return "unknown"
    least = MIN_FOLDS if folds_of(comparison) else MIN_SEEDS
    if (finite_figure(whole, "seeds_count") or 0) < least or p >= 1 - confidence:
        return "unclear"
    if low > 0:
        return "helped"
    return "hurt" if high < 0 else "unclear"


def headline(comparison: Mapping[str, Any] | None, *, more_seeds: str | None = None) -> str:
    """Return the effect of distillation in one sentence; ``more_seeds``: options that train further seeds."""
    found = effect_of(comparison)
    if comparison is None or found == "unknown":
        return "Whether distillation helped is unknown: it takes test results of baseline and distilled student."
    whole = average_over_seeds(comparison)
    gain, low, high = (float(whole[key]) for key in ("top1_gain", "top1_gain_low", "top1_gain_high"))
    size, images = format_points(abs(gain), signed=False), format_test_images(whole)
    ends = f"{format_points(low)} to {format_points(high)}"
    if found == "one_seed":
        if finite_figure(comparison, "fixed") == 0 and finite_figure(comparison, "broken") == 0:
            what = f"of {images}, the distilled student and the baseline are correct on the same ones"
        elif gain == 0:
            what = f"distilled student and baseline have the same top-1 on {images} "
            what += f"(95 % interval over test images {ends})"
        else:
            side = "above" if gain > 0 else "below"
            what = f"the distilled student's top-1 is {size} points {side} the baseline's on {images} "
            what += f"(95 % interval over test images {ends})"
        if comparison.get("fold") == "all":
            return (
                "No verdict: this model is for use, trained on all images but one of each class. What it can do is "
                "what the folds of the cross-validation have shown."
            )
        if fold := comparison.get("fold"):
            return f"In {fold}, {what}."
        return f"On this seed, {what}; repeat with {more_seeds or '--seeds 5'} to know whether distillation helps."
    folds = folds_of(comparison)
    where = f"on {images.replace(' test', '')}, each tested in one fold" if folds else f"on {images}"
    average = f"on average over {_repeats_text(comparison)}, {where}"
    interval = f"{format_confidence(whole['confidence'])} interval over {interval_scope(comparison)} together {ends}"
    if found == "helped":
        return f"Distillation helped: the student gained {size} points of top-1 {average} ({interval})."
    if found == "hurt":
        return f"Distillation hurt: the student lost {size} points of top-1 {average} ({interval})."
    changed = f"the student's top-1 changed by {format_points(gain)} points {average} ({interval}"
    if folds and folds < MIN_FOLDS:
        return (
            f"Too few folds for a verdict: with distillation {changed}); an interval needs {MIN_FOLDS} folds to be "
            f"reliable (--folds {MIN_FOLDS})."
        )
    if not folds and whole["seeds_count"] < MIN_SEEDS:
        more = f"repeat with {more_seeds}" if more_seeds else "continue with --resume --seeds 5"
        return f"Two seeds are too few for a verdict: with distillation {changed}); {more}."
    if low <= 0 <= high:
        return f"No clear difference: with distillation {changed}, which includes 0)."
    return (
        f"No clear difference: with distillation {changed}), but so few images changed that an exact test over the "
        f"images gives p = {finite_figure(whole, 'p') or 0:.2f}."
    )
