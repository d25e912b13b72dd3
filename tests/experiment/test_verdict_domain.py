from potstill.experiment.verdict import domain_sentence, verdict

FOUND = {
    "source": "day", "target": "night", "target_labels": 0.0, "confidence": 0.9, "class_balance": True,
    "adapted": False,
    "images": 1200, "of": 5000, "labelled": 0, "picked_by": "the source's val", "source_images": 300,
    "source_top1": {"teacher": 0.951, "baseline": 0.902, "distilled": 0.7},
}  # fmt: skip


def test_what_was_learned_from_without_labels_of_the_target():
    assert domain_sentence({"domain": FOUND}) == (
        "On the source's test: teacher 95.1 %, baseline 90.2 %, distilled 70.0 %. The baseline learned from the "
        "source's labels alone; the distilled student from 1,200 of 5,000 target images, of whose class the teacher "
        "was at least 90 % sure, and from no label. All best epochs were selected on the source's val: no label of the "
        "target was used."
    )
    assert domain_sentence({}) == ""


def test_adapted_teachers_and_what_adapting_alone_brings():
    text = domain_sentence({"domain": FOUND | {"adapted": True, "adapted_baseline_top1": 0.623}})
    assert text.startswith("With the target's BatchNorm statistics only, the baseline has 62.3 %.")
    assert "the teacher, with the target's BatchNorm statistics, was at least 90 % sure" in text


def test_with_a_share_of_labels():
    text = domain_sentence({"domain": FOUND | {"target_labels": 0.1, "labelled": 500}})
    assert "The baseline learned from the source's labels and 10 % of the target's;" in text
    assert "those with the same labels, and those of whose class the teacher was at least 90 % sure" in text
    assert "was selected on the target's labelled val images, that of the teacher on the source's val" in text
    assert "no label" not in text


def test_the_verdict_names_the_domain_of_each_figure():
    comparison = {
        "top1_gain": 0.05, "top1_gain_low": 0.03, "top1_gain_high": 0.07, "test_images": 800, "mcnemar_p": 0.001,
        "domain": FOUND,
    }  # fmt: skip
    stages = {name: {"test": {"top1": top1}} for name, top1 in (("baseline", 0.6), ("distilled", 0.65))}
    text = verdict(comparison, stages)
    assert text.startswith(
        "On this seed, the distilled student's top-1 is 5.0 points above the baseline's on 800 test images of the "
        "target"
    )
    assert "Top-1 on the target's test: baseline 60.0 %, distilled 65.0 %." in text
    plain = verdict({key: value for key, value in comparison.items() if key != "domain"}, stages)
    assert "target" not in plain
    assert "Top-1 on test: baseline 60.0 %" in plain
