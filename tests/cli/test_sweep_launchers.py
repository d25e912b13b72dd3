"""A sweep's processes as SLURM jobs (a stand-in runs what SLURM would be given) and as tasks of a real Ray."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from potstill.cli import main
from potstill.cli import sweep as launchers
from potstill.config.yaml import dump_yaml
from potstill.errors import UsageError
from potstill.io import read_checksummed_json

SBATCH = """#!/bin/sh
# Begins with the script at once, and returns, as SLURM does.
echo "$1" >> "$(dirname "$0")/submitted"
number=$((41 + $(wc -l < "$(dirname "$0")/submitted")))
export SLURM_JOB_ID=$number SLURM_JOB_NUM_NODES=1 SLURM_JOB_NODELIST=here
export SLURM_NODEID=0 SLURM_NTASKS=1 SLURM_LOCALID=0 SLURM_PROCID=0
nohup sh "$1" > "$(dirname "$0")/log-$number" 2>&1 &
echo "Submitted batch job $number"
"""
SRUN = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do case "$1" in --output|--error) shift;; esac; shift; done
exec "$@"
"""


@pytest.fixture
def source(recipe, tmp_path):
    path = tmp_path / "tiny.yaml"
    settings = {"training.epochs": 1, "teacher.training.epochs": 1}
    path.write_text(dump_yaml(recipe(**settings).model_dump(mode="json")), encoding="utf-8")
    return str(path)


def typed(source, tmp_path, *more):
    return ["sweep", source, "--search", "method.alpha=0.2,0.8", "--output-dir", str(tmp_path), "--name", "s", *more]


def test_slurm_jobs_carry_the_sweep_out(source, tmp_path, monkeypatch, capsys):
    pytest.importorskip("optuna", reason='needs the extra "sweep"')
    pytest.importorskip("submitit", reason="needs submitit")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    assert main(typed(source, tmp_path, "--slurm", "2", "--job-option", "slurm_partition=gpu")) == 0
    assert "submitted: 42, 43" in capsys.readouterr().out
    ended = [tmp_path / "s" / "slurm" / f"{number}_0_result.pkl" for number in (42, 43)]
    for _ in range(12_000):
        if all(each.is_file() for each in ended):
            break
        time.sleep(0.1)
    assert (tmp_path / "s" / "final.json").is_file(), (programs / "log-42").read_text()
    found = read_checksummed_json(tmp_path / "s" / "trials.json")["trials"]
    assert [each["state"] for each in found] == ["complete", "complete"]
    script = Path((programs / "submitted").read_text().splitlines()[0]).read_text()
    assert "#SBATCH --partition=gpu" in script
    assert "#SBATCH --time=720" in script


def test_without_slurm_it_says_what_to_do(source, tmp_path, monkeypatch, capsys):
    pytest.importorskip("optuna", reason='needs the extra "sweep"')
    pytest.importorskip("submitit", reason="needs submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(typed(source, tmp_path, "--slurm", "2")) == 2
    assert "in as many terminals as you like" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--slurm", "1", "--ray", "1"], "--slurm and --ray exclude each other"),
        (["--job-option", "num_gpus=1"], "--job-option needs --slurm or --ray"),
        (["--ray", "1", "--job-option", "gpus"], "--job-option is KEY=VALUE"),
    ],
)
def test_mistakes(source, tmp_path, capsys, more, says):
    pytest.importorskip("optuna", reason='needs the extra "sweep"')
    assert main(typed(source, tmp_path, *more)) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(("package", "call"), [("submitit", "submit_to_slurm"), ("ray", "run_on_ray")])
def test_a_missing_package_is_named(package, call, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name))
    arguments = ([], 1, tmp_path, {}) if call == "submit_to_slurm" else ([], 1, {})
    with pytest.raises(UsageError, match=f"pip install {package}"):
        getattr(launchers, call)(*arguments)


@pytest.mark.slow
def test_ray_tasks_carry_the_sweep_out(source, tmp_path, monkeypatch):
    pytest.importorskip("optuna", reason='needs the extra "sweep"')
    pytest.importorskip("ray", reason="needs ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6399")
    with pytest.raises(UsageError, match="needs a running cluster"):
        launchers.run_on_ray(["--help"], 1, {})
    short = tempfile.mkdtemp(prefix="r")  # Ray's sockets lie below it, and their names may not be long
    head = [sys.executable, "-m", "ray.scripts.scripts"]
    begin = ["start", "--head", "--port=6399", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats"]
    subprocess.run([*head, *begin, f"--temp-dir={short}"], check=True, capture_output=True)
    try:
        assert main(typed(source, tmp_path, "--ray", "2")) == 0
        found = read_checksummed_json(tmp_path / "s" / "trials.json")["trials"]
        assert [each["state"] for each in found] == ["complete", "complete"]
        with pytest.raises(UsageError, match="--job-option"):
            launchers.run_on_ray(["--help"], 1, {"num_gpu": 1})
    finally:
        subprocess.run([*head, "stop", "--force"], check=False, capture_output=True)
        shutil.rmtree(short, ignore_errors=True)
