"""Commands that train and report: run, train, report; run and train also in the processes of torchrun."""

import enum
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from potstill.code_references import find_code, is_code_reference
from potstill.console import Progress, print_next_command, print_report_path, print_section
from potstill.data.concurrency import usable_cores
from potstill.distributed import is_torchrun_launched, restart_count
from potstill.errors import RESUME, RemoteFailure, UsageError, WorkerError, advising
from potstill.training.callbacks import SignalHandler

if TYPE_CHECKING:
    from potstill.config.recipe import Recipe

DISTRIBUTED_COMMANDS = ("run", "train")


def is_first_process() -> bool:
    """Return whether this is the only process or that of rank 0, which prints."""
    return not is_torchrun_launched() or os.environ["RANK"] == "0"


def rank_prefix() -> str:
    """Return the prefix of messages: the rank, in processes of torchrun other than the first."""
    return "" if is_first_process() else f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}: "


_FIRST_SPEAKS = 10.0  # seconds in which the first process starts and writes its message


def check_torchrun_command(arguments: list[str]) -> None:
    """Raise an error if torchrun starts a command that does not train."""
    if is_torchrun_launched() and arguments and arguments[0] not in DISTRIBUTED_COMMANDS:
        if not is_first_process():
            time.sleep(_FIRST_SPEAKS)  # torchrun ends all processes as soon as one has ended
            raise RemoteFailure(UsageError.exit_code)
        raise UsageError(
            f"torchrun has started `potstill {arguments[0]}` {os.environ['WORLD_SIZE']} times; "
            f"only {' and '.join(DISTRIBUTED_COMMANDS)} are distributed: start it without torchrun"
        )


def processes_to_start(gpus: str | None, device: str | None, settings: list[str] | None) -> int:
    """Return how many processes ``--gpus`` starts; 1: this one trains by itself.

    Args:
        gpus: value of ``--gpus``: a number or "all"; None: not given.
        device: value of ``--device``; with cpu, the processes compute on the CPU.
        settings: values of ``--set``, of which ``training.device`` counts too.
    """
    if gpus is None or is_torchrun_launched():  # the processes that were started have the same arguments
        return 1
    if gpus != "all" and not (gpus.isdecimal() and int(gpus) >= 1):
        raise UsageError(f"--gpus {gpus!r}: give a number of at least 1, or all")
    if device == "cpu" or any(_CPU_SETTING.fullmatch(text) for text in settings or ()):
        if gpus == "all":
            raise UsageError("--gpus all counts GPUs: with --device cpu, give the number of processes")
        return int(gpus)
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if there == 0:
        raise UsageError(
            f"--gpus {gpus}: PyTorch sees no GPU here (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')}, "
            f"CUDA {torch.version.cuda}): leave --gpus out; --gpus N --device cpu starts N processes on the CPU"
        )
    if gpus != "all" and int(gpus) > there:
        raise UsageError(f"--gpus {gpus}: this machine has {there}; give at most as many, or all")
    return there if gpus == "all" else int(gpus)


def start_processes(count: int, arguments: Sequence[str]) -> int:
    """Run ``potstill ARGUMENTS`` in ``count`` processes of this machine by torchrun's launcher; return the exit code.

    The code is that of the first failure; a process that was killed counts as lost (7).
    """
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes print their own errors
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // count)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=f"potstill-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # any free port
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "potstill", *arguments)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        return next((code for code in codes if code > 0), WorkerError.exit_code)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


@contextmanager
def distributed_arguments() -> Iterator[dict[str, Any]]:
    """Join the process group, if torchrun started this process.

    Yields:
        Keyword arguments for the pipeline.
    """
    if not is_torchrun_launched():  # import no torch, which takes seconds, to find a mistake in a recipe
        yield {}
        return
    # Before torch is imported.  Otherwise each process warns that all parameters are used, as intended.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from potstill.distributed.group import process_group

    with process_group() as processes:
        yield {"processes": processes}


