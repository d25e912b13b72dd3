"""The ways of federated training: one visible line each."""

from dataclasses import dataclass
from typing import Literal

from potstill.errors import UsageError, nearest


@dataclass(frozen=True)
class Algorithm:
    """What clients do and send, and what the server makes of it."""

    summary: str
    sends: Literal["weights", "logits"] = "weights"
    distils: bool = False  # the server, on public images
    guide: Literal["none", "teacher", "student"] = "none"  # of local training: the server's teacher, or what it sent

    @property
    def public(self) -> bool:
        """Whether public images are needed."""
        return self.distils or self.sends == "logits"


ALGORITHMS: dict[str, Algorithm] = {
    "fedavg": Algorithm("clients train on labels, the server averages their weights"),
    "feddf": Algorithm("likewise, then their averaged logits on public images teach the average", distils=True),
    "fedmd": Algorithm("clients keep their networks and send logits of public images", sends="logits", distils=True),
    "guided": Algorithm("fedavg, and the server's teacher guides local training", guide="teacher"),
    "selfguided": Algorithm("fedavg, and the student that the server sent guides local training", guide="student"),
}


def parse_algorithms(text: str) -> list[str]:
    """Names separated by commas.

    Raises:
        UsageError: unknown or repeated ones; names the nearest.

    Example:
        >>> parse_algorithms("fedavg,feddf")
        ['fedavg', 'feddf']
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in ALGORITHMS:
            raise UsageError(f"no algorithm {name!r}{nearest(name, ALGORITHMS)}\nKnown: {', '.join(ALGORITHMS)}")
    if not names or len(set(names)) < len(names):
        raise UsageError(f"--algorithms: name one or more of {', '.join(ALGORITHMS)}, each once; got {text!r}")
    return names
