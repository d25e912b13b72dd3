"""``Classifier``, a network with all that is needed to use it, and its two files.

``model.safetensors`` holds the tensors, ``model.json`` all else.  ``model.json``, schema 1::

    {"schema": 1, "architecture": "resnet18", "class_names": ["cat", "dog"],
     "input": {"size": 224, "mean": [...], "std": [...], "resize_mode": "crop", "crop_share": 1.0, "range": null},
     "facts": {...}, "sha256": "of model.safetensors", "checksum": "SHA-256 of this file without this entry"}

and, only where a method put other layers into the network, ``"remodelled"``: the argument of ``rebuild`` in
``features``; only where the network's outputs are not the classes one by one, ``"output_groups"``: see
``OutputGroups``; only where channels were removed, ``"pruned"``: the argument of ``pruning.cut_channels``; only for a
network of somebody's own code, ``"outputs"``: numbers by which a change of that code is noticed.
"""

import contextlib
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator
from safetensors import SafetensorError
from torch import Tensor, nn

from potstill.code_references import PERMISSION, is_code_reference, is_permitted
from potstill.errors import ArtifactError, UsageError
from potstill.features.student_surgery import rebuild_student
from potstill.features.tracing import eval_no_grad
from potstill.input_spec import InputSpec
from potstill.io import (
    file_sha256,
    read_bytes,
    read_checksummed_json,
    replace_file,
    sha256_hex,
    write_bytes,
    write_checksummed_json,
)
from potstill.models import state_dict
from potstill.models.families.opaque_models import allocate_buffers, find_opaque
from potstill.models.families.own_models import is_own_network
from potstill.models.output_groups import GroupedOutputs, OutputGroups
from potstill.models.pruning import Widths, cut_channels
from potstill.models.registry import build_model


@dataclass
class Classifier:
    """A trained network with its classes and preprocessing, as saved in a model folder."""

    module: nn.Module  # images [B, 3, S, S] -> logits [B, K]
    architecture: str  # a name for `create_model`
    class_names: tuple[str, ...]  # of the K logits, in order
    input: InputSpec
    facts: dict[str, Any] = field(default_factory=dict)  # on its training; JSON values
    remodelled: dict[str, Any] | None = None  # if a method replaced layers; see `rebuild`
    output_groups: OutputGroups | None = None  # if the module is a `GroupedOutputs`
    pruned: Widths | None = None  # if channels were removed; see `cut_channels`

    def predict(self, images: Tensor) -> Tensor:
        """Return the probabilities [B, K] of images [B, 3, S, S] that were preprocessed as ``input`` states.

        Runs on the network's device, in eval mode and without gradients; the network's mode is restored.
        """
        device = next((each.device for each in (*self.module.parameters(), *self.module.buffers())), images.device)
        training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad():
                logits: Tensor = self.module(images.to(device))
        finally:
            self.module.train(training)
        return logits.float().softmax(dim=1)


WEIGHTS_FILE, FACTS_FILE = "model.safetensors", "model.json"
SCHEMA = 1
_NEXT_WEIGHTS = "model-next.safetensors"  # weights on their way to replace older ones
_MAX_CLASSES = 1_000_000
_KEPT_OUTPUTS = 16  # of each of two images
_OTHER_CODE = 0.01  # share of the largest output; devices and versions of PyTorch differ by less

FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _check_name(value: Any) -> str:
    # pydantic's own str refuses what file systems allow: names that are no UTF-8.
    if not isinstance(value, str) or not 1 <= len(value) <= 1_000:
        raise ValueError("Input should be a text of 1 to 1,000 characters")
    return value


NameField = Annotated[Any, AfterValidator(_check_name)]


class _InputFields(BaseModel):
    """The fields of ``InputSpec``, within the ranges that prediction can work with."""

    model_config = ConfigDict(extra="forbid", strict=True)

    size: Annotated[int, Field(ge=1, le=4096)]
    mean: Annotated[tuple[FiniteFloat, FiniteFloat, FiniteFloat], Field(strict=False)]
    std: Annotated[tuple[PositiveFloat, PositiveFloat, PositiveFloat], Field(strict=False)]
    resize_mode: Literal["crop", "pad", "stretch"] = "crop"
    crop_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    range: Annotated[tuple[FiniteFloat, FiniteFloat] | None, Field(strict=False)] = None

    @field_validator("range")
    @classmethod
    def _low_first(cls, ends: tuple[float, float] | None) -> tuple[float, float] | None:
        if ends is not None and ends[0] >= ends[1]:
            raise ValueError("the lower end must come first")
        return ends