def resume_after_restart(folder: dict[str, Any], name: str) -> None:
    """Set ``resume`` if torchrun restarts this run after the loss of a process."""
    if restart_count() == 0:
        return
    from potstill.experiment.run_folder import RunFolder

    if RunFolder(Path(folder["output_dir"]) / name).known:
        folder |= {"resume": True, "overwrite": False}


INTERNAL_ERROR = 1
_CPU_SETTING = re.compile(r"\s*training\.device\s*=\s*cpu\s*")
# Settings that made a teacher, which its folder holds; without a head it has no classes, and must be declared so.
_MADE_TEACHER = re.compile(r"\s*teacher\s*[.=](?!\s*(\d+\.)?head\s*=\s*none\s*$)")

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A name from `potstill recipes`, or a YAML file.")]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="Images: a folder, a manifest (.csv, .tsv, .txt, .jsonl), .tar or .parquet files, "
        "hf://datasets/USER/NAME, the name of a data set, or code, path/file.py:callable.",
    ),
]
NoLabels = Annotated[
    bool | None,
    typer.Option(
        "--no-labels",
        help="The images of --data have no labels: the classes are those of a ready --teacher, and the method's label "
        "weight is 0.",
    ),
]
LabeledTest = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="data.labeled_test: class folders of test images, with --no-labels."),
]
Unlabeled = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="data.unlabeled: a folder of further training images without labels."),
]
Teacher = Annotated[
    list[str] | None,
    typer.Option(
        metavar="M",
        help="ARCH, ARCH@pretrained, ARCH@WEIGHTS, a weight file, a run or model folder, or hf-hub:USER/NAME; ARCH may "
        "be code, path/file.py:callable. Repeat for several teachers.",
    ),
]
Student = Annotated[
    str | None,
    typer.Option(metavar="M", help="ARCH, ARCH@pretrained, ARCH@WEIGHTS, a run or model folder, or hf-hub:USER/NAME."),
]
Previous = Annotated[
    str | None,
    typer.Option(
        metavar="RUN",
        help="The model in use, a run or model folder: train the new student to keep what it has right, and count what "
        "the new one gets wrong.",
    ),
]
Name = Annotated[str | None, typer.Option(metavar="NAME", help="Name of the run folder.  [default: the recipe's]")]
Root = Annotated[Path, typer.Option("--output-dir", metavar="DIR", help="Folder of the run folders.")]
Epochs = Annotated[int | None, typer.Option(metavar="N", help="training.epochs: passes over the training images.")]
Lr = Annotated[float | None, typer.Option(metavar="LR", help="training.lr: learning rate after warm-up.")]
BatchSize = Annotated[int | None, typer.Option(metavar="N", help="training.batch_size: images per step.")]
ImageSize = Annotated[int | None, typer.Option(metavar="PIXELS", help="data.size: height and width of the images.")]
Gpus = Annotated[
    str | None,
    typer.Option(
        "--gpus",
        metavar="N",
        help="Train in N processes, one for each GPU of this machine, or all; with --device cpu, N on the CPU.",
    ),
]
Device = Annotated[str | None, typer.Option(metavar="D", help="training.device: auto, cpu, cuda, cuda:1 or mps.")]
MethodName = Annotated[
    str | None, typer.Option(metavar="M", help="method.name: distillation method; see `potstill methods`.")
]
Temperature = Annotated[float | None, typer.Option(metavar="T", help="method.temperature: softmax temperature.")]
Alpha = Annotated[float | None, typer.Option(metavar="A", help="method.alpha: weight of the label term in kd.")]
Seed = Annotated[int | None, typer.Option(help="Seed of initialisation, data order and augmentation.")]
Seeds = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help=("Train baseline and distilled with N seeds, the teacher once; 5 suffice for a significance test."),
    ),
]
Folds = Annotated[
    int | None,
    typer.Option(
        metavar="K",
        help=("data.folds: cross-validation, K runs that each test another K-th of all images; 5 is usual."),
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change any setting of the recipe; may be repeated."),
]
SkipBad = Annotated[
    bool | None,
    typer.Option(
        "--skip-bad",
        help=("Leave out files that cannot be read and classes that are too small; list them in skipped.csv."),
    ),
]
AllowCode = Annotated[
    bool,
    typer.Option("--allow-code", help="Run code that the recipe file names: package.module:Name, path/file.py:Name."),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the run of this name; more seeds or epochs extend it.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the run of this name first.")]
Baseline = Annotated[
    Path | None,
    typer.Option(metavar="RUN", help="Use the baseline of this run, if it was trained in the same way."),
]
Reproduce = Annotated[
    Path | None,
    typer.Option("--reproduce", metavar="RUN", help="In place of RECIPE: repeat a run, and compare the weights."),
]


class Stage(enum.StrEnum):
    """Stages that `train` can train."""

    teacher = "teacher"
    baseline = "baseline"
    distilled = "distilled"


_RECIPE_FLAGS = (
    "data", "unlabeled", "no_labels", "labeled_test", "teacher", "student", "previous", "epochs", "lr",
    "batch_size", "image_size", "method", "temperature", "alpha", "device", "seed", "seeds", "folds", "skip_bad",
)  # fmt: skip


def recipe_flags(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags of a command that set keys of the recipe, with their values; None: not given.

    Args:
        arguments: ``locals()`` of the command's function, before any other statement.
    """
    given = {name: arguments[name] for name in _RECIPE_FLAGS if name in arguments}
    return {f"--{name.replace('_', '-')}": None if value == [] else value for name, value in given.items()}


def run(
    context: typer.Context,
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="A name from `potstill recipes`, or a YAML file.")
    ] = None,
    data: Data = None,
    unlabeled: Unlabeled = None,
    no_labels: NoLabels = None,
    labeled_test: LabeledTest = None,
    skip_bad: SkipBad = None,
    teacher: Teacher = None,
    student: Student = None,
    previous: Previous = None,
    epochs: Epochs = None,
    lr: Lr = None,
    batch_size: BatchSize = None,
    image_size: ImageSize = None,
    method: MethodName = None,
    temperature: Temperature = None,
    alpha: Alpha = None,
    device: Device = None,
    gpus: Gpus = None,
    settings: Settings = None,
    name: Name = None,
    output_dir: Root = Path("runs"),
    seed: Seed = None,
    seeds: Seeds = None,
    folds: Folds = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    allow_code: AllowCode = False,
    baseline: Baseline = None,
    reproduce: Reproduce = None,
) -> None:
    """Train teacher, baseline and distilled student, and write a report."""
    flags = recipe_flags(locals())
    if (count := processes_to_start(gpus, device, settings)) > 1:
        raise typer.Exit(start_processes(count, context.obj))
    if reproduce is not None:
        given = {"RECIPE": recipe, "--set": settings, "--baseline": baseline, **flags}
        _reproduce(reproduce, given, allow_code, output_dir=output_dir, name=name, resume=resume, overwrite=overwrite)
        return
    if recipe is None:
        raise UsageError("give a RECIPE: a name from `potstill recipes`, or a YAML file; or --reproduce RUN")
    flags["--allow-code"] = allow_code
    folder = _run_pipeline(
        recipe,
        settings,
        flags,
        output_dir=output_dir,
        name=name,
        resume=resume,
        overwrite=overwrite,
        stages=None,
        baseline=baseline,
    )
    _report_results(folder, next_command=["potstill", "predict", str(folder), "IMAGE"])


def train(
    context: typer.Context,
    recipe: RecipeName,
    stage: Annotated[
        Stage,
        typer.Option(
            help="The teacher; the student on labels alone; or the student distilled from a trained --teacher."
        ),
    ],
    data: Data = None,
    unlabeled: Unlabeled = None,
    no_labels: NoLabels = None,
    labeled_test: LabeledTest = None,
    skip_bad: SkipBad = None,
    teacher: Teacher = None,
    student: Student = None,
    previous: Previous = None,
    epochs: Epochs = None,
    lr: Lr = None,
    batch_size: BatchSize = None,
    image_size: ImageSize = None,
    method: MethodName = None,
    temperature: Temperature = None,
    alpha: Alpha = None,
    device: Device = None,
    gpus: Gpus = None,
    settings: Settings = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the run folder.  [default: RECIPE-STAGE]")
    ] = None,
    output_dir: Root = Path("runs"),
    seed: Seed = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    allow_code: AllowCode = False,
) -> None:
    """Train one stage alone: teacher, baseline or distilled student."""
    flags = recipe_flags(locals())
    if (count := processes_to_start(gpus, device, settings)) > 1:
        raise typer.Exit(start_processes(count, context.obj))
    flags["--allow-code"] = allow_code
    folder = _run_pipeline(
        recipe,
        settings,
        flags,
        output_dir=output_dir,
        name=name,
        resume=resume,
        overwrite=overwrite,
        stages=(stage.value,),
    )
    if stage is Stage.distilled:
        _report_results(folder, next_command=["potstill", "predict", str(folder), "IMAGE"])
        return
    next_flags: dict[str, Any] = flags | {"--teacher": teacher}
    if stage is Stage.teacher:
        trained = sorted(folder.glob("teacher*/model.json"))
        next_flags["--teacher"] = [str(folder)] if len(trained) < 2 else [str(model.parent) for model in trained]
        settings = [text for text in settings or [] if not _MADE_TEACHER.match(text)]
    else:
        next_flags["--baseline"] = str(folder)
    next_flags["--set"] = settings
    next_flags["--output-dir"] = None if output_dir == Path("runs") else str(output_dir)
    next_flags["--name"] = None if name is None else f"{name[:60]}-run"
    _report_results(folder, next_command=["potstill", "run", recipe, *to_arguments(next_flags)])


def to_arguments(flags: Mapping[str, Any]) -> list[str]:
    """Return the arguments of a command line; flags that are None or False are left out, True has no value."""
    arguments: list[str] = []
    for flag, value in flags.items():
        for item in value if isinstance(value, list) else [value]:
            if item is not None and item is not False:
                arguments += [flag] if item is True else [flag, str(item)]
    return arguments


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders; several are compared.")],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Page of the comparison.  [default: comparison.html]")
    ] = None,
) -> None:
    """Write a run's report again, or compare several runs."""
    from potstill.cli.results import print_results

    if len(runs) > 1:
        from potstill.report.compare import compare

        print_report_path(compare(runs, output or Path("comparison.html")))
        return
    if output is not None:
        raise UsageError(
            f"--output is the page of a comparison of several runs: leave it out, the page of one run is "
            f"{runs[0] / 'report.html'}"
        )
    from potstill.experiment.run_folder import RunFolder
    from potstill.report.render import render

    page = render(runs[0])
    print_results(RunFolder(runs[0]).read_results(), page)


def _reproduce(run: Path, given: dict[str, Any], allow_code: bool, *, name: str | None, **folder: Any) -> None:
    from potstill.experiment.reproduce import check_other_folder, compare, read_run_record

    if other := [flag for flag, value in given.items() if value not in (None, [])]:
        raise UsageError(
            f"--reproduce repeats {run} without changes: leave {', '.join(other)} out.\n"
            "Allowed with it: --name, --output-dir, --resume and --overwrite"
        )
    record = read_run_record(run)
    name = f"{run.resolve().name[:53]}-reproduced" if name is None else name  # 64 characters are allowed
    check_other_folder(record, folder["output_dir"], name)
    repeated = _run_pipeline(
        str(record.folder.recipe),
        None,
        {"--allow-code": allow_code},
        name=name,
        stages=record.stages,
        reproduce=record,
        **folder,
    )
    if not is_first_process():
        return
    _report_results(repeated, next_command=["potstill", "report", str(run), str(repeated)])

    from potstill.experiment.run_folder import RunFolder

    outcome = compare(record, RunFolder(repeated))
    print_section(f"reproduction of {run}", outcome.lines)
    if not outcome.equal and outcome.guaranteed:
        raise typer.Exit(INTERNAL_ERROR)


def _run_pipeline(
    source: str,
    settings: list[str] | None,
    flags: dict[str, Any],
    *,
    stages: tuple[str, ...] | None,
    name: str | None,
    **folder: Any,
) -> Path:
    from potstill.config.recipe import load_recipe

    with distributed_arguments() as processes:
        recipe = load_recipe(source, settings or (), flags=flags)

        # These imports load torch, which takes seconds.
        from potstill.experiment.pipeline import run as run_pipeline
        from potstill.experiment.run_folder import RunFolder

        if stages is not None:
            folder["stages"] = stages
            name = f"{recipe.name}-{stages[0]}" if name is None else name
        resume_after_restart(folder, recipe.name if name is None else name)
        started = RunFolder(folder["output_dir"] / (recipe.name if name is None else name))
        with (
            advising(RESUME, lambda: started.known),
            SignalHandler() as stopping,
            Progress() if is_first_process() else nullcontext() as progress,
        ):
            if progress is not None:
                for line in _overridden_flags(recipe, flags, stages):
                    progress.note(line)
            return run_pipeline(recipe, name=name, observer=progress, stopping=stopping, **processes, **folder)


def _overridden_flags(recipe: "Recipe", flags: Mapping[str, Any], stages: tuple[str, ...] | None) -> Iterator[str]:
    """Yield a line for each flag of the training that a teacher to be trained has a setting of its own for."""
    from potstill.config.overrides import SETTING_FLAGS
    from potstill.config.settings_errors import dotted_key

    if stages is not None and "teacher" not in stages:
        return
    several = len(recipe.teacher_list) > 1
    for at, teacher in enumerate(recipe.teacher_list):
        if teacher.weights is not None and teacher.head not in ("finetune", "random"):
            continue  # not trained
        for flag, path in SETTING_FLAGS.items():
            given, own = flags.get(flag), teacher.training.get(str(path[-1])) if path[0] == "training" else None
            if given is not None and own is not None and own != given:
                key = dotted_key((f"teacher.{at}" if several else "teacher", *path))
                yield f"{flag} {given} is for the students: {key} stays {own}; --set {key}={given} changes it too"


def _report_results(folder: Path, next_command: list[str]) -> None:
    if not is_first_process():
        return
    from potstill.cli.results import print_results
    from potstill.config.yaml import parse_yaml
    from potstill.experiment.run_folder import RunFolder
    from potstill.report.render import render

    page: Path | None = None
    try:
        page = render(folder)
    finally:
        # Print the results even if a figure of the report fails.
        results = RunFolder(folder).read_results()
        print_results(results, page)
    if stopped := results.get("not_distilled"):
        with Progress() as progress:
            progress.warn(str(stopped))
    if results.get("folds") and results["stages"].get("distilled"):
        # A cross-validation measures the recipe; its models have not seen all images.
        name = f"{folder.resolve().name[:60]}-all"
        root = [] if folder.parent == Path("runs") else ["--output-dir", str(folder.parent)]
        recipe = folder / "recipe.yaml"
        code = (
            ["--allow-code"] if any(find_code(parse_yaml(RunFolder(folder).read_recipe(), str(recipe)).value)) else []
        )
        next_command = ["potstill", "run", str(recipe), "--set", "data.fold=all", "--name", name, *root, *code]
    if (results.get("without_labels") or {}).get("classes") is False:
        next_command = ["potstill", "run", "RECIPE", "--data", "LABELED", "--student", str(folder)]
    stages = (results["stages"].get(name) for name in ("distilled", "baseline", "teacher"))
    model = next((stage.get("model") or {} for stage in stages if stage), {})  # the one that predicts
    if next_command[1] == "predict" and is_code_reference(model.get("architecture", "")):
        next_command = [*next_command, "--allow-code"]
    print_next_command(next_command)
