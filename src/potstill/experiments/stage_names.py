"""Names of a run's stages, each of which is one network and one folder."""

import re
from collections.abc import Iterable

ROLES = ("teacher", "baseline", "assistant", "generation", "distilled")  # in the order in which they are trained

_NAME = re.compile(r"(teacher)(?:-([2-9]|[1-9]\d+))?|(assistant|generation)-([1-9]\d*)|(baseline|distilled)")


def role(name: str) -> str:
    """Which of ROLES a stage has; "" for what is no stage's name (and so must not become a path).

    Example:
        >>> role("teacher"), role("teacher-2"), role("assistant-1"), role("teacher-1"), role("../teacher")
        ('teacher', 'teacher', 'assistant', '', '')
    """
    match = _NAME.fullmatch(name)
    return "" if match is None else match[1] or match[3] or match[5]


def number(name: str) -> int:
    """Which of several of its role a stage is, from 1.

    Example:
        >>> number("teacher"), number("teacher-2"), number("generation-1"), number("distilled")
        (1, 2, 1, 1)
    """
    return int(name.rpartition("-")[2]) if "-" in name else 1


def numbered(role: str, number: int) -> str:
    """The name of a stage: the first teacher is plainly "teacher".

    Example:
        >>> numbered("teacher", 1), numbered("teacher", 2), numbered("assistant", 1)
        ('teacher', 'teacher-2', 'assistant-1')
    """
    return role if role == "teacher" and number == 1 else f"{role}-{number}"


def in_order(names: Iterable[str]) -> list[str]:
    """Names of stages as people read them: by role, then by number; whatever is none is left out.

    Example:
        >>> in_order(["distilled", "teacher-2", "elsewhere", "baseline", "teacher"])
        ['teacher', 'teacher-2', 'baseline', 'distilled']
    """
    return sorted((name for name in names if role(name)), key=lambda name: (ROLES.index(role(name)), number(name)))
