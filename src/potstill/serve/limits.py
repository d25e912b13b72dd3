"""What the server allows."""

from dataclasses import dataclass

HEADER = b"x-potstill"  # scripts of other sites cannot send it without asking first, and nobody answers that question


@dataclass(frozen=True)
class Limits:
    """Seconds, bytes and counts; ``/healthz`` is exempt from the parallel ones."""

    body_bytes: int = 10_000_000
    send_seconds: float = 10.0  # for a request's head, and again for its body
    answer_seconds: float = 10.0  # from the end of the body to the first byte of the answer
    parallel: int = 32  # requests at a time
    connections: int = 512  # open sockets
    load_seconds: float = 120.0  # for the child to read the models
