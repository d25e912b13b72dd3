"""Independent random streams from one seed, so that one part's draws never move another's."""

import hashlib


def derive(seed: int, purpose: str) -> int:
    """A seed in [0, 2**63) for one purpose.

    Example:
        >>> derive(0, "student") == derive(0, "student"), derive(0, "student") == derive(0, "teacher")
        (True, False)
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "little") >> 1
