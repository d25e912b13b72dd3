"""CRD: one step from given banks with given negatives."""

import torch
import torch.nn.functional as F
from parity_case import Case
from torch import Tensor, nn

from potstill.functional import crd_loss
from potstill.methods.crd import crd_constants, crd_memory


def check(case: Case) -> dict[str, Tensor]:
    h = case.hyper
    embed = nn.ModuleDict(
        {"student": nn.Linear(h["s_dim"], h["feat_dim"]), "teacher": nn.Linear(h["t_dim"], h["feat_dim"])}
    )
    case.load(embed, {"student": "embed_student", "teacher": "embed_teacher"})
    units = F.normalize(embed["student"](case["fs"]), dim=1), F.normalize(embed["teacher"](case["ft"]), dim=1)
    memories = case["memory_student"], case["memory_teacher"]
    if isinstance(h["Z_init"], str):
        constants = crd_constants(*units, *memories, case["contrast_idx"], temperature=h["nce_t"])
    else:
        constants = torch.tensor(h["Z_init"], dtype=case.dtype)
    after = [
        crd_memory(memory, unit, case["idx"], momentum=h["nce_m"]) for memory, unit in zip(memories, units, strict=True)
    ]
    return {
        "loss": crd_loss(*units, *memories, case["contrast_idx"], constants, temperature=h["nce_t"]),
        "Z_student": constants[0],
        "Z_teacher": constants[1],
        "memory_student_after": after[0],
        "memory_teacher_after": after[1],
    }
