"""What stands in and beside an exported model: all that is needed to use it.  No torch here."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from potstill.errors import ArtifactError
from potstill.input_spec import RESIZE_MODES, InputSpec

KEY = "potstill"  # of the entry in a file's own metadata
SCHEMA = 1
INSIDE = ("none", "normalise", "resize")


@dataclass(frozen=True)
class Description:
    """What an exported model takes and gives.

    Its input: with ``inside`` "none", normalised float32 images [B, 3, S, S]; with "normalise", the uint8 pixels
    [B, 3, S, S] of images that were cut to the network's size; with "resize", uint8 pixels [B, H, W, 3] of any size,
    one for all images of a batch.  Its output: logits [B, K], float32.
    """

    architecture: str
    class_names: tuple[str, ...]
    input: InputSpec
    inside: str = "none"
    int8: bool = False

    def as_json(self) -> dict[str, Any]:
        """For the metadata of a file and the facts beside it."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    def as_text(self) -> str:
        """``as_json`` in one line."""
        return json.dumps(self.as_json())


def description(text: str, origin: str) -> Description:
    """What ``as_text`` gave.

    Raises:
        ArtifactError: something else; ``origin`` is what messages call it.
    """
    try:
        found = json.loads(text)
        if found.pop("schema") != SCHEMA:
            raise ArtifactError(
                f"{origin} was exported by another version of potstill; update potstill, or export anew"
            )
        spec = InputSpec.from_dict(found.pop("input"))
        names = tuple(map(str, found.pop("class_names")))
        made = Description(class_names=names, input=spec, **found)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{origin}: its metadata cannot be used ({type(error).__name__}: {error})") from error
    if not _sensible(made):
        raise ArtifactError(f"{origin}: its metadata asks for what potstill never writes: {text[:200]}")
    return made


def _sensible(made: Description) -> bool:
    spec = made.input
    return (
        isinstance(spec.size, int)
        and 1 <= spec.size <= 4096
        and spec.resize_mode in RESIZE_MODES
        and 0.1 <= spec.crop_share <= 1
        and all(0 < each < 1e6 for each in spec.std)
        and all(abs(each) < 1e6 for each in spec.mean)
        and made.inside in INSIDE
        and len(made.class_names) >= 2
    )
