"""Each tracker's own files and servers hold what a run has told; a real MLflow server on this machine."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from potstill.experiment import pipeline

pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages
REASON = "the tracker's package is an extra of its own"


@pytest.fixture
def carried_out(recipe, tmp_path, told, monkeypatch):
    """A run of the baseline that a tracker was told of."""

    def carry_out(tracker):
        monkeypatch.chdir(tmp_path)
        return pipeline.run(recipe(tracker=tracker), output_dir=tmp_path / "runs", stages=("baseline",), observer=told)

    return carry_out


def top1(path):
    lines = (path / "baseline" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["val"]["top1"] for line in lines]


def on_test(path):
    return json.loads((path / "results.json").read_text())["stages"]["baseline"]["test"]["top1"]


def test_tensorboard_reads_the_event_files(carried_out, told):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason=REASON)
    path = carried_out("tensorboard")
    found = reader.EventAccumulator(str(path / "tensorboard")).Reload()
    assert [event.step for event in found.Scalars("baseline/val/top1")] == [1, 2]
    assert [event.value for event in found.Scalars("baseline/val/top1")] == pytest.approx(top1(path))
    assert found.Scalars("final/baseline/test/top1")[0].value == pytest.approx(on_test(path))
    assert "_hparams_/session_start_info" in found.Tags()["tensors"]
    assert told.warnings == []


def test_wandb_stays_offline_and_keeps_the_figures(carried_out, told, monkeypatch):
    pytest.importorskip("wandb", reason=REASON)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    path = carried_out("wandb")
    identity = json.loads((path / "tracking.json").read_text())["identity"]
    runs = sorted((path / "wandb").glob("offline-run-*"))
    assert [run.name.rpartition("-")[2] for run in runs] == [identity]
    content = b"".join((run / f"run-{identity}.wandb").read_bytes() for run in runs)
    for word in (b"baseline/val/top1", b"final/baseline/test/top1", b"method.temperature"):
        assert word in content, word
    assert told.warnings == []


def test_trackio_keeps_figures_in_its_own_database(carried_out, told, monkeypatch, tmp_path):
    if "trackio" in sys.modules:
        pytest.skip("its folder is read when it is imported, and it has been")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason=REASON)
    path = carried_out("{name: trackio, project: cats}")
    code = "import json; from trackio.sqlite_storage import SQLiteStorage as s; " + (
        "(name,) = s.get_runs('cats'); print(json.dumps(s.get_logs('cats', name)))"
    )
    said = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(said.stdout.splitlines()[-1])
    assert [line["baseline/val/top1"] for line in found if "baseline/val/top1" in line] == top1(path)
    assert [line["final/baseline/test/top1"] for line in found if "verdict" in line] == [on_test(path)]
    assert told.warnings == []


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A real MLflow server on this machine, which takes long to start; (address, how to kill it)."""
    tmp_path = tmp_path_factory.mktemp("mlflow")
    pytest.importorskip("mlflow.server", reason=REASON)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination",
        str(tmp_path / "kept"),
    ]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONWARNINGS": "ignore"}
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, env={**os.environ, **quiet}, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True
        )
    try:
        _wait_for(port, process)
        yield f"http://127.0.0.1:{port}", lambda: _kill(process)
    finally:
        _kill(process)


def _wait_for(port, process):
    until = time.monotonic() + 180
    while time.monotonic() < until and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    pytest.fail("the MLflow server does not start")


def _kill(process):
    if process.poll() is None:
        os.killpg(process.pid, 9)
    process.wait()


def test_a_real_mlflow_server_gets_parameters_and_figures(carried_out, told, server):
    mlflow = pytest.importorskip("mlflow", reason=REASON)
    address, _ = server
    path = carried_out(f"{{name: mlflow, uri: '{address}', project: cats}}")
    assert told.warnings == []
    client = mlflow.MlflowClient(tracking_uri=address)
    (run,) = client.search_runs([client.get_experiment_by_name("cats").experiment_id])
    assert (run.info.run_name, run.info.status) == ("tiny", "FINISHED")
    assert run.data.params["method.temperature"] == "2.0"
    history = client.get_metric_history(run.info.run_id, "baseline/val/top1")
    assert [(point.step, point.value) for point in history] == list(enumerate(top1(path), start=1))
    assert run.data.metrics["final/baseline/test/top1"] == on_test(path)


def test_the_server_that_dies_in_the_midst_costs_one_warning(recipe, tmp_path, told, server):
    address, kill = server
    told.stage_end = lambda name, seconds: kill() if name == "teacher" else None
    path = pipeline.run(
        recipe(tracker=f"{{name: mlflow, uri: '{address}'}}"), output_dir=tmp_path / "runs", observer=told
    )
    assert (path / "results.json").is_file()
    (warning,) = [each for each in told.warnings if "tracker" in each]
    assert "tracker mlflow has stopped logging this run, which continues without it: " in warning
