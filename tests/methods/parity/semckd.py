"""Attention and projections in front of the loss."""

from potstill.methods.semckd import Calibration, semckd_loss


def check(case):
    students, teachers, hyper = case.many("fs"), case.many("ft"), case.hyper
    channels = ([features.shape[1] for features in maps] for maps in (students, teachers))
    calibration = Calibration(*channels, batch=len(students[0]), factor=hyper["factor"])
    for kind, embeddings in (("query", calibration.queries), ("key", calibration.keys)):
        for position, embedding in enumerate(embeddings):
            case.load(embedding, {"linear": f"{kind}{position}.fc"})
    for i, row in enumerate(calibration.projections):
        for j, projection in enumerate(row):
            case.load(projection, {"conv": f"proj{i}_{j}.conv", "norm": f"proj{i}_{j}.bn"})
    attention = calibration.attention(students, teachers, hyper["soft"])
    return {"loss": semckd_loss(*calibration(students, teachers), attention), "attention": attention}
