"""What can be wrong with a recipe between two domains, found without torch."""

from collections.abc import Iterator
from typing import Any

from potstill.data.settings import DataSettings
from potstill.experiments.method_settings import as_mapping, describe, needs_teacher
from potstill.experiments.settings_errors import Finding, parse_rest

_GIVE = "name a folder of class folders, a manifest or a data set with --set data.target=DIR"
NO_TARGET = f"data.target is not given, and `domain` says how to get there: {_GIVE}"


def lacks_target(value: dict[str, Any]) -> bool:
    """Whether a recipe says how to get to a target, and names none."""
    data = value.get("data", {})
    return value.get("domain") is not None and (not isinstance(data, dict) or data.get("target") is None)


def domain_problems(value: dict[str, Any]) -> Iterator[Finding]:
    """Settings that need a target without one, and a target that nobody can use."""
    section = value.get("data", {})
    if not isinstance(section, dict):
        return
    data, wrong = parse_rest(section, DataSettings)
    if data.target is None and value.get("domain") is not None:
        return  # perhaps it comes from Python; else see ``lacks_target``
    if data.target is None:
        for key in ("target_labels", "target_options"):
            if key not in wrong and getattr(data, key):
                yield ("data", key), f"data.{key} is of data.target, which is not given: {_GIVE}"
        return
    if data.augment is not None and data.augment.mixes:
        key = "mixup" if data.augment.mixup else "cutmix"
        message = "mixes labels, which target images do not have: switch it off, or leave data.target out"
        yield ("data", "augment", key), f"data.augment.{key} {message}"
    method = value.get("method")
    if not needs_teacher(method):
        why = f"method {describe(as_mapping(method))} learns from no teacher"
        yield ("data", "target"), f"data.target: only a teacher can say something of its images, and {why}; use kd"
