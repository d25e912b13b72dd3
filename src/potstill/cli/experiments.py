"""Verbs that train and report: run, train, report."""

import enum
import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from potstill.cli.several import first, go_on_where_restarted, together
from potstill.errors import UsageError

OUR_BUG = 1
_TEACHER_WEIGHTS = re.compile(r"\s*teacher\.(\d+\.)?weights\s*=")

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A name from `potstill recipes`, or a YAML file.")]
Data = Annotated[
    str | None, typer.Option(metavar="DIR", help="Images: a folder, a .csv or .jsonl manifest, or a data set's name.")
]
Teacher = Annotated[
    list[str] | None,
    typer.Option(
        metavar="M",
        help="ARCH, ARCH@pretrained, ARCH@WEIGHTS, or a run or model folder to start from; repeat it for several.",
    ),
]
Student = Annotated[
    str | None, typer.Option(metavar="M", help="ARCH, ARCH@pretrained, ARCH@WEIGHTS, or a run or model folder.")
]
Name = Annotated[str | None, typer.Option(metavar="NAME", help="Name of the run folder; the recipe's where not given.")]
Root = Annotated[Path, typer.Option(metavar="DIR", help="Folder that holds the run folders.")]
Seed = Annotated[int | None, typer.Option(help="Of initialisation, order and augmentation.")]
Seeds = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Train baseline and distilled with N seeds, the teacher once; 5 tell gain from chance."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change any setting of the recipe; may be repeated."),
]
SkipBad = Annotated[
    bool | None,
    typer.Option(
        "--skip-bad", help="Leave out files that cannot be read and classes that are too small; list them in the run."
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run of this name; more --seeds or training.epochs extend it.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the run of this name first.")]
Baseline = Annotated[
    Path | None,
    typer.Option(metavar="RUN", help="Take the baseline of this run, if it was trained in the same way."),
]
Replay = Annotated[
    Path | None,
    typer.Option(metavar="RUN", help="In place of RECIPE: repeat a run, and say whether the weights are the same."),
]


class Stage(enum.StrEnum):
    """Stages that can be trained alone."""

    teacher = "teacher"
    baseline = "baseline"
    distilled = "distilled"


def run(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="A name from `potstill recipes`, or a YAML file.")
    ] = None,
    data: Data = None,
    skip_bad: SkipBad = None,
    teacher: Teacher = None,
    student: Student = None,
    settings: Settings = None,
    name: Name = None,
    root: Root = Path("runs"),
    seed: Seed = None,
    seeds: Seeds = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    baseline: Baseline = None,
    replay: Replay = None,
) -> None:
    """Train teacher, baseline and distilled student, and report."""
    flags = {"--data": data, "--teacher": teacher or None, "--student": student, "--seed": seed, "--seeds": seeds}
    flags["--skip-bad"] = skip_bad
    if replay is not None:
        given = {"RECIPE": recipe, "--set": settings, "--baseline": baseline, **flags}
        _replay(replay, given, root=root, name=name, resume=resume, overwrite=overwrite)
        return
    if recipe is None:
        raise UsageError("give a RECIPE: a name from `potstill recipes`, or a YAML file; or --replay RUN")
    others: dict[str, Any] = {"baseline": baseline} if baseline is not None else {}
    folder = _pipeline(
        recipe, settings, flags, root=root, name=name, resume=resume, overwrite=overwrite, stages=None, **others
    )
    _finish(folder, next_command=["potstill", "predict", str(folder), "IMAGE"])


