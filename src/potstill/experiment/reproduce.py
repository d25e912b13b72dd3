"""The record of what a run depends on besides its recipe, and reproducing a run from its record.

The record has versions, hardware, source digest and git commit.  Of a git repository only the commit is read, with a
time-out; no code of it is run.  A reproduction takes the same recipe, images and threads, and compares the weights.
"""

import functools
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess  # nosec B404 # git, with a fixed command line, see below
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import potstill
from potstill.code_references import digest_code
from potstill.config import STAGES, sort_stages, stage_role
from potstill.config.recipe import Recipe, dump_recipe
from potstill.data.splits import DataSplits, SplitRow
from potstill.errors import ArtifactError, DataError, UsageError
from potstill.experiment.resume import TEST_EVALUATIONS_KEY, changed_images, recorded_test_evaluations
from potstill.experiment.run_folder import SPLITS, RunFolder
from potstill.io import check_exists, read_bytes, read_checksummed_json, sha256_hex
from potstill.models.model_file import load_model
from potstill.training.devices import Compute

# Timings; what is compared before; history.
_IGNORED_KEYS = {"calibration", "recipe_sha256", "data_fingerprint", "looks"}


@dataclass(frozen=True)
class RunRecord:
    """The record of a finished run, from which it can be repeated."""

    folder: RunFolder
    environment: dict[str, Any]  # its environment.json
    stages: tuple[str, ...]  # which of teacher, baseline, distilled were trained
    models: dict[str, str]  # SHA-256 of each stage's weights


@dataclass(frozen=True)
class ReproductionResult:
    """The comparison of a run with its repetition, byte for byte."""

    lines: list[str]  # one for each model, and differences of the environments
    equal: bool
    guaranteed: bool  # whether they must be equal: on a CPU in the same environment


def read_run_record(path: Path) -> RunRecord:
    """Return the record of a run."""
    check_exists(path, "a run folder, such as runs/NAME")
    folder = RunFolder(path)
    if not folder.known:
        raise ArtifactError(f"{path} is not a run folder: it needs recipe.yaml and environment.json")
    folder.read_recipe()
    if folds := folder.folds:
        raise UsageError(
            f"{path} is a cross-validation: repeat its folds one by one, --reproduce {folds[0].path}, or start it "
            f"again with another name: potstill run {folder.recipe} --name {path.resolve().name[:60]}-2"
        )
    if not folder.results.exists():
        raise ArtifactError(f"{path} is not finished; continue it with --resume first")
    results = folder.read_results()
    planned = results["planned"]
    for name, entry in (results["stages"] | (results.get("repeats") or {})).items():
        if lengths := (entry.get("training") or {}).get("extended_from"):
            raise UsageError(
                f"{path}: the {name} was extended after {lengths[-1]} epochs (--resume), which --reproduce does not "
                "repeat: train from its recipe.yaml instead"
            )
        if entry.get("reused_from"):
            raise UsageError(
                f"{path}: the {name} was taken from {entry['reused_from']} (--baseline): reproduce that run, or train "
                "from this recipe.yaml"
            )
    _check_splits(folder)
    for stage in planned:
        load_model(folder.stage(stage))  # an error if it is damaged
    roles = {"teacher" if stage_role(stage) == "teacher" else stage for stage in planned}
    stages = tuple(part for part in STAGES if part in roles)
    return RunRecord(folder, folder.read_environment(), stages, _weights(folder, planned))


def check_other_folder(record: RunRecord, output_dir: Path, name: str) -> None:
    """Check that a run is not repeated in its own folder."""
    if (output_dir / name).resolve() == record.folder.path.resolve():
        raise UsageError(
            f"--reproduce compares with {record.folder.path}, so it needs another folder; give another --name"
        )


def check_same_images(record: RunRecord, fingerprint: str, rows: Sequence[SplitRow]) -> None:
    """Check that the data are those of the recorded run."""
    if record.environment.get("data_fingerprint") == fingerprint:
        return
    raise DataError(
        f"--reproduce needs the images of {record.folder.path}, and they have changed:\n"
        + "\n".join(changed_images(record.folder, rows))
        + "\nPut the former images back, or start a new run from its recipe.yaml"
    )


def compare(record: RunRecord, repeated: RunFolder) -> ReproductionResult:
    """Compare two runs of one recipe, model by model."""
    results = repeated.read_results()
    before, after = (each["stages"] | (each.get("repeats") or {}) for each in (record.folder.read_results(), results))
    weights = _weights(repeated, results["planned"])
    lines, equal = [], True
    for stage in sort_stages(record.models):
        same = weights.get(stage) == record.models[stage]
        equal &= same
        if same:
            lines.append(f"{stage}: the same weights, byte for byte")
        else:
            difference = largest_weight_difference(record.folder.stage(stage), repeated.stage(stage))
            top1 = [found[stage]["test"].get("top1") for found in (before, after)]
            changed = "" if None in top1 else f"top-1 on test {100 * (top1[1] - top1[0]):+.2f} points; "
            lines.append(
                f"{stage}: other weights, by {difference:.3g} at most; {changed}"
                + largest_metric_difference(before[stage], after[stage])
            )
    changes = environment_differences(record.environment, repeated.read_environment())
    on_cpu = record.environment.get("device") == "cpu"
    if not equal:
        lines += [f"differs: {change}" for change in changes]
        if not on_cpu:
            lines.append("equal weights are guaranteed on a CPU only")
        elif not changes:
            lines.append("the recorded environments are equal: the weights should have been equal")
    return ReproductionResult(lines, equal, guaranteed=on_cpu and not changes)


