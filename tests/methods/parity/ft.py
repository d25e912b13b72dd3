"""Factors given, or the networks that make them."""

from potstill.methods.ft import Paraphraser, Translator, ft_loss


def check(case):
    powers = {"power": case.hyper["p1"], "exponent": case.hyper["p2"]}
    if "factor_s" in case:
        return {"loss": ft_loss(case["factor_s"], case["factor_t"], **powers)}
    student, teacher = case["fs"], case["ft"]
    factor = int(teacher.shape[1] * case.hyper["k"])
    paraphraser = case.load(Paraphraser(teacher.shape[1], factor), {"": "paraphraser."})
    names = {"conv": "translator.conv", "norm": "translator.bn"}
    translator = case.load(Translator(student.shape[1], factor), names)
    theirs, ours = paraphraser(teacher), translator(student)
    return {"loss": ft_loss(ours, theirs, **powers), "factor_t": theirs, "factor_s": ours}
