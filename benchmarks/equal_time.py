"""Accuracy of the student after equal CPU time: timm's task, torchdistill and potstill, from the same files.

    python -m benchmarks.equal_time --data DIR --teacher FILE --epochs 24 --minutes 10
    python -m benchmarks.equal_time --data DIR --teacher RUN/teacher --recipe photos.yaml --epochs 30 --rates .001 .003

All train the recipe's student on the files in DIR/train, taught by the same weights, at each of the learning rates
with seed 0; the best on val is trained again with further seeds, and test is evaluated once for each student.

timm's ``LogitDistillationTask`` has the weights of the example in its documentation (T = 4, labels 0.3), torchdistill's
``DistillationBox`` those of its CIFAR-10 configuration (T = 4, labels 0.9, weight decay 1e-4).  Their images are read,
cropped and mirrored by torchvision, the teacher sees what the student sees, and the optimizer is the recipe's with a
short warm-up and a cosine over the whole time.  They get what their documentation does not have: weights averaged by
EMA beside the last ones, the better on val of both; and timm the faster of float32 and bf16.  Their time begins with
the first batch: imports, evaluation and the choice of precision cost them nothing.

potstill trains as ``potstill train RECIPE --stage distilled`` does, with an empty cache.  All CPU time of its process
until the last epoch has ended is counted: start, checking and decoding of files, the teacher's accuracy on val, its
outputs, evaluation after each epoch.  ``--epochs`` are its own; a student that took more than the time is an error.

One process after the other, one thread.  Results are kept in ``--output-dir``: an interrupted comparison goes on.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.speed import peers
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

import potstill
from potstill.config.recipe import Recipe, load_recipe
from potstill.experiment import pipeline
from potstill.input_spec import Triple
from potstill.models.factory import load_weights
from potstill.models.foreign_checkpoints import identify_network
from potstill.training.callbacks import SilentObserver

OURS = "potstill"
CONTESTANTS = (OURS, "timm", "torchdistill")
EMA_DECAY = 0.98
WARM_UP = 0.03  # share of the time in which the learning rate rises
CLOCK = time.process_time
Step = Callable[[Tensor, Tensor], None]


def load_teacher(path: str, classes: int, size: int) -> tuple[nn.Module, tuple[Triple, Triple] | None]:
    """Return a trained network, from potstill's folder or somebody's checkpoint, and its mean and deviation."""
    if Path(path).is_dir():
        found = potstill.load(path)
        if list(found.class_names) != sorted(found.class_names):
            sys.exit(f"{path}: the peers' labels are the sorted folders, and its classes are {found.class_names}")
        return found.module, (found.input.mean, found.input.std)
    loaded = load_weights(identify_network(Path(path)), path, classes, size=size)
    return loaded.module.eval(), loaded.normalisation


def read_images(data: Path, recipe: Recipe, normalisation: tuple[Triple, Triple]) -> dict[str, DataLoader]:
    """Return loaders of train (shuffled, cropped, mirrored), val and test, each file decoded when it is needed."""
    size, augment = recipe.data.size, recipe.data.augment
    if augment.crop_scale:
        crop: list[nn.Module] = [transforms.RandomResizedCrop(size, scale=tuple(augment.crop_scale))]
        whole = [transforms.Resize(size), transforms.CenterCrop(size)]
    else:
        padding = round(size * augment.pad_crop)
        whole = [transforms.Resize(size), transforms.CenterCrop(size)]
        crop = [*whole, transforms.RandomCrop(size, padding=padding, padding_mode=augment.pad_mode)]
    end = [transforms.ToTensor(), transforms.Normalize(*normalisation)]
    mirror = [transforms.RandomHorizontalFlip()] if augment.hflip else []
    steps = {"train": [*crop, *mirror, *end], "val": [*whole, *end], "test": [*whole, *end]}
    return {
        split: DataLoader(
            ImageFolder(str(data / split), transforms.Compose(each)),
            batch_size=recipe.training.batch_size,
            shuffle=split == "train",
            drop_last=split == "train",
        )
        for split, each in steps.items()
    }


def _optimizer(recipe: Recipe, rate: float) -> dict[str, Any]:
    given = recipe.training
    if given.optimizer == "sgd":
        kwargs = {"momentum": given.momentum, "nesterov": given.nesterov, "weight_decay": given.weight_decay}
        return {"key": "SGD", "kwargs": {"lr": rate, **kwargs}}
    if given.optimizer == "adamw":
        return {"key": "AdamW", "kwargs": {"lr": rate, "weight_decay": given.weight_decay}}
    sys.exit(f"the peers have no optimizer {given.optimizer!r} here: sgd or adamw")


def timm_steps(student: nn.Module, teacher: nn.Module, loader: DataLoader, made: dict[str, Any]) -> tuple[Step, Any]:
    """Return a training step of timm's task, in the faster precision, and its optimizer."""
    for network in (student, teacher):  # what timm reads of its own networks; images arrive normalised for both
        vars(network).update(pretrained_cfg={"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}, in_chans=3)
        vars(network)["num_classes"] = len(loader.dataset.classes)  # type: ignore[attr-defined]
    task = peers.logit_task(student, teacher, temperature=4.0, alpha=0.3)
    optimizer = getattr(torch.optim, made["key"])(student.parameters(), **made["kwargs"])

    def step(images: Tensor, labels: Tensor, *, bf16: bool) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = task(images, labels)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    task.train()
    teacher.eval()
    images, labels = next(iter(loader))
    state = {name: value.clone() for name, value in student.state_dict().items()}
    taken = {}
    for bf16 in (False, True):
        step(images, labels, bf16=bf16)
        started = CLOCK()
        for _ in range(3):
            step(images, labels, bf16=bf16)
        taken[bf16] = CLOCK() - started
    student.load_state_dict(state)
    optimizer.state.clear()
    faster = taken[True] < taken[False]
    return lambda images, labels: step(images, labels, bf16=faster), optimizer


def torchdistill_steps(
    student: nn.Module, teacher: nn.Module, loader: DataLoader, made: dict[str, Any]
) -> tuple[Step, Any]:
    """Return a training step of torchdistill's box, and its optimizer."""
    made["kwargs"]["weight_decay"] = 1e-4 if made["key"] == "SGD" else made["kwargs"]["weight_decay"]
    box = peers.distillation_box(student, teacher, loader, made, temperature=4.0, alpha=0.9)
    box.pre_epoch_process(epoch=0)

    def step(images: Tensor, labels: Tensor) -> None:
        box.pre_forward_process()
        box.post_forward_process(box.forward_process(images, labels, None))

    return step, box.optimizer


PEERS = {"timm": timm_steps, "torchdistill": torchdistill_steps}


def train_peer(name: str, given: argparse.Namespace, rate: float, seed: int) -> dict[str, Any]:
    """Train a student by a peer for the given CPU time; return accuracies, epochs and CPU-seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    recipe = _recipe(given)
    classes = len([folder for folder in (given.data / "train").iterdir() if folder.is_dir()])
    teacher, own = load_teacher(given.teacher, classes, recipe.data.size)
    normalisation = own or ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    loaders = read_images(given.data, recipe, normalisation)
    student = potstill.create_model(recipe.student.model, classes, size=recipe.data.size)
    teacher.requires_grad_(False).eval()
    step, optimizer = PEERS[name](student, teacher, loaders["train"], _optimizer(recipe, rate))
    average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY), use_buffers=True)

    student.train()
    budget, steps, started = 60 * given.minutes, 0, CLOCK()
    while (used := CLOCK() - started) < budget:
        for images, labels in loaders["train"]:
            share = min((CLOCK() - started) / budget, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = rate * min(share / WARM_UP, 1.0) * (1 + math.cos(math.pi * share)) / 2
            if share == 1.0:
                break
            step(images, labels)
            average.update_parameters(student)
            steps += 1
    val, best = max(((_top1(each, loaders["val"]), each) for each in (student, average.module)), key=lambda one: one[0])
    top1 = {"val": val, "test": _top1(best, loaders["test"])}
    return {**top1, "epochs": steps / len(loaders["train"]), "seconds": used}


@torch.no_grad()
def _top1(network: nn.Module, loader: DataLoader) -> float:
    network.eval()
    right = sum(int((network(images).argmax(1) == labels).sum()) for images, labels in loader)
    return right / len(loader.dataset)  # type: ignore[arg-type]


class Stopwatch(SilentObserver):
    """Notes the CPU time of the process at the end of each epoch, of what it has done since it was started."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def epoch_end(self, record: dict[str, Any]) -> None:
        """Note the time."""
        self.seconds = CLOCK()


def train_ours(given: argparse.Namespace, rate: float, seed: int) -> dict[str, Any]:
    """Train a student by potstill with an empty cache; return accuracies, epochs and CPU-seconds."""
    stopwatch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["POTSTILL_CACHE"] = folder
        settings = (f"training.epochs={given.epochs}", f"training.lr={rate}", "training.threads=1", "data.workers=0")
        recipe = load_recipe(given.recipe, (*given.set, *settings, f"data.source={given.data}", f"seed={seed}"),
                             flags={"--teacher": [given.teacher]})  # fmt: skip
        run = pipeline.run(recipe, output_dir=Path(folder), stages=("distilled",), observer=stopwatch)
        metrics = json.loads((run / "distilled" / "metrics.json").read_text("utf-8"))
    top1 = {split: metrics[split]["top1"] for split in ("val", "test")}
    return {**top1, "epochs": given.epochs, "seconds": stopwatch.seconds}


def _recipe(given: argparse.Namespace) -> Recipe:
    return load_recipe(given.recipe, (*given.set, f"data.source={given.data}"))


def result_of(name: str, given: argparse.Namespace, rate: float, seed: int) -> dict[str, Any]:
    """Return the result of a student, which is trained in a process of its own if it has not been."""
    path = given.output_dir / f"{name}-{rate:g}-{seed}.json"
    settings = {key: str(getattr(given, key)) for key in ("data", "teacher", "recipe", "set", "minutes")}
    settings |= {"own epochs": str(given.epochs)} if name == OURS else {}
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, "-m", "benchmarks.equal_time", *given.arguments, "--one", name, rate, seed]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([str(word) for word in words], stdout=subprocess.PIPE, text=True, env=environment)
        if done.returncode:
            sys.exit(f"{name} ended with exit code {done.returncode}")
        result = json.loads(done.stdout.splitlines()[-1])
        path.write_text(json.dumps(result | {"settings": settings}), "utf-8")
        sys.stderr.write(f"{path.stem}: val {result['val']:.3f} after {result['seconds'] / 60:.1f} CPU-minutes\n")
    result = json.loads(path.read_text("utf-8"))
    if (before := result.get("settings")) != settings:
        sys.exit(f"{path} is the result of other settings, {before}: give another --output-dir, or remove it")
    if result["seconds"] > 61 * given.minutes + 1:
        sys.exit(
            f"{name} took {result['seconds'] / 60:.1f} CPU-minutes of {given.minutes:g} for {result['epochs']:g} "
            f"epochs: give fewer --epochs and remove {path}"
        )
    return result


def compare(given: argparse.Namespace) -> list[str]:
    """Train what is missing; return the lines of the table."""
    chosen, results = {}, {}
    for name in given.contestants:
        first = {rate: result_of(name, given, rate, 0) for rate in given.rates}
        chosen[name] = max(first, key=lambda rate: first[rate]["val"])
    for seed in range(given.seeds):
        for name, rate in chosen.items():
            results[name, seed] = result_of(name, given, rate, seed)
    lines = [
        f"top-1 after {given.minutes:g} CPU-minutes on one thread, {given.seeds} seeds (mean ± standard deviation)",
        "| | learning rate, best of val | epochs | CPU-minutes | val | test |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, rate in chosen.items():
        mine = [results[name, seed] for seed in range(given.seeds)]
        minutes = statistics.mean(each["seconds"] for each in mine) / 60
        cells = [f"{statistics.mean(each['epochs'] for each in mine):.0f}", f"{minutes:.1f}"]
        cells += [_spread([100 * each[split] for each in mine]) for split in ("val", "test")]
        lines.append(f"| {name} | {rate:g} | {' | '.join(cells)} |")
    return lines


def _spread(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def main(arguments: Sequence[str]) -> None:
    """Print the table; with ``--one``, train one student of a peer and print its result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="with train, val and test, a folder for each class")
    parser.add_argument("--teacher", required=True, help="a checkpoint, or a folder with a model of potstill")
    parser.add_argument("--recipe", default="cifar10", help="of the student")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="changes of the recipe")
    parser.add_argument("--epochs", type=int, required=True, help="of potstill, so that they take the time")
    parser.add_argument("--minutes", type=float, default=10.0, help="of CPU time")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.03, 0.1, 0.3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--output-dir", type=Path, default=Path("runs/equal-time"))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    given.arguments = list(arguments)
    if given.one:
        name, rate, seed = given.one
        result = (
            train_ours(given, float(rate), int(seed))
            if name == OURS
            else train_peer(name, given, float(rate), int(seed))
        )
        print(json.dumps(result))
    else:
        print("\n".join(compare(given)))


if __name__ == "__main__":
    main(sys.argv[1:])
