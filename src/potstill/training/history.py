"""What a stage's training came to."""

from dataclasses import dataclass, field
from typing import Any

Record = dict[str, Any]


@dataclass
class History:
    """Every epoch's figures and which was the best."""

    records: list[Record] = field(default_factory=list)  # lines of metrics.jsonl
    lines: list[str] = field(default_factory=list)  # the digest of each, as it was written
    best_epoch: int = 0  # from 1
    best_value: float = -float("inf")  # of the picking metric; losses are negated, so that larger is better
    seconds: float = 0.0

    @property
    def images_per_second(self) -> float:
        """Median over the epochs."""
        rates = sorted(record["images_per_second"] for record in self.records)
        return float(rates[len(rates) // 2])