class ModelFacts(BaseModel):
    """A ``model.json``; all fields are validated before any is used."""

    model_config = ConfigDict(strict=True)

    architecture: NameField
    class_names: Annotated[tuple[NameField, ...], Field(min_length=2, max_length=_MAX_CLASSES, strict=False)]
    input: _InputFields
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    facts: dict[str, Any] = {}
    remodelled: dict[str, Any] | None = None
    output_groups: dict[str, Any] | None = None
    pruned: Widths | None = None
    outputs: Annotated[list[list[FiniteFloat]] | None, Field(max_length=2)] = None

    @field_validator("class_names")
    @classmethod
    def _unique(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names):
            raise ValueError("a class name is given twice")
        return names


def save_model(classifier: Classifier, folder: Path) -> None:
    """Write both files; if this is interrupted, ``load_model`` finds the old or the new model."""
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
        **({} if classifier.output_groups is None else {"output_groups": classifier.output_groups.as_dict()}),
        **({} if classifier.pruned is None else {"pruned": classifier.pruned}),
        **({} if (outputs := _own_outputs(classifier)) is None else {"outputs": outputs}),
        "facts": classifier.facts,
        "sha256": sha256_hex(weights),
    }
    _finish_replacement(folder)  # what an earlier save may have left
    # Two files cannot be replaced at once: the SHA-256 in model.json identifies which weights belong to it.
    write_bytes(folder / (_NEXT_WEIGHTS if (folder / FACTS_FILE).exists() else WEIGHTS_FILE), weights)
    try:
        write_checksummed_json(folder / FACTS_FILE, body)
    finally:
        _finish_replacement(folder)


def outputs_of_fixed_images(module: nn.Module, size: int, seed: int = 0) -> Tensor:
    """Return a network's outputs [4, K] for four fixed images of noise, float64 on the CPU, in eval mode.

    ``seed``: for what the network draws on the CPU.
    """
    device = next((each.device for each in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    images = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(1)).to(device)
    with eval_no_grad(module), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        outputs: Tensor = module(images)
    return outputs.detach().double().cpu()


def _own_outputs(classifier: Classifier) -> list[list[float]] | None:
    """Return outputs of a network of somebody's own code; None for others, and for outputs that are not repeatable."""
    if not is_own_network(classifier.architecture) or find_opaque(classifier.module) is not None:
        return None
    first, again = (outputs_of_fixed_images(classifier.module, classifier.input.size, seed)[:2] for seed in (0, 1))
    return first[:, :_KEPT_OUTPUTS].tolist() if torch.allclose(first, again) and first.isfinite().all() else None


def _check_own_outputs(module: nn.Module, body: ModelFacts, path: Path) -> None:
    """Check that a network's code computes what it did when the model was saved; else raise ArtifactError."""
    if body.outputs is None:
        return
    saved = torch.tensor(body.outputs, dtype=torch.float64)
    now = outputs_of_fixed_images(module, body.input.size)[: len(saved), : saved.shape[-1]]
    difference, largest = float((now - saved).abs().max()), float(saved.abs().max())
    if not difference <= _OTHER_CODE * max(largest, 1e-6):
        raise ArtifactError(
            f"{path}: {body.architecture} computes other outputs than when this model was saved (they differ by up to "
            f"{difference:.3g}, and were up to {largest:.3g}): its code has changed since. Use the code of that time, "
            "or train the network again"
        )


def load_model(path: Path, *, module: nn.Module | None = None) -> Classifier:
    """Return the classifier of a folder (or of one of its two files), on the CPU and in eval mode.

    Nothing is parsed as tensors before its SHA-256 has been compared, no code is run from either file, and the global
    random state stays as it was.

    A network that a method remodelled, or whose channels were removed, is built as it was deployed; ``module``: the
    network that the weights are loaded into, in place of one by its architecture's name.

    ArtifactError: missing, damaged, not fitting its architecture, or of code that has changed or lacks ``allow_code``.

    Example:
        >>> import tempfile
        >>> from potstill.models.factory import create_model
        >>> classifier = Classifier(create_model("cifar/vgg8", 2, size=32), "cifar/vgg8", ("cat", "dog"), InputSpec(32))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_model(classifier, Path(folder))
        ...     load_model(Path(folder)).class_names
        ('cat', 'dog')
    """
    path = Path(path)
    folder = path.parent if path.name in (WEIGHTS_FILE, FACTS_FILE) else path
    if not folder.is_dir():
        raise ArtifactError(
            f"no model at {path}: expected a folder with {WEIGHTS_FILE} and {FACTS_FILE}, or one of the two"
        )
    body = read_facts(folder / FACTS_FILE)
    if module is None and is_code_reference(body.architecture) and not is_permitted(body.architecture):
        raise ArtifactError(
            f"{folder / FACTS_FILE} is a network whose code would run on this machine: {body.architecture}\n"
            "Read that code; if you trust it, add --allow-code (from Python: allow_code=True), or set "
            f"{PERMISSION}=1 if a command has no such option"
        )
    waiting = _is_replacement_pending(folder, body.sha256)
    weights = read_bytes(folder / (_NEXT_WEIGHTS if waiting else WEIGHTS_FILE), sha256=body.sha256)
    spec, names = InputSpec(**body.input.model_dump()), body.class_names
    try:
        with torch.random.fork_rng(devices=[]):
            groups = None if body.output_groups is None else OutputGroups.from_dict(body.output_groups)
            if groups is not None and (len(groups.groups) != len(names) or groups.outputs > _MAX_CLASSES):
                raise ValueError(f"output_groups has {len(groups.groups)} groups for {len(names)} classes")
            if module is None:
                module = build_model(body.architecture, groups.outputs if groups else len(names), size=spec.size)
            module = module if body.pruned is None else cut_channels(module, body.pruned)
            module = module if groups is None else GroupedOutputs(module, groups)
            module = module if body.remodelled is None else rebuild_student(module, body.remodelled)
        tensors = safetensors.torch.load(weights)
        allocate_buffers(module, tensors)
        new_head = state_dict.load_state_dict(module, tensors, len(names), origin=str(folder / WEIGHTS_FILE))
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, UsageError, SafetensorError) as error:
        # Only manipulated files with a correct SHA-256 get here.
        raise ArtifactError(f"{folder / FACTS_FILE} cannot be used: {error}") from error
    if new_head:
        raise ArtifactError(f"{folder / WEIGHTS_FILE} has a head for another number of classes than {FACTS_FILE} names")
    _check_own_outputs(module, body, folder)
    return Classifier(module.eval(), body.architecture, names, spec, body.facts, body.remodelled, groups, body.pruned)


