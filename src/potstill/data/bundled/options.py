"""The options of a named data set, checked against its own small model."""

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from potstill.data.settings import DataSettings
from potstill.errors import UsageError, nearest


class Options(BaseModel):
    """Base of every data set's options: unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Chosen = TypeVar("Chosen", bound=Options)


def read_options(settings: DataSettings, model: type[Chosen]) -> Chosen:
    """``settings.options`` as the data set's own options.

    Raises:
        UsageError: unknown options or values; all of them, with the nearest known name.
    """
    try:
        return model.model_validate(settings.options)
    except ValidationError as error:
        problems = []
        for each in error.errors(include_url=False):
            name = ".".join(map(str, each["loc"]))
            if each["type"] == "extra_forbidden":
                allowed = ", ".join(model.model_fields) or "none"
                problems.append(f"unknown option {name!r} (allowed: {allowed}){nearest(name, model.model_fields)}")
            else:
                problems.append(f"option {name}: {each['msg']}, got {each['input']!r}")
        raise UsageError(f"data set {settings.source!r}: " + "; ".join(problems)) from error
