"""Who is told about longer waits for data; ``potstill.training.observer.Observer`` is one."""

from typing import Protocol


class Watcher(Protocol):
    """Every call is cheap."""

    def wait(self, what: str, done: int, total: int) -> None:
        """A longer wait: so much of it is over; ``done == total``: all."""

    def note(self, message: str) -> None:
        """Something worth reading."""

    def warn(self, message: str) -> None:
        """Something that makes it slower than it could be."""
