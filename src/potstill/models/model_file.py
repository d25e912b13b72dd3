"""Our model files: ``model.safetensors`` (the tensors) and ``model.json`` (all that is needed to use them).

``model.json``, schema 1::

    {"schema": 1, "architecture": "resnet18", "class_names": ["cat", "dog"],
     "input": {"size": 224, "mean": [...], "std": [...], "fit": "crop", "crop_share": 1.0,
               "range": null},
     "facts": {...}, "sha256": "of model.safetensors", "checksum": "SHA-256 of this file without this entry"}

and, only where a method put other layers into the network, ``"remodelled"``: what ``features.remodel.rebuild`` takes.
"""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from potstill.artifacts import digest, digest_of, move, read_bytes, write_bytes
from potstill.errors import ArtifactError, UsageError
from potstill.features.remodel import rebuild
from potstill.inputs import InputSpec
from potstill.models import state_dict
from potstill.models.build import build
from potstill.models.classifier import Classifier
from potstill.sealed import read_sealed_json, write_sealed_json

WEIGHTS, FACTS = "model.safetensors", "model.json"
SCHEMA = 1
_NEXT = "model-next.safetensors"  # weights on their way to replace older ones


def save_model(classifier: Classifier, folder: Path) -> None:
    """Write both files; an older model stays whole until the new one is, and ``load_model`` finds one of the two.

    Raises:
        StorageError: no space, no permission, or an I/O error.
    """
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, value in classifier.module.state_dict().items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # Tied weights become two tensors in the file (safetensors refuses shared memory); loading copies both into one.
        tensors[key] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    weights = safetensors.torch.save(tensors)
    body = {
        "schema": SCHEMA,
        "architecture": classifier.architecture,
        "class_names": list(classifier.class_names),
        "input": dataclasses.asdict(classifier.input),
        **({} if classifier.remodelled is None else {"remodelled": classifier.remodelled}),
        "facts": classifier.facts,
        "sha256": digest(weights),
    }
    _finish_replacing(folder)  # what an earlier save may have left
    # Two files cannot be replaced at one instant: model.json says which weights are meant, wherever they stand by then.
    write_bytes(folder / (_NEXT if (folder / FACTS).exists() else WEIGHTS), weights)
    try:
        write_sealed_json(folder / FACTS, body)
    finally:
        _finish_replacing(folder)


def load_model(path: Path) -> Classifier:
    """The classifier of a folder (or of one of its two files), on the CPU and in eval mode.

    Nothing is parsed as tensors before its SHA-256 has been compared, no code is run from either file, and the global
    random state stays as it was.

    A network that a method remodelled is built as it was deployed.

    Raises:
        ArtifactError: missing, damaged, or not fitting the architecture that it names.

    Example:
        >>> import tempfile
        >>> from potstill.models.create import create_model
        >>> classifier = Classifier(create_model("cifar/vgg8", 2, size=32), "cifar/vgg8", ("cat", "dog"), InputSpec(32))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_model(classifier, Path(folder))
        ...     load_model(Path(folder)).class_names
        ('cat', 'dog')
    """
    path = Path(path)
    folder = path.parent if path.name in (WEIGHTS, FACTS) else path
    if not folder.is_dir():
        raise ArtifactError(f"no model at {path}: expected a folder with {WEIGHTS} and {FACTS}, or one of the two")
    body = _read_facts(folder / FACTS)
    waiting = _waiting(folder, body)
    weights = read_bytes(folder / (_NEXT if waiting else WEIGHTS), sha256=str(body.get("sha256")))
    try:
        spec = InputSpec.from_dict(body["input"])
        names = tuple(map(str, body["class_names"]))
        with torch.random.fork_rng(devices=[]):
            module = build(body["architecture"], len(names), size=spec.size)
            remodelled = body.get("remodelled")
            module = module if remodelled is None else rebuild(module, remodelled)
        new_head = state_dict.load(module, safetensors.torch.load(weights), len(names), origin=str(folder / WEIGHTS))
    except (KeyError, TypeError, ValueError, AttributeError, UsageError, SafetensorError) as error:
        raise ArtifactError(f"{folder / FACTS} cannot be used: {error}") from error
    if new_head:
        raise ArtifactError(f"{folder / WEIGHTS} has a head for another number of classes than {FACTS} names")
    return Classifier(module.eval(), body["architecture"], names, spec, body.get("facts", {}), remodelled)


def _read_facts(path: Path) -> dict[str, Any]:
    body = read_sealed_json(path)
    if body.get("schema") != SCHEMA:
        raise ArtifactError(f"{path} has schema {body.get('schema')!r}, this potstill reads {SCHEMA}; update potstill")
    return body


def _waiting(folder: Path, body: dict[str, Any]) -> bool:
    """Whether ``save_model`` ended before it moved the weights that model.json means."""
    return (folder / _NEXT).exists() and digest_of(folder / _NEXT) == body.get("sha256")


def _finish_replacing(folder: Path) -> None:
    """Move new weights to their place if model.json means them; else they are of no use."""
    if not (folder / _NEXT).exists():
        return
    meant = False
    with contextlib.suppress(ArtifactError):
        meant = _waiting(folder, read_sealed_json(folder / FACTS))
    if meant:
        move(folder / _NEXT, folder / WEIGHTS)
    else:
        with contextlib.suppress(OSError):
            (folder / _NEXT).unlink()
