"""Connectors, margins and the partial distance; the reference sums over the batch."""

import torch
from torch import nn

from potstill.methods.ofd import connector, ofd_loss, ofd_margin


def check(case):
    students, teachers = case.many("fs"), case.many("ft")
    connected, margins = [], []
    for position, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        names = {"0.": f"connector{position}.", "1.": f"connector_bn{position}."}
        join = case.load(connector(student.shape[1], teacher.shape[1]), names)
        connected.append(join(student))
        norm = nn.BatchNorm2d(teacher.shape[1])
        with torch.no_grad():
            norm.weight.copy_(case.param(f"teacher_bn{position}.weight"))
            norm.bias.copy_(case.param(f"teacher_bn{position}.bias"))
        margins.append(ofd_margin(norm))
    loss = ofd_loss(connected, teachers, margins)
    parts = {f"margin{position}": margin for position, margin in enumerate(margins)}
    return {"loss": loss * len(students[0]), "per_batch": loss, **parts}
