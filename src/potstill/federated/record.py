"""federated.json: who had what, each algorithm's rounds, figures and traffic; and the table that people read."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from potstill.errors import UsageError
from potstill.federated.rounds import Progress
from potstill.sealed import read_sealed_json, write_sealed_json

FILE = "federated.json"
SCHEMA = 1


@dataclass
class Federated:
    """What stands in the file; it is written anew after each algorithm."""

    path: Path
    found: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def opened(cls, path: Path, wishes: dict[str, Any], fingerprint: str, *, resume: bool) -> "Federated":
        """A new record, or with ``resume`` the one that is there.

        Raises:
            UsageError: the run that is to be gone on with was asked for something else.
            ArtifactError: it is damaged.
        """
        asked = {"schema": SCHEMA, "wishes": wishes, "data": fingerprint}
        if not (resume and path.exists()):
            return cls(path, {**asked, "trained": {}})
        record = cls(path, read_sealed_json(path))
        old, wishes = _flat(record.found.get("wishes", {})), _flat(wishes)
        differ = [f"{key} was {old.get(key)} and is {new}" for key, new in wishes.items() if old.get(key) != new]
        if record.found.get("data") != fingerprint:
            differ.append("the images are others")
        if differ:
            raise UsageError(f"--resume goes on with the same run, but {'; '.join(differ)}: use another --name")
        return record

    @property
    def trained(self) -> dict[str, Any]:
        """Algorithm or baseline -> what came of it."""
        found: dict[str, Any] = self.found["trained"]
        return found

    def add(self, name: str, facts: dict[str, Any]) -> None:
        """Keep what came of one algorithm."""
        self.trained[name] = facts
        self.write()

    def write(self) -> None:
        """Put it on disk.

        Raises:
            StorageError: it could not be written.
        """
        write_sealed_json(self.path, self.found)


def _flat(wishes: dict[str, Any]) -> dict[str, Any]:
    """The schedule's entries beside the others, so that a difference is named by itself."""
    return {key: each for key, each in wishes.items() if key != "schedule"} | dict(wishes.get("schedule", {}))


def described(progress: Progress, test: dict[str, float]) -> dict[str, Any]:
    """One algorithm's entry: its rounds, the best one's figures, and bytes per round (mean of all rounds)."""
    rounds = progress.records
    return {
        "best_round": progress.best,
        "val": rounds[progress.best - 1]["val"],
        "test": test,
        "bytes_per_round": {way: sum(each[f"bytes_{way}"] for each in rounds) // len(rounds) for way in ("down", "up")},
        "bytes": sum(each["bytes_down"] + each["bytes_up"] for each in rounds),
        "seconds": round(sum(each["seconds"] for each in rounds), 3),
        "rounds": rounds,
    }


def mean_of(values: Sequence[float]) -> dict[str, float]:
    """Mean, sample deviation and number of test top-1 figures.

    Example:
        >>> mean_of([0.5, 0.7])["mean"]
        0.6
    """
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "deviation": spread, "n": float(len(values))}


def table(found: dict[str, Any]) -> list[str]:
    """For people: one line for each algorithm and baseline."""
    rows = [("", "test top-1", "best round", "down/round", "up/round", "in all")]
    for name, entry in found["trained"].items():
        if name.startswith("alone-"):
            continue
        traffic = entry["bytes_per_round"]
        sizes = [_megabytes(each) for each in (traffic["down"], traffic["up"], entry["bytes"])]
        rows.append(
            (
                name,
                f"{entry['test']['top1']:.1%}",
                str(entry["best_round"]),
                *(["-"] * 3 if name == "central" else sizes),
            )
        )
    if "alone" in found:
        alone = found["alone"]
        rows.append(("alone", f"{alone['mean']:.1%}", f"mean of {alone['n']:.0f}", "-", "-", "-"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"