def environment_differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the differences of two environments, as ``key: was, is``, but commits that change nothing."""
    found = []
    source = before.get("source_sha256")
    same_source = source is not None and source == after.get("source_sha256")
    for key in sorted(before.keys() | after.keys()):
        was, now, path = before.get(key), after.get(key), f"{prefix}{key}"
        if was == now or path in _IGNORED_KEYS or path == "git.here" or (path == "git" and same_source):
            continue
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            found += environment_differences(was, now, f"{path}.")
        else:
            was, now = ("nothing" if value is None else value for value in (was, now))
            found.append(f"{path}: was {was}, is {now}")
    return found


def largest_metric_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Return a text on the metric of a stage that differs most between two runs.

    Example:
        >>> largest_metric_difference({"test": {"top1": 0.5, "nll": 1.0}}, {"test": {"top1": 0.5, "nll": 1.25}})
        'of all figures nll on test differs most, by 0.25'
    """
    found = [
        (abs(float(after[split][key]) - float(value)), f"{key} on {split}")
        for split in SPLITS
        if split in before and split in after
        for key, value in before[split].items()
        if key != "count" and isinstance(value, (int, float)) and isinstance(after[split].get(key), (int, float))
    ]
    difference, name = max(found, default=(0.0, ""))
    return f"of all figures {name} differs most, by {difference:.3g}" if difference else "all figures are the same"


def largest_weight_difference(first: Path, second: Path) -> float:
    """Return the largest absolute difference of two models' weights; infinite if shapes differ."""
    one, two = (load_model(folder).module.state_dict() for folder in (first, second))
    if {name: value.shape for name, value in one.items()} != {name: value.shape for name, value in two.items()}:
        return float("inf")
    return max(float((one[name].double() - two[name].double()).abs().max()) for name in one if one[name].numel())


def _check_splits(folder: RunFolder) -> None:
    path = folder.path / "splits.csv"
    if sha256_hex(read_bytes(path)) != folder.read_results()["files"].get(path.name):
        raise ArtifactError(f"{path} has changed since the run wrote it: its SHA-256 differs")


def _weights(folder: RunFolder, stages: Sequence[str]) -> dict[str, str]:
    return {stage: read_checksummed_json(folder.stage(stage) / "model.json")["sha256"] for stage in stages}


_GIT_TIMEOUT = 2.0


def git_state(folder: Path) -> dict[str, str | bool] | None:
    """Return ``{"commit": 40 hex digits, "changed": bool}``; None without git or repository, or after two seconds."""
    commit = _run_git(folder, "rev-parse", "--verify", "HEAD")
    status = _run_git(folder, "status", "--porcelain", "--untracked-files=no")
    if commit is None or status is None:
        return None
    return {"commit": commit.strip(), "changed": bool(status.strip())}


def _run_git(folder: Path, *arguments: str) -> str | None:
    program = shutil.which("git")
    if program is None or not folder.is_dir():
        return None
    # A repository's settings may name programs that git starts: a file monitor, hooks.
    nothing = ("-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}")
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(  # nosec B603 # no shell, no user input but the folder's name
            [program, "-C", str(folder), *nothing, *arguments],
            capture_output=True,
            timeout=_GIT_TIMEOUT,
            env=environment,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace")


_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "scikit-learn", "safetensors")


def describe_environment(recipe: Recipe, recipe_text: str, fingerprint: str, compute: Compute) -> dict[str, Any]:
    """Return versions, hardware, threads, device, seeds, hashes of recipe and data; no user or host names."""
    device = compute.device
    return {
        "potstill": potstill.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processes": compute.processes.count,
        "precision": compute.precision,
        "channels_last": compute.channels_last,
        "byte_order": sys.byteorder,
        "seeds": {
            "seed": recipe.seed,
            "split_seed": recipe.data.split_seed,
            "augmentation_seed": recipe.augmentation_seed,
        },
        "recipe_sha256": hashlib.sha256(recipe_text.encode()).hexdigest(),
        "data_fingerprint": fingerprint,
        "source_sha256": _source_digest(),
        "code": digest_code(recipe.model_dump(mode="json")),
        "git": {"here": git_state(Path.cwd()), "potstill": git_state(Path(potstill.__file__).parent)},
    }


@functools.cache
def _source_digest() -> str | None:
    """Return the SHA-256 of potstill's modules, including uncommitted changes; None if they are no files."""
    folder, sums = Path(potstill.__file__).parent, hashlib.sha256()
    try:
        for path in sorted(folder.rglob("*.py")):
            sums.update(
                path.relative_to(folder).as_posix().encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest()
            )
    except OSError:
        return None
    return sums.hexdigest()


@functools.cache
def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.processor()
    return platform.processor()


def write_beginning(
    folder: RunFolder,
    recipe: Recipe,
    data: DataSplits,
    compute: Compute,
    facts: Mapping[str, Any],
    replaced: list[str],
    *,
    resume: bool,
) -> None:
    """Write what a run, or a cross-validation, begins with: recipe, environment, splits and files left out."""
    text = dump_recipe(recipe)
    before = {}
    if resume:
        kept = {key: value for key, value in folder.read_environment().items() if key == "code"}  # as it was started
        before = {TEST_EVALUATIONS_KEY: recorded_test_evaluations(folder), **kept}
    chosen = {"replaced_networks": replaced} if replaced else {}
    folder.write_recipe(text)
    folder.write_environment(
        {**describe_environment(recipe, text, data.fingerprint, compute), **facts, **before, **chosen}
    )
    folder.write_splits(data.as_rows())
    folder.write_skipped(data.all_skipped)
