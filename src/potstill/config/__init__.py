"""Names of the stages of a run; each stage trains one network and has one folder."""

import re
from collections.abc import Iterable

# In the order in which they are trained; "previous" is the model in use, which is not.
ROLES = ("teacher", "previous", "baseline", "assistant", "generation", "distilled")
STAGES = ("teacher", "baseline", "distilled")  # of a plain run; assistants and generations belong to distilled

_NAME = re.compile(r"(teacher|baseline|distilled)(?:-([2-9]|[1-9]\d+))?|(assistant|generation)-([1-9]\d*)|(previous)")


def stage_role(name: str) -> str:
    """Return which of ROLES a stage has; "" for a text that is no stage name (and must not be used as a path).

    Example:
        >>> (stage_role("teacher"), stage_role("baseline-2"), stage_role("assistant-1"), stage_role("teacher-1"),
        ... stage_role("../teacher"))
        ('teacher', 'baseline', 'assistant', '', '')
    """
    match = _NAME.fullmatch(name)
    return "" if match is None else match[1] or match[3] or match[5]


def stage_number(name: str) -> int:
    """Return the number of a stage among those of its role, from 1; that of baseline and distilled counts seeds.

    Example:
        >>> (stage_number("teacher"), stage_number("teacher-2"), stage_number("generation-1"),
        ... stage_number("distilled-3"))
        (1, 2, 1, 3)
    """
    return int(name.rpartition("-")[2]) if "-" in name else 1


def repeat_index(name: str) -> int:
    """Return the index of a stage's seed, from 0: 1 for ``baseline-2``; 0 for stages that are trained once.

    Example:
        >>> (repeat_index("baseline"), repeat_index("distilled-3"), repeat_index("teacher-2"),
        ... repeat_index("generation-1"))
        (0, 2, 0, 0)
    """
    return stage_number(name) - 1 if stage_role(name) in ("baseline", "distilled") else 0


def stage_name(role: str, number: int) -> str:
    """Return the name of a stage; the first teacher, baseline and distilled have no number.

    Example:
        >>> stage_name("teacher", 1), stage_name("teacher", 2), stage_name("assistant", 1), stage_name("baseline", 2)
        ('teacher', 'teacher-2', 'assistant-1', 'baseline-2')
    """
    return role if role in ("teacher", "baseline", "distilled") and number == 1 else f"{role}-{number}"


def sort_stages(names: Iterable[str]) -> list[str]:
    """Return stage names sorted by role, then by number; other names are left out.

    Example:
        >>> sort_stages(["distilled", "teacher-2", "elsewhere", "baseline", "teacher"])
        ['teacher', 'teacher-2', 'baseline', 'distilled']
    """
    return sorted(
        (name for name in names if stage_role(name)),
        key=lambda name: (ROLES.index(stage_role(name)), stage_number(name)),
    )
