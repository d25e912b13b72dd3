"""The verb that searches: sweep."""

from pathlib import Path
from typing import Annotated, Any

import typer

from potstill.cli.run import AllowCode, Data, RecipeName, Root, Seed, Settings, SkipBad, Student, Teacher
from potstill.errors import UsageError

_MAX_NAME = 64  # characters of a folder's name


def sweep(
    recipe: RecipeName,
    over: Annotated[
        list[str] | None,
        typer.Option(
            "--search", metavar="KEY=VALUES", help="What to vary: a,b,c or low..high or low..high:log; may be repeated."
        ),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="In all; 20, or every combination of a grid.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(metavar="S", min=0, help="Seconds after which this process begins no further trial.")
    ] = None,
    grid: Annotated[
        bool | None, typer.Option("--grid/--no-grid", help="Every combination; so it is where no range is given.")
    ] = None,
    data: Data = None,
    skip_bad: SkipBad = None,
    teacher: Teacher = None,
    student: Student = None,
    settings: Settings = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Of the sweep; RECIPE-sweep if not given.")] = None,
    output_dir: Root = Path("runs"),
    seed: Seed = None,
    confirm_seeds: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Fresh seeds on which the winner meets a baseline that was searched as long; 0: no verdict.",
        ),
    ] = 5,
    slurm: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Submit N SLURM_FOLDER jobs that take part, and return.")
    ] = None,
    ray: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="N tasks of a running Ray cluster take part; waits for them.")
    ] = None,
    job_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Of submitit (timeout_min=90) or a Ray task (num_gpus=1); repeatable."),
    ] = None,
    allow_code: AllowCode = False,
) -> None:
    """Search for better settings; repeat the command to go on, or to join from another process."""
    import re

    from potstill.config.recipe import load_recipe
    from potstill.sweep.space import parse_space
    from potstill.sweep.study import require_optuna

    require_optuna()
    sets = settings or []
    flags: dict[str, Any] = {"--data": data, "--teacher": teacher or None, "--student": student, "--seed": seed}
    flags |= {"--skip-bad": skip_bad, "--allow-code": allow_code}
    space = parse_space(over or [], recipe, sets, flags)
    if grid and not space.listed:
        raise UsageError("--grid tries every combination, so each --search must list its values; a range has no end")
    grid = space.listed if grid is None else grid
    name = f"{load_recipe(recipe, sets, flags=flags).name[: _MAX_NAME - 6]}-sweep" if name is None else name
    if not re.fullmatch(rf"[A-Za-z0-9._-]{{1,{_MAX_NAME}}}", name) or set(name) == {"."}:
        raise UsageError(f"a sweep's name is 1 to {_MAX_NAME} of the characters A-Z a-z 0-9 . _ -, got {name!r}")

    if slurm or ray or job_option:
        repeated = {"--search": over, "--set": sets, "--teacher": teacher}
        once = {
            "--trials": trials,
            "--timeout": timeout,
            **flags,
            "--teacher": None,
            "--skip-bad": None,
            "--allow-code": None,
        }
        once |= {"--name": name, "--output-dir": output_dir}
        once |= {"--confirm-seeds": confirm_seeds}
        words = [word for flag, texts in repeated.items() for text in texts or [] for word in (flag, text)]
        words += [word for flag, value in once.items() if value is not None for word in (flag, str(value))]
        words += [flag for flag in ("--skip-bad", "--allow-code") if flags[flag]]
        grids = "--grid" if grid else "--no-grid"
        _launch_jobs(["sweep", recipe, *words, grids], output_dir / name, slurm, ray, job_option or [])
        return

    from potstill.console import Progress, print_next_command, print_section
    from potstill.report.sweep import render_sweep, trial_table
    from potstill.sweep.worker import Sweep
    from potstill.training.callbacks import SignalHandler

    folder = output_dir / name
    with SignalHandler() as stopping, Progress() as progress:

        def told(found: dict[str, Any]) -> None:
            for line in trial_table(found["trials"], found["measure"], last=1):
                progress.note(line)
            progress.note(f"{len(found['trials'])} of {found['wanted']} trials")

        work = Sweep(
            recipe,
            sets,
            flags,
            space,
            folder=folder,
            trials=trials,
            grid=grid,
            observer=progress,
            stopping=stopping,
            told=told,
            confirm_seeds=confirm_seeds,
        )
        over_now = work.work(timeout)
    page, lines = render_sweep(folder)
    print_section(f"sweep {folder}: {page}", lines)
    if not over_now:
        print_section("not over yet", ["the same command goes on; the test split has not been read"])
        return
    if confirm_seeds:
        print_next_command(
            ["potstill", "report", *(str(folder / "confirmation" / name) for name in ("distilled", "baseline"))]
        )


def _launch_jobs(arguments: list[str], folder: Path, slurm: int | None, ray: int | None, options: list[str]) -> None:
    """Have others do it."""
    from potstill.console import print_section
    from potstill.sweep.launchers import parse_options, run_on_ray, submit_to_slurm
    from potstill.sweep.study import SLURM_FOLDER

    if (slurm is None) == (ray is None):
        both = "--slurm and --ray exclude each other" if slurm else "--job-option goes with --slurm or --ray"
        raise UsageError(both)
    if slurm is not None:
        jobs = submit_to_slurm(arguments, slurm, folder / SLURM_FOLDER, parse_options(options))
        print_section(f"submitted: {', '.join(jobs)}", [f"what they print: {folder / SLURM_FOLDER}"])
    elif ray is not None:
        run_on_ray(arguments, ray, parse_options(options))
        print_section(f"sweep {folder}: {folder / 'sweep.html'}", [])
