"""Student maps come after their connector; the reference lists what each layer adds."""

from potstill.methods.ab import ab_loss


def check(case):
    students, teachers = case.many("fs"), case.many("ft")
    margin, last = case.hyper["margin"], len(students) - 1
    layers = {
        f"layer{position}": ab_loss([student], [teacher], margin=margin) / 2 ** (last - position)
        for position, (student, teacher) in enumerate(zip(students, teachers, strict=True))
    }
    return {"loss": ab_loss(students, teachers, margin=margin), **layers}
