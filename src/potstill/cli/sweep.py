"""The commands `fit`, which finds a student, and `sweep`, which searches for settings; Slurm jobs and Ray tasks.

Each job is the same command as typed, which joins the sweep's folder; so all machines must see that folder.  The study
chooses the next trial for every process, however it was started.
"""

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from potstill.cli.run import (
    AllowCode,
    Data,
    Device,
    ImageSize,
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
    recipe_flags,
    to_arguments,
)
from potstill.console import Progress, print_next_command, print_section
from potstill.errors import REPEAT, UsageError, WorkerError, advising
from potstill.training.callbacks import SignalHandler


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
    flags = recipe_flags(locals()) | {"--allow-code": allow_code}
    from potstill.config.recipe import load_recipe
    from potstill.sweep import parse_space
    from potstill.sweep.study import MAX_NAME, SWEEP_FILE, check_name, require_optuna

    require_optuna()
    overrides = settings or []
    space = parse_space(search or [], recipe, overrides, flags)
    if grid and not space.listed:
        raise UsageError("--grid tries all combinations, so each --search must list its values: a range has no end")
    if no_labels and confirm_seeds:
        raise UsageError(
            "--confirm-seeds compares with a baseline, and --no-labels has none: add --confirm-seeds 0; trials are "
            "compared by their agreement with the teacher on val"
        )
    grid = space.listed if grid is None else grid
    name = f"{load_recipe(recipe, overrides, flags=flags).name[: MAX_NAME - 6]}-sweep" if name is None else name
    check_name(name)

    if slurm or ray or job_option:
        job_flags = {"--search": search, "--set": overrides, "--trials": trials, "--timeout": timeout, **flags}
        job_flags |= {"--name": name, "--output-dir": output_dir, "--confirm-seeds": confirm_seeds}
        job_flags["--grid" if grid else "--no-grid"] = True
        _launch_jobs(["sweep", recipe, *to_arguments(job_flags)], output_dir / name, slurm, ray, job_option or [])
        return

    from potstill.report.sweep import render_sweep, trial_table
    from potstill.sweep.worker import Sweep

    folder = output_dir / name
    with advising(REPEAT, (folder / SWEEP_FILE).exists), SignalHandler() as stopping, Progress() as progress:

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


def fit(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Images: a folder, a manifest, or the name of a data set.")
    ],
    under: Annotated[
        str | None,
        typer.Option(
            metavar="LIMITS",
            help="Limits of the exported student: 5ms (one image, one thread of this CPU), 2MB (file), or 5ms,2MB.",
        ),
    ] = None,
    within: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Time for everything: 90s, 30min, 2h.  [default: what all candidates take]"),
    ] = None,
    teacher: Teacher = None,
    students: Annotated[
        str | None,
        typer.Option(metavar="A,B,C", help="Students to consider.  [default: small ones of `potstill models`]"),
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Export to int8; the limits are of that file.")] = False,
    recipe: Annotated[str, typer.Option(metavar="RECIPE", help="Teacher, augmentation and training.")] = "photos",
    image_size: ImageSize = None,
    device: Device = None,
    skip_bad: SkipBad = None,
    settings: Settings = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the search.  [default: RECIPE-fit]")] = None,
    output_dir: Root = Path("runs"),
    seed: Seed = None,
    seeds: Annotated[
        int, typer.Option(metavar="N", min=1, help="Fresh seeds of winner and baseline, if there is time for so many.")
    ] = 3,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the search of this name.")] = False,
    allow_code: AllowCode = False,
) -> None:
    """Find the best small student for these images, within limits and a budget of time.

    For example: potstill fit photos/ --under 5ms,2MB --within 30min
    """
    flags = {"--data": data, "--teacher": teacher, "--image-size": image_size, "--device": device}
    flags |= {"--skip-bad": skip_bad, "--seed": seed, "--allow-code": allow_code}
    from potstill.report.sweep import render_sweep
    from potstill.sweep.fit import fit as search
    from potstill.sweep.fit import repeat_command

    with SignalHandler() as stopping, Progress() as progress:
        folder, found = search(
            recipe,
            settings or [],
            flags,
            output_dir=output_dir,
            name=name,
            under=under,
            within=within,
            students=[each.strip() for each in students.split(",") if each.strip()] if students else [],
            seeds=seeds,
            int8=int8,
            resume=resume,
            observer=progress,
            stopping=stopping,
        )
    page, lines = render_sweep(folder)
    print_section(f"fit {folder}: {page}", lines)
    again = to_arguments({"--set": settings, **{key: value for key, value in flags.items() if key != "--data"}})
    runs = [str(folder / "confirmation" / each) for each in ("distilled", "baseline")]
    print_section(
        "to repeat",
        [
            shlex.join(["potstill", "run", recipe, "--data", data, *again, *repeat_command(found)]),
            *(shlex.join(["potstill", "run", "--reproduce", run]) for run in runs),
            shlex.join(["potstill", "report", *runs]),
        ],
    )
    print_next_command(["potstill", "predict", found["exported"]["file"], "IMAGE"])