def train(
    recipe: RecipeName,
    stage: Annotated[
        Stage, typer.Option(help="The teacher; the student on labels alone; or distilled from a ready --teacher.")
    ],
    data: Data = None,
    skip_bad: SkipBad = None,
    teacher: Teacher = None,
    student: Student = None,
    settings: Settings = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the run folder; RECIPE-STAGE where not given.")
    ] = None,
    root: Root = Path("runs"),
    seed: Seed = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Train one stage alone: teacher, baseline or distilled student."""
    flags = {"--data": data, "--teacher": teacher or None, "--student": student, "--seed": seed}
    flags["--skip-bad"] = skip_bad
    folder = _pipeline(
        recipe, settings, flags, root=root, name=name, resume=resume, overwrite=overwrite, stages=(stage.value,)
    )
    if stage is Stage.distilled:
        _finish(folder, next_command=["potstill", "predict", str(folder), "IMAGE"])
        return
    again: dict[str, Any] = flags | {"--teacher": teacher}
    if stage is Stage.teacher:
        trained = sorted(folder.glob("teacher*/model.json"))
        again["--teacher"] = [str(folder)] if len(trained) < 2 else [str(model.parent) for model in trained]
        settings = [text for text in settings or [] if not _TEACHER_WEIGHTS.match(text)]  # --teacher names them now
    else:
        again["--baseline"] = str(folder)
    again["--set"] = settings
    again["--root"] = None if root == Path("runs") else str(root)
    again["--name"] = None if name is None else f"{name[:60]}-run"
    _finish(folder, next_command=["potstill", "run", recipe, *_as_arguments(again)])


def _as_arguments(flags: Mapping[str, Any]) -> list[str]:
    """Flags with their values as a command line has them: those without a value left out, switches alone."""
    values = {flag: value if isinstance(value, list) else [value] for flag, value in flags.items()}
    words = [(flag,) if one is True else (flag, str(one)) for flag, each in values.items() for one in each
             if one is not None and one is not False]  # fmt: skip
    return [part for pair in words for part in pair]


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders; several are compared.")],
    output: Annotated[
        Path, typer.Option(metavar="FILE", help="Page of the comparison; a single run's page is in its folder.")
    ] = Path("comparison.html"),
) -> None:
    """Draw a run's report again, or compare several runs."""
    from potstill.console import say_page, say_results

    if len(runs) > 1:
        from potstill.report.compare import compare

        say_page(compare(runs, output))
        return
    from potstill.experiments.run_folder import RunFolder
    from potstill.report.render import render

    page = render(runs[0])
    say_results(RunFolder(runs[0]).read_results(), page)


def _replay(run: Path, given: dict[str, Any], *, name: str | None, **folder: Any) -> None:
    from potstill.experiments.replay import compare, read_record, refuse_itself

    if other := [flag for flag, value in given.items() if value not in (None, [])]:
        raise UsageError(
            f"--replay repeats {run} as it was; {', '.join(other)} would make it another run.\n"
            "Beside it there may be --name, --root, --resume and --overwrite"
        )
    record = read_record(run)
    name = f"{run.resolve().name[:57]}-replay" if name is None else name  # 64 characters are allowed
    refuse_itself(record, folder["root"], name)
    repeated = _pipeline(str(record.folder.recipe), None, {}, name=name, stages=record.stages, replay=record, **folder)
    if not first():
        return
    _finish(repeated, next_command=["potstill", "report", str(run), str(repeated)])

    from potstill.console import say_lines
    from potstill.experiments.run_folder import RunFolder

    outcome = compare(record, RunFolder(repeated))
    say_lines(f"replay of {run}", outcome.lines)
    if not outcome.equal and outcome.promised:
        raise typer.Exit(OUR_BUG)


def _pipeline(
    source: str,
    settings: list[str] | None,
    flags: dict[str, Any],
    *,
    stages: tuple[str, ...] | None,
    name: str | None,
    **folder: Any,
) -> Path:
    from potstill.experiments.recipe import load_recipe

    with together() as processes:
        recipe = load_recipe(source, settings or (), flags=flags)

        # From here on torch is loaded, which takes seconds.
        from potstill.console import Progress
        from potstill.experiments.pipeline import run as carry_out
        from potstill.training.stopping import Stopping

        if stages is not None:
            folder["stages"] = stages
            name = f"{recipe.name}-{stages[0]}" if name is None else name
        go_on_where_restarted(folder, recipe.name if name is None else name)
        with Stopping() as stopping, Progress() if first() else nullcontext() as progress:
            return carry_out(recipe, name=name, observer=progress, stopping=stopping, **processes, **folder)


def _finish(folder: Path, next_command: list[str]) -> None:
    if not first():  # of several processes one reports
        return
    from potstill.console import Progress, say_next, say_results
    from potstill.experiments.run_folder import RunFolder
    from potstill.report.render import render
    from potstill.tracking.tracked import send_files

    page: Path | None = None
    try:
        page = render(folder)
    finally:
        # Hours of training were not for nothing where only a picture failed.
        say_results(RunFolder(folder).read_results(), page)
    with Progress() as progress:
        send_files(folder, progress)
    say_next(next_command)
