"""What federated training is compared with."""

from potstill.errors import UsageError, nearest

BASELINES = {
    "alone": "each client by itself, as many rounds; the mean over clients",
    "central": "one client that has all images, as many rounds: what federation could reach at best",
}


def parse_baselines(text: str) -> list[str]:
    """Names separated by commas, or nothing.

    Raises:
        UsageError: an unknown one.

    Example:
        >>> parse_baselines("alone,central"), parse_baselines("")
        (['alone', 'central'], [])
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in BASELINES:
            raise UsageError(f"no baseline {name!r}{nearest(name, BASELINES)}\nKnown: {', '.join(BASELINES)}")
    return list(dict.fromkeys(names))
