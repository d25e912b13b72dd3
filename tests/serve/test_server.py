"""What the API answers."""

import json
import math
import os
import random
import time
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from potstill.data.image_structure import FORMATS
from potstill.errors import UsageError
from potstill.export.predict import predict
from potstill.serve import model_worker
from potstill.serve.middleware import ServerLimits
from potstill.serve.model_worker import WorkerClient, WorkerUnavailable, _load_models
from potstill.serve.server import _model_folders

from .conftest import CLASSES, png

httpx = pytest.importorskip("httpx", reason="needs httpx")


def post(server, body, query="", **more):
    return httpx.post(f"{server.url}/predict{query}", content=body, headers={**server.headers, **more}, timeout=20)


def test_the_same_as_predict(server, runs_folder, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    answer = post(server, png(), "?top=3").json()
    assert [each["stage"] for each in answer["models"]] == ["distilled", "teacher", "baseline"]
    for each in answer["models"]:
        (expected,) = predict(runs_folder / "made" / each["stage"], [tmp_path / "a.png"])
        assert [one["class"] for one in each["predictions"]] == [name for name, _ in expected.classes]
        given = [one["probability"] for one in each["predictions"]]
        assert given == pytest.approx([share for _, share in expected.classes], abs=1e-6)
        assert "gradcam" not in each
    student, teacher = (each["predictions"][0]["class"] for each in answer["models"][:2])
    assert answer["agreement"] is (student == teacher)
    assert (answer["width"], answer["height"]) == (40, 30)


def test_while_models_are_loaded_again_nobody_is_sent_to_other_images(tmp_path):
    worker = WorkerClient({"model": tmp_path}, ServerLimits(answer_seconds=0.2))
    try:
        for _ in range(2):  # the first starts to load; the second waits for it
            with pytest.raises(WorkerUnavailable, match="the models are being loaded"):
                worker.predict(b"image", top=1, gradcam=False)
    finally:
        worker.close()


@pytest.mark.parametrize(
    ("cpu", "looks"),
    [
        ([0, 0], 1),  # it stands still
        ([0, 0.4, 0.8, 1.2], 3),  # it computes, for a second of CPU time in all
        ([0, 0.4, 0.4], 2),
        ([0, 1.5], 1),
        ([math.nan, math.nan], 1),  # unknown: by the clock
    ],
)
def test_a_slow_worker_is_killed_by_its_cpu_time(monkeypatch, cpu, looks):
    seen, killed = iter(cpu), []
    monkeypatch.setattr(model_worker, "_cpu_seconds", lambda pid: next(seen))
    done = SimpleNamespace(wait=lambda seconds: killed.append("look"))
    worker = SimpleNamespace(pid=1, kill=lambda: killed.append("kill"))
    model_worker._watch(worker, 0.0, 1.0, done)
    assert killed == ["look"] * looks + ["kill"]
    done.wait = lambda seconds: True
    seen = iter([0])
    model_worker._watch(worker, 0.0, 1.0, done)
    assert killed.count("kill") == 1


@pytest.mark.parametrize("when", ["start", "poll"])
def test_a_client_that_is_closed_while_its_worker_starts_leaves_none(monkeypatch, tmp_path, when):
    events = []

    def close(*_):
        if "closed" not in events:
            events.append("closed")
            client.close()

    class Pipe:
        def poll(self, seconds):
            if when == "poll":
                close()
            return True

        def close(self):
            events.append("pipe")

        def recv_bytes(self, most):
            raise OSError("handle is closed")

    worker = SimpleNamespace(kill=lambda: events.append("kill"), join=lambda seconds: None)
    worker.start = close if when == "start" else lambda: None
    ends = (Pipe(), SimpleNamespace(close=lambda: None))
    context = SimpleNamespace(Pipe=lambda: ends, Process=lambda **options: worker)
    monkeypatch.setattr(model_worker.multiprocessing, "get_context", lambda kind: context)
    client = WorkerClient({"model": tmp_path}, ServerLimits())
    client._lock.acquire()
    client._respawn()
    assert sorted(events) == ["closed", "kill", "pipe"]
    assert not client._lock.locked()


def test_the_cpu_time_of_a_process():
    assert model_worker._cpu_seconds(os.getpid()) == pytest.approx(time.process_time(), abs=0.2)
    assert math.isnan(model_worker._cpu_seconds(2**30))


def test_the_page_offers_all_formats_that_are_read():
    page = (files("potstill.serve") / "static" / "page.html").read_text("utf-8")
    assert [kind for kind in FORMATS if f"image/{kind.lower()}" not in page or kind not in page.upper()] == []


def test_names_as_timm_writes_them(runs_folder):
    name = f"local-dir:{runs_folder / 'made' / 'distilled'}"
    assert _model_folders(Path(name)) == {"model": Path(name)}
    (found,) = _load_models({"model": name}).values()
    assert found.class_names == CLASSES
    with pytest.raises(UsageError, match="does not exist"):
        _model_folders(Path("local-dir:nowhere"))


def test_gradcam_covers_what_the_network_sees(server):
    for each in post(server, png(), "?gradcam=true").json()["models"]:
        cam = each["gradcam"]
        assert cam["region"] == [0.125, 0, 0.75, 1]  # the centre square of 40 x 30
        assert max(map(max, cam["rows"])) in (0, 1)


@pytest.mark.parametrize(
    ("body", "query", "kind", "expected"),
    [
        (b"no image", "", "image/png", 415),
        (png()[:60], "", "image/png", 415),
        (png(), "", "text/plain", 415),
        (png(), "", "multipart/form-data; boundary=x", 415),
        (b"", "", "image/png", 400),
        (png(), "?top=0", "image/png", 422),
        (png(), "?gradcam=perhaps", "image/png", 422),
    ],
)
def test_refusals_are_json(server, body, query, kind, expected):
    answer = post(server, body, query, **{"Content-Type": kind})
    assert answer.status_code == expected
    assert answer.json()["error"]


def test_models_and_runs(server):
    found = httpx.get(f"{server.url}/models").json()
    assert found["run"] == "made"
    assert {tuple(each["classes"]) for each in found["models"]} == {CLASSES}
    listed = {each["id"]: each for each in httpx.get(f"{server.url}/runs").json()["runs"]}
    assert set(listed) == {"made", "live"}
    assert listed["live"]["state"] == "training"


def test_reports_are_shown_without_rights(server):
    answer = httpx.get(f"{server.url}/runs/made/report")
    assert "sandbox" in answer.headers["content-security-policy"]
    assert "script-src" not in answer.headers["content-security-policy"]
    assert "allow-scripts" not in answer.headers["content-security-policy"]
    assert httpx.get(f"{server.url}/runs/live/report").status_code == 404


@pytest.mark.parametrize("path", ["/", "/page.js", "/page.css", "/models", "/absent", "/openapi.json"])
def test_headers_everywhere(server, path):
    headers = httpx.get(server.url + path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    assert "access-control-allow-origin" not in headers


def test_nothing_of_ours_is_loaded_from_elsewhere(server):
    for path in ("/", "/page.js", "/page.css"):
        text = httpx.get(server.url + path).text.replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text
        assert "innerHTML" not in text


def uploads(corpus, count):
    lines = [line.split("\t") for line in (corpus / "MANIFEST.tsv").read_text().splitlines()]
    return random.Random(0).sample(lines, min(count, len(lines)))


@pytest.mark.parametrize("count", [40, pytest.param(10**6, marks=pytest.mark.slow)])
def test_the_corpora_as_uploads(server, corpus, count):
    for line in uploads(corpus, count):
        body = (corpus / "files" / line[0] if (corpus / "files").is_dir() else corpus / line[0]).read_bytes()
        answer = post(server, body)
        expected = (200,) if line[4] == "ok" else (200, 400, 413, 415)
        assert answer.status_code in expected, (line[0], answer.text[:300])
        json.loads(answer.text)


def test_openapi_by_schemathesis(server):
    schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis")
    from hypothesis import HealthCheck, given, settings

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    assert Image  # Pillow is there: some generated bodies may be images
    for operation in schema.get_all_operations():
        strategy = operation.ok().as_strategy()

        @settings(max_examples=8, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=strategy)
        def try_it(case):
            case.headers = {**(case.headers or {}), **server.headers}
            answer = case.call(base_url=server.url)
            assert answer.status_code < 500
            case.validate_response(answer, checks=[schemathesis.checks.not_a_server_error])

        try_it()
