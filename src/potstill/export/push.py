"""Publish the student of a run on the Hugging Face hub: weights, model.json and the model card."""

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.code_references import is_code_reference
from potstill.config.yaml import dump_yaml, parse_yaml
from potstill.errors import ArtifactError, UsageError, first_line
from potstill.experiment.run_folder import find_model
from potstill.hub import CONNECT_SECONDS, create_client, hub_errors, is_reachable
from potstill.io import read_bytes, read_checksummed_json, read_checksummed_text, write_checksummed_json
from potstill.models.families.library_models import Timm, size_arguments
from potstill.models.model_file import FACTS_FILE, WEIGHTS_FILE, Classifier, load_model, read_facts
from potstill.models.registry import resolve
from potstill.report.run_reader import read_run
from potstill.report.text_reports import model_card, without_folders

CARD_FILE, RECIPE_FILE, TIMM_FILE = "README.md", "recipe.yaml", "config.json"
_CROP_MODES = {"crop": "center", "pad": "border", "stretch": "squash"}  # timm's words
_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)


@dataclass(frozen=True)
class Publication:
    """What is sent to the hub."""

    repository: str
    files: dict[str, bytes]  # by name

    @property
    def card(self) -> str:
        """The model card."""
        return self.files[CARD_FILE].decode("utf-8")


def prepare(run: Path, repository: str) -> Publication:
    """Return the files of a run's student: distilled, else baseline; paths of this machine lose their folders."""
    if not _NAME.fullmatch(repository):
        raise UsageError(f"a repository is NAME or USER/NAME of letters, digits and . _ -, got {repository!r}")
    folder = find_model(run)
    if folder == run or not (run / "results.json").is_file():
        raise ArtifactError(f"{run} is no finished run; the model card needs its results")
    card = model_card(read_run(run))
    if card is None or folder.name.startswith("teacher"):
        raise ArtifactError(f"{run} has no student: neither distilled nor baseline was trained")
    facts = read_facts(folder / FACTS_FILE)
    if is_code_reference(facts.architecture):
        raise UsageError(
            f"the network of {folder} is code, {facts.architecture}, which is not sent: others could not load it"
        )
    weights = read_bytes(folder / WEIGHTS_FILE, sha256=facts.sha256)
    body = {key: value for key, value in read_checksummed_json(folder / FACTS_FILE).items() if key != "checksum"}
    body["facts"] = without_folders(body.get("facts", {}))
    with tempfile.TemporaryDirectory() as temporary:
        write_checksummed_json(path := Path(temporary, FACTS_FILE), body)
        described = path.read_bytes()
    timm = timm_config(load_model(folder))
    recipe = without_folders(parse_yaml(read_checksummed_text(run / RECIPE_FILE), RECIPE_FILE).value)
    use = f'\n## Use\n\n```python\nimport potstill\n\nmodel = potstill.load("hf-hub:{repository}")\n```\n'
    if timm is not None:
        call = f'timm.create_model("hf-hub:{repository}", pretrained=True)'
        use += f"\nOr with timm alone:\n\n```python\nimport timm\n\nnetwork = {call}\n```\n"
    return Publication(
        repository,
        {
            WEIGHTS_FILE: weights,
            FACTS_FILE: described,
            RECIPE_FILE: dump_yaml(recipe).encode("utf-8"),
            CARD_FILE: f"{card}{use}".encode(),
            **({} if timm is None else {TIMM_FILE: f"{json.dumps(timm, indent=2)}\n".encode()}),
        },
    )


def timm_config(model: Classifier) -> dict[str, Any] | None:
    """Return the config.json by which timm builds a student; None if it is none of timm's, or has been changed."""
    family, name = resolve(model.architecture)
    changed = (model.remodelled, model.output_groups, model.pruned)
    if not isinstance(family, Timm) or any(each is not None for each in changed):
        return None
    own, spec = getattr(model.module, "pretrained_cfg", None) or {}, model.input
    classes = list(model.class_names)
    return {
        "architecture": name.partition(".")[0],  # without the tag of its first weights
        "num_classes": len(classes),
        "label_names": classes,
        **({"model_args": arguments} if (arguments := size_arguments(name, spec.size)) else {}),
        "pretrained_cfg": {
            **{key: own[key] for key in ("first_conv", "classifier") if key in own},
            "custom_load": False,
            "input_size": [3, spec.size, spec.size],
            "fixed_input_size": bool(own.get("fixed_input_size", False)),
            "interpolation": "bilinear",
            "crop_pct": spec.crop_share if spec.resize_mode == "crop" else 1.0,
            "crop_mode": _CROP_MODES[spec.resize_mode],
            "mean": list(spec.mean),
            "std": list(spec.std),
            "num_classes": len(classes),
        },
    }


def push(publication: Publication, *, private: bool = False, update: bool = False) -> str:
    """Create the repository and send the files in one commit; return the address of the commit."""
    from huggingface_hub import CommitOperationAdd, constants, errors, get_token

    name = publication.repository
    if constants.HF_HUB_OFFLINE:
        raise UsageError(f"{name}: HF_HUB_OFFLINE is set, so nothing can be sent; --dry-run shows what would be")
    if get_token() is None:
        raise UsageError(
            f"{name}: writing to the hub needs a token: log in with `hf auth login`, or set HF_TOKEN\n"
            "--dry-run shows what would be sent"
        )
    if not is_reachable(constants.ENDPOINT):
        raise UsageError(
            f"{name}: the hub ({constants.ENDPOINT}) does not answer within {CONNECT_SECONDS:g} s; nothing was sent"
        )
    api = create_client()
    with hub_errors(name):
        try:
            created = str(api.create_repo(name, private=private).repo_id)
        except errors.HfHubHTTPError as error:
            if error.response.status_code == 409 and not update:
                raise UsageError(
                    f"the repository {name} exists: to add a commit to it, --update; earlier versions stay in its "
                    "history"
                ) from error
            if error.response.status_code in (401, 403):
                raise UsageError(f"{name}: the token may not write there: {first_line(error)}") from error
            if error.response.status_code != 409:
                raise
            created = name
        operations = [CommitOperationAdd(file, content) for file, content in publication.files.items()]
        commit = api.create_commit(created, operations, commit_message="Upload a model of potstill")
    return f"{constants.ENDPOINT}/{created}/tree/{commit.oid}"
