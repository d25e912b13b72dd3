"""G13: SIGTERM and SIGINT in every phase of the real command, twice, and SIGKILL after a grace time; nobody is left."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from potstill.cli import main
from potstill.experiment.run_folder import RunFolder

from ..forked import Forked

STAGES = ("teacher", "baseline", "distilled")
LONG = 1200  # seconds after which a process counts as hanging

# phase -> the place in which it is, and how often that is passed before the signal comes
PHASES = {
    "data check": ("potstill.data.scan:_read", 3),
    "packing pixels": ("potstill.data.decoded_cache:read_square", 0),
    "thread count": ("potstill.training.autotune:ThreadSelector.select", 0),
    "training the teacher": ("potstill.training.trainer:Trainer._update", 1),
    "filling the store": ("potstill.distillation.teacher_cache.cache:TeacherCache.write", 1),
    "flushing the store": ("potstill.distillation.teacher_cache.cache:TeacherCache.flush", 1),
    "distilling": ("potstill.training.trainer:Trainer._forward", 9),
    "saving": ("potstill.training.checkpointing:save_checkpoint", 2),
    "saving a model": ("potstill.experiment.stage:save_model", 1),
    "val": ("potstill.training.trainer:Trainer._evaluate", 1),
    "evaluation": ("potstill.experiment.results:_predict", 1),
    "latency": ("potstill.experiment.results:measure_latency", 0),
    "results": ("potstill.experiment.run_folder:RunFolder.write_results", 0),
    "report": ("potstill.report.render:_render_stage", 1),
    "page": ("potstill.report.render:render_page", 0),
}
DEFAULT = [("packing pixels", "SIGINT"), ("evaluation", "SIGTERM")]
ALL = [(phase, number) for phase in PHASES for number in ("SIGTERM", "SIGINT")]


def arguments(recipe: Path, root: Path, *flags: str) -> list[str]:
    return ["run", str(recipe), "--output-dir", str(root), "--set", f"teacher_cache.folder={root}/store", *flags]


def environment(root: Path) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "POTSTILL_CACHE": str(root / "cache")}


def start(root: Path, *command: str) -> Forked:
    """A process in a session of its own, so that whoever is left of it can be found."""
    return Forked([str(Path(__file__).with_name("signalled.py")), *command], environment(root))


def signalled(recipe: Path, root: Path, phase: str, number: str) -> tuple[int, str]:
    place, times = PHASES[phase]
    process = start(root, place, number, str(times), *arguments(recipe, root))
    code = process.wait(LONG)
    assert left(process.pid, patience=60) == []
    return code, process.errors


def left(session: int, patience: float) -> list[str]:
    """Commands of the processes of a session that are there after some seconds."""
    until = time.monotonic() + patience
    while True:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
                if int(fields[3]) == session and fields[0] != "Z":
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        if not found or time.monotonic() > until:
            return found
        time.sleep(0.1)


def resumed(recipe: Path, root: Path) -> dict[str, bytes]:
    """The weights of all stages, after what a user does then."""
    flags = ["--resume"] if RunFolder(root / "tiny").known else []
    assert main(arguments(recipe, root, *flags)) == 0
    assert not list(root.rglob("*.part"))
    assert (root / "tiny" / "report.html").exists()
    return weights(root / "tiny")


def weights(run: Path) -> dict[str, bytes]:
    return {
        f"{stage} {name}": tensor.numpy().tobytes()
        for stage in STAGES
        for name, tensor in load_file(run / stage / "model.safetensors").items()
    }


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("phase", "number"),
    [pytest.param(*each, marks=() if each in DEFAULT else pytest.mark.slow) for each in ALL],
)
def test_a_signal_in_any_phase(tiny_recipe: Path, finished_run: Path, tmp_path: Path, phase: str, number: str) -> None:
    code, errors = signalled(tiny_recipe, tmp_path, phase, number)
    assert code == 128 + getattr(signal, number), errors
    assert errors.endswith("error: interrupted; --resume continues a run from its last checkpoint\n")
    assert "Traceback" not in errors
    assert len(re.findall("error", errors)) == 1
    assert not list(tmp_path.rglob("*.part"))
    if (phase, number) not in DEFAULT:  # each takes as long again
        assert resumed(tiny_recipe, tmp_path) == weights(finished_run)


@pytest.mark.slow
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_second_signal_ends_it_at_once(
    tiny_recipe: Path, finished_run: Path, tmp_path: Path, phase: str, number: str
) -> None:
    code, errors = signalled(tiny_recipe, tmp_path, phase, f"{number},{number}")
    # Where the first one already ended what was under way, the second finds nobody who could wait.
    assert code in (-getattr(signal, number), 128 + getattr(signal, number)), errors
    assert "Traceback" not in errors
    assert resumed(tiny_recipe, tmp_path) == weights(finished_run)


def test_a_second_signal_while_a_step_is_finished(tiny_recipe: Path, tmp_path: Path) -> None:
    code, errors = signalled(tiny_recipe, tmp_path, "training the teacher", "SIGTERM,SIGTERM")
    assert code == -signal.SIGTERM
    assert "error" not in errors


@pytest.mark.parametrize(
    "phase", ["distilling", *(pytest.param(each, marks=pytest.mark.slow) for each in PHASES if each != "distilling")]
)
def test_a_batch_system_kills_after_a_grace_time(
    tiny_recipe: Path, finished_run: Path, tmp_path: Path, phase: str
) -> None:
    """SIGTERM comes within a step that does not end, and SIGKILL a second later, as it does ten seconds later there."""
    place, times = PHASES[phase]
    process = start(tmp_path, place, "SIGTERM+hang", str(times), *arguments(tiny_recipe, tmp_path))
    assert process.wait_for("hangs\n"), process.errors
    time.sleep(1)
    assert process.poll() is None
    process.kill()
    assert left(process.pid, patience=60) == []
    assert resumed(tiny_recipe, tmp_path) == weights(finished_run)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("number", ["SIGKILL", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_no_worker_outlives_the_run(tiny_recipe: Path, tmp_path: Path, number: str) -> None:
    streamed = ["--set", "data.workers=2", "--set", "data.cache_fraction=1e-12", "--set", "training.epochs=500"]
    process = subprocess.Popen(
        [sys.executable, "-m", "potstill", *arguments(tiny_recipe, tmp_path, *streamed)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(tmp_path), start_new_session=True,
    )  # fmt: skip
    until = time.monotonic() + LONG
    while not list(tmp_path.glob("tiny/*/checkpoints/last.checkpoint")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.1)
    assert len(left(process.pid, patience=0)) >= 3, "there were no workers"
    process.send_signal(getattr(signal, number))
    process.communicate(timeout=LONG)
    assert left(process.pid, patience=120) == []  # workers look for their parent every second
    shutil.rmtree(tmp_path / "tiny")
