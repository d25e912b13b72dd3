"""CC through its two linear embeddings."""

from parity_case import Case
from torch import Tensor, nn

from potstill.functional import cc_loss


def check(case: Case) -> dict[str, Tensor]:
    widths = {side: case[name].shape[1] for side, name in (("student", "fs"), ("teacher", "ft"))}
    embed = nn.ModuleDict({side: nn.Linear(width, case.hyper["embed_dim"]) for side, width in widths.items()})
    case.load(embed, {"student": "embed_student", "teacher": "embed_teacher"})
    return {"loss": cc_loss(embed["student"](case["fs"]), embed["teacher"](case["ft"]))}
