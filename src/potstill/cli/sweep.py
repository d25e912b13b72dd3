"""The command `sweep`, which searches for settings."""

from pathlib import Path
from typing import Annotated, Any

import typer

from potstill.cli.run import (
    AllowCode,
    Data,
    LabeledTest,
    NoLabels,
    RecipeName,
    Root,
    Seed,
    Settings,
    SkipBad,
    Student,
    Teacher,
    Unlabeled,
    to_arguments,
)
from potstill.errors import UsageError

_MAX_NAME = 64  # characters of a folder's name


def sweep(
    recipe: RecipeName,
    search: Annotated[
        list[str] | None,
        typer.Option(
            "--search",
            metavar="KEY=VALUES",
            help="Setting to search: a,b,c or low..high or low..high:log; may be repeated.",
        ),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Number of trials.  [default: 20, or all combinations of a grid]"),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(metavar="S", min=0, help="Seconds after which this process starts no further trial.")
    ] = None,
    grid: Annotated[
        bool | None, typer.Option("--grid/--no-grid", help="Try all combinations.  [default: if no range is given]")
    ] = None,
    data: Data = None,
    unlabeled: Unlabeled = None,
    no_labels: NoLabels = None,
    labeled_test: LabeledTest = None,
    skip_bad: SkipBad = None,
    teacher: Teacher = None,
    student: Student = None,
    settings: Settings = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the sweep.  [default: RECIPE-sweep]")
    ] = None,
    output_dir: Root = Path("runs"),
    seed: Seed = None,
    confirm_seeds: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="New seeds on which the best settings are compared with a baseline of equal search; 0: no comparison.",
        ),
    ] = 5,
    slurm: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Submit N Slurm jobs that run trials, and return.")
    ] = None,
    ray: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Run trials in N tasks of a running Ray cluster, and wait for them."),
    ] = None,
    job_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Option of submitit (timeout_min=90) or of a Ray task (num_gpus=1); may be repeated.",
        ),
    ] = None,
    allow_code: AllowCode = False,
) -> None:
    """Search for better settings; the same command continues the search, also in parallel processes."""
    import re

    from potstill.config.recipe import load_recipe
    from potstill.sweep import parse_space
    from potstill.sweep.study import require_optuna

    require_optuna()
    overrides = settings or []
    flags: dict[str, Any] = {"--data": data, "--teacher": teacher or None, "--student": student, "--seed": seed}
    flags |= {"--unlabeled": unlabeled, "--no-labels": no_labels, "--labeled-test": labeled_test}
    flags |= {"--skip-bad": skip_bad, "--allow-code": allow_code}
    space = parse_space(search or [], recipe, overrides, flags)
    if grid and not space.listed:
        raise UsageError("--grid tries all combinations, so each --search must list its values: a range has no end")
    if no_labels and confirm_seeds:
        raise UsageError(
            "--confirm-seeds compares with a baseline, and --no-labels has none: add --confirm-seeds 0; trials are "
            "compared by their agreement with the teacher on val"
        )
    grid = space.listed if grid is None else grid
    name = f"{load_recipe(recipe, overrides, flags=flags).name[: _MAX_NAME - 6]}-sweep" if name is None else name
    if not re.fullmatch(rf"[A-Za-z0-9._-]{{1,{_MAX_NAME}}}", name) or set(name) == {"."}:
        raise UsageError(f"--name must be 1 to {_MAX_NAME} of the characters A-Z a-z 0-9 . _ -, got {name!r}")

    if slurm or ray or job_option:
        job_flags = {"--search": search, "--set": overrides, "--trials": trials, "--timeout": timeout, **flags}
        job_flags |= {"--name": name, "--output-dir": output_dir, "--confirm-seeds": confirm_seeds}
        job_flags["--grid" if grid else "--no-grid"] = True
        _launch_jobs(["sweep", recipe, *to_arguments(job_flags)], output_dir / name, slurm, ray, job_option or [])
        return

    from potstill.console import Progress, print_next_command, print_section
    from potstill.report.sweep import render_sweep, trial_table
    from potstill.sweep.worker import Sweep
    from potstill.training.callbacks import SignalHandler

    folder = output_dir / name
    with SignalHandler() as stopping, Progress() as progress:

        def print_trial(found: dict[str, Any]) -> None:
            for line in trial_table(found["trials"], found["measure"], last=1):
                progress.note(line)
            progress.note(f"{len(found['trials'])} of {found['wanted']} trials")

        sweep_worker = Sweep(
            recipe,
            overrides,
            flags,
            space,
            folder=folder,
            trials=trials,
            grid=grid,
            observer=progress,
            stopping=stopping,
            on_trial=print_trial,
            confirm_seeds=confirm_seeds,
        )
        finished = sweep_worker.work(timeout)
    page, lines = render_sweep(folder)
    print_section(f"sweep {folder}: {page}", lines)
    if not finished:
        print_section("not finished", ["the same command continues the sweep; the test split has not been read"])
        return
    if confirm_seeds:
        print_next_command(
            ["potstill", "report", *(str(folder / "confirmation" / name) for name in ("distilled", "baseline"))]
        )


def _launch_jobs(arguments: list[str], folder: Path, slurm: int | None, ray: int | None, options: list[str]) -> None:
    """Run the sweep in Slurm jobs or Ray tasks."""
    from potstill.console import print_section
    from potstill.sweep.launchers import parse_options, run_on_ray, submit_to_slurm
    from potstill.sweep.study import SLURM_FOLDER

    if (slurm is None) == (ray is None):
        raise UsageError("--slurm and --ray exclude each other" if slurm else "--job-option needs --slurm or --ray")
    if slurm is not None:
        jobs = submit_to_slurm(arguments, slurm, folder / SLURM_FOLDER, parse_options(options))
        print_section(f"submitted: {', '.join(jobs)}", [f"output of the jobs: {folder / SLURM_FOLDER}"])
    elif ray is not None:
        run_on_ray(arguments, ray, parse_options(options))
        print_section(f"sweep {folder}: {folder / 'sweep.html'}", [])