def _launch_jobs(arguments: list[str], folder: Path, slurm: int | None, ray: int | None, options: list[str]) -> None:
    from potstill.sweep.study import SLURM_FOLDER

    if (slurm is None) == (ray is None):
        raise UsageError("--slurm and --ray exclude each other" if slurm else "--job-option needs --slurm or --ray")
    if slurm is not None:
        jobs = submit_to_slurm(arguments, slurm, folder / SLURM_FOLDER, parse_options(options))
        print_section(f"submitted: {', '.join(jobs)}", [f"output of the jobs: {folder / SLURM_FOLDER}"])
    elif ray is not None:
        run_on_ray(arguments, ray, parse_options(options))
        print_section(f"sweep {folder}: {folder / 'sweep.html'}", [])


SLURM_MINUTES = 720  # default of a SLURM job; submitit's own is 5


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """Parse ``KEY=VALUE`` texts; integers become numbers.

    Example:
        >>> parse_options(["slurm_partition=gpu", "timeout_min=90"])
        {'slurm_partition': 'gpu', 'timeout_min': 90}
    """
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"--job-option is KEY=VALUE, for example slurm_partition=gpu, got {text!r}")
        found[key] = int(value) if value.isdigit() else value
    return found


def submit_to_slurm(arguments: Sequence[str], jobs: int, folder: Path, options: Mapping[str, Any]) -> list[str]:
    """Submit jobs that run ``potstill`` in this folder, and return their ids at once.

    Args:
        arguments: of ``potstill``.
        jobs: how many.
        folder: receives submitit's files and what the jobs print.
        options: of submitit's executor: timeout_min, slurm_partition, gpus_per_node, cpus_per_task, ...
    """
    _require("submitit", "--slurm")
    import shutil

    if shutil.which("sbatch") is None:
        raise UsageError(
            "--slurm submits with sbatch, which is not on this machine; "
            "here, type the command without --slurm in as many terminals as you like"
        )
    import submitit

    try:
        executor = submitit.AutoExecutor(folder=folder, cluster="slurm")
        executor.update_parameters(**{"name": "potstill-sweep", "timeout_min": SLURM_MINUTES, **options})
    except (NameError, TypeError, AssertionError) as error:  # raised by submitit for an unknown option
        raise UsageError(f"--job-option: {str(error).splitlines()[0]}") from error
    command = [sys.executable, "-m", "potstill", *arguments]
    try:
        return [str(executor.submit(submitit.helpers.CommandFunction(command)).job_id) for _ in range(jobs)]
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise UsageError(f"SLURM refuses the job: {str(error).strip().splitlines()[-1]}") from error


def run_on_ray(arguments: Sequence[str], jobs: int, options: Mapping[str, Any]) -> None:
    """Run ``potstill`` in tasks of a running Ray cluster, and wait for them.

    Args:
        arguments: of ``potstill``.
        jobs: how many tasks.
        options: of a Ray task: num_cpus, num_gpus, ...  A task that dies is started again by Ray.
    """
    _require("ray", "--ray")
    import socket

    import ray

    address = os.environ.get("RAY_ADDRESS", "auto")
    try:
        if found := re.fullmatch(r"([^/]+):(\d+)", address):  # Ray itself would try for minutes
            socket.create_connection((found[1], int(found[2])), timeout=5).close()
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError) as error:
        raise UsageError(
            "--ray needs a running cluster: `ray start --head` here, or RAY_ADDRESS=HOST:PORT for one elsewhere"
        ) from error
    try:
        try:
            task = ray.remote(_run_command).options(**options)
        except (ValueError, TypeError) as error:
            raise UsageError(f"--job-option: {str(error).splitlines()[0]}") from error
        outcomes = ray.get([task.remote(list(arguments), os.getcwd()) for _ in range(jobs)])
    except ray.exceptions.RayError as error:
        raise WorkerError(f"a task on the Ray cluster was lost: {str(error).strip().splitlines()[-1]}") from error
    finally:
        ray.shutdown()
    failed = [(code, lines) for code, lines in outcomes if code]
    if failed:
        raise WorkerError(f"{len(failed)} of {jobs} processes on the Ray cluster failed, one with:\n{failed[0][1]}")


def _run_command(arguments: list[str], folder: str) -> tuple[int, str]:
    """Run on a machine of the cluster; return exit code and last lines of stderr."""
    import subprocess  # nosec B404 # to start potstill itself

    done = subprocess.run(  # nosec B603 # the arguments that were typed, and no shell
        [sys.executable, "-m", "potstill", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    return done.returncode, "\n".join(done.stderr.strip().splitlines()[-5:])


def _require(package: str, flag: str) -> None:
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise UsageError(f"{flag} needs {package}, not installed here\nInstall: pip install {package}")
