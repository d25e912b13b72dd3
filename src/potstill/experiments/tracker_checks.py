"""What can be wrong with a recipe's trackers besides kinds and names."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from potstill.experiments.settings_errors import Finding
from potstill.tracking.settings import as_list


def tracker_problems(value: Any) -> Iterator[Finding]:
    """Of what stands under ``tracker``: a server for one that has none, a password, the same twice."""
    named: list[str] = []
    for at, each in enumerate(as_list(value)):
        if not isinstance(each, dict) or not isinstance(each.get("name"), str):
            continue  # said elsewhere
        path, uri = ("tracker", at, "uri"), each.get("uri")
        if uri is not None and each["name"] != "mlflow":
            yield path, f"tracker[{at}].uri is for mlflow; {each['name']} is told by its own environment variables"
        elif isinstance(uri, str) and _has_password(uri):
            yield (
                path,
                f"tracker[{at}].uri must carry no password, since recipes are kept and shared: "
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_URI",
            )
        if each["name"] in named:
            yield ("tracker", at, "name"), f"tracker[{at}].name: {each['name']} is named twice; once is enough"
        named.append(each["name"])


def _has_password(uri: str) -> bool:
    try:
        return urlsplit(uri).password is not None
    except ValueError:
        return False