def predicts_classes(facts: dict[str, Any]) -> bool:
    """Return whether a model has classes, by the facts of its model.json; with ``head: none`` it has none."""
    head = facts.get("head")
    return not (isinstance(head, dict) and head.get("kind") == "none")


def load_class_model(path: Path) -> Classifier:
    """Return the classifier of a folder as ``load_model``; ArtifactError if it has no classes."""
    model = load_model(path)
    check_predicts_classes(path, model.facts)
    return model


def check_predicts_classes(path: Path, facts: dict[str, Any]) -> None:
    """Check that the network of a folder has classes.

    Raises:
        ArtifactError: it has none; names what gives it a head.
    """
    if predicts_classes(facts):
        return
    if "training" in facts:
        raise ArtifactError(
            f"{path} was trained on images without labels by a teacher without classes (head: none): it has an "
            "embedding and predicts nothing. Labeled images give it a head: potstill run RECIPE --data LABELED "
            f"--student {path}"
        )
    raise ArtifactError(
        f"{path} is a teacher without classes (head: none), which predicts nothing: give the student, or the run"
    )


def read_facts(path: Path) -> ModelFacts:
    """Return the content of a ``model.json``, every field of it validated."""
    body = read_checksummed_json(path)
    if body.get("schema") != SCHEMA:
        raise ArtifactError(f"{path} has schema {body.get('schema')!r}, this potstill reads {SCHEMA}; update potstill")
    try:
        return ModelFacts.model_validate(body)
    except ValidationError as error:
        fields = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:3])
        raise ArtifactError(f"{path} describes no model that this potstill can load: {fields}") from None


def _is_replacement_pending(folder: Path, sha256: str) -> bool:
    """Return whether ``save_model`` was interrupted before it moved the weights of model.json."""
    return (folder / _NEXT_WEIGHTS).exists() and file_sha256(folder / _NEXT_WEIGHTS) == sha256


def _finish_replacement(folder: Path) -> None:
    """Move new weights to their place if model.json belongs to them, else delete them."""
    if not (folder / _NEXT_WEIGHTS).exists():
        return
    meant = False
    with contextlib.suppress(ArtifactError):
        meant = _is_replacement_pending(folder, read_facts(folder / FACTS_FILE).sha256)
    if meant:
        replace_file(folder / _NEXT_WEIGHTS, folder / WEIGHTS_FILE)
    else:
        with contextlib.suppress(OSError):
            (folder / _NEXT_WEIGHTS).unlink()
