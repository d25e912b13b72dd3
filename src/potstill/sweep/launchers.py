"""Start processes of a sweep as SLURM jobs, or on a Ray cluster.

Each is the same command as typed, which joins the sweep's folder; so all machines must see that folder.  Neither
searches: the study chooses the next trial for every process, however it was started.
"""

import importlib.util
import os
import re
import shutil
import socket
import subprocess  # nosec B404 # to start potstill itself
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from potstill.errors import UsageError, WorkerError

SLURM_MINUTES = 720  # default of a SLURM job; submitit's own is 5


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """Parse ``KEY=VALUE`` texts; integers become numbers.

    Raises:
        UsageError: one without "=".

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

    Raises:
        UsageError: no submitit, no SLURM, an option that submitit does not know, or SLURM refuses.
    """
    _require("submitit", "--slurm")
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

    Raises:
        UsageError: no Ray, no cluster, or an option that Ray does not know.
        WorkerError: a task ended with an error; the message has its last lines.
    """
    _require("ray", "--ray")
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
    done = subprocess.run(  # nosec B603 # the arguments that were typed, and no shell
        [sys.executable, "-m", "potstill", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    return done.returncode, "\n".join(done.stderr.strip().splitlines()[-5:])


def _require(package: str, flag: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"{flag} needs {package}, not installed here\nInstall: pip install {package}")
