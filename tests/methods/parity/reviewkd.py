"""HCL alone, or the whole chain of fusions in front of it."""

from potstill.methods.reviewkd import Review, hcl_loss

NAMES = {"reduce.": "conv1.", "reduce_norm.": "bn1.", "expand.": "conv2.", "expand_norm.": "bn2.", "attention.": "att."}


def check(case):
    students, teachers = case.many("fs"), case.many("ft")
    if "fs_pooled" not in case:
        return {"loss": hcl_loss(students, teachers)}
    students.append(case["fs_pooled"][:, :, None, None])
    teachers.append(case["ft_pooled"][:, :, None, None])
    channels = ([level.shape[1] for level in levels] for levels in (students, teachers))
    review = Review(*channels, max_mid=case.hyper["mid_channel"])
    for position, fusion in enumerate(review.fusions):
        case.load(fusion, {ours: f"abf{position}.{theirs}" for ours, theirs in NAMES.items()})
    outputs = review(students, [teacher.shape[2:] for teacher in teachers])
    parts = {f"abf_out.{position}": output for position, output in enumerate(outputs)}
    return {"loss": hcl_loss(outputs, teachers), **parts}
