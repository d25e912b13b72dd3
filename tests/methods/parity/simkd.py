"""SimKD through the network that it deploys: what the student's map becomes, and the teacher's head on it."""

import torch
from parity_case import Case
from torch import Tensor, nn

from potstill.features.student_surgery import ProjectedHead
from potstill.functional import simkd_loss


def check(case: Case) -> dict[str, Tensor]:
    ours, theirs, h = case["fs"], case["ft"], case.hyper
    size = [min(ours.shape[axis], theirs.shape[axis]) for axis in (2, 3)]
    pool = size if size != list(ours.shape[2:]) else [0, 0]
    student = nn.Sequential(nn.Identity())  # its "images" are the map
    joined = ProjectedHead(
        student,
        stage="0",
        channels=ours.shape[1],
        outputs=theirs.shape[1],
        classes=h["num_classes"],
        factor=h["factor"],
        pool_height=pool[0],
        pool_width=pool[1],
    )
    case.load(joined.head, {"": "teacher_head."})
    names = {f"{3 * layer}.": f"proj.conv{layer + 1}." for layer in range(3)}
    names |= {f"{3 * layer + 1}.": f"proj.bn{layer + 1}." for layer in range(3)}
    case.load(joined.projector, names)
    projected: list[Tensor] = []
    joined.projector.register_forward_hook(lambda module, args, output: projected.append(output))
    logits = joined.train()(ours)
    assert torch.is_grad_enabled()
    return {"loss": simkd_loss(projected[0], theirs), "logits": logits}
