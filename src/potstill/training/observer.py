"""What the loop tells whoever watches; silent by default."""

from typing import Any, Protocol


class Observer(Protocol):
    """Every call is cheap and forces no device synchronisation."""

    def stage(self, name: str, detail: str) -> None:
        """A stage (teacher, baseline, distilled) begins."""

    def epoch_start(self, epoch: int, epochs: int, steps: int, images: int) -> None:
        """Epoch ``epoch`` (from 1) of ``epochs`` begins: so many steps over so many images."""

    def step(self, images: int) -> None:
        """So many more images have been trained on."""

    def epoch_end(self, record: dict[str, Any]) -> None:
        """An epoch is over; ``record`` is its line of metrics.jsonl."""

    def wait(self, what: str, done: int, total: int) -> None:
        """A longer wait outside of training: so much of it is over; ``done == total``: all."""

    def note(self, message: str) -> None:
        """Something worth reading."""

    def warn(self, message: str) -> None:
        """Something that probably spoils the result."""

    def stage_end(self, name: str, seconds: float) -> None:
        """A stage is over."""


class Silent:
    """Watches and says nothing."""

    def stage(self, name: str, detail: str) -> None: ...

    def epoch_start(self, epoch: int, epochs: int, steps: int, images: int) -> None: ...

    def step(self, images: int) -> None: ...

    def epoch_end(self, record: dict[str, Any]) -> None: ...

    def wait(self, what: str, done: int, total: int) -> None: ...

    def note(self, message: str) -> None: ...

    def warn(self, message: str) -> None: ...

    def stage_end(self, name: str, seconds: float) -> None: ...
