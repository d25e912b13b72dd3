"""What the API answers."""

import json
import random
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from potstill.data.image_structure import FORMATS
from potstill.errors import ArtifactError, UsageError
from potstill.evaluation.cascade import Cascade, CascadeCalibration
from potstill.export.predict import predict
from potstill.serve.middleware import ServerLimits
from potstill.serve.model_worker import WorkerClient, WorkerUnavailable, _load_models, _predict_all
from potstill.serve.server import Prediction, _cascade_folders, _model_folders, create_app

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


@pytest.fixture
def cascade_run(runs_folder, tmp_path):
    """A copy of the run whose student is confident of one of two images; and that one first."""
    run = Path(shutil.copytree(runs_folder / "made", tmp_path / "run"))
    for seed in range(2):
        (tmp_path / f"{seed}.png").write_bytes(png(seed=seed))
    alone = predict(run / "distilled", [tmp_path / "0.png", tmp_path / "1.png"])
    shares = {each.path: each.classes[0][1] for each in alone}
    between = sum(shares.values()) / 2
    calibration = CascadeCalibration(1000, 1, ((between, 0, 500), (0.0, 500, 1000)))
    Cascade("distilled", ("teacher",), "logits", None, calibration).write(run)
    return run, sorted(shares, key=shares.__getitem__, reverse=True)


def test_a_cascade_says_who_answered_as_predict_does(cascade_run):
    run, images = cascade_run
    folders, rule = _cascade_folders(run, 0.05)
    models = _load_models({stage: str(folder) for stage, folder in folders.items()})
    expected = predict(run, images, risk=0.05)
    assert [each.answered_by for each in expected] == ["student", "teacher"]
    for image, each in zip(images, expected, strict=True):
        found = Prediction.model_validate(
            _predict_all(models, {"top": 3, "gradcam": True}, Path(image).read_bytes(), rule)
        )
        assert found.answered_by == each.answered_by
        assert [model.stage for model in found.models] == ["distilled", "teacher"][: len(found.models)]
        answer = found.models[-1]
        assert (len(found.models) == 1) == (each.answered_by == "student")  # else the teacher is not run
        assert [(one.class_, pytest.approx(one.probability, abs=1e-6)) for one in answer.predictions] == [*each.classes]
        assert answer.gradcam.rows
    refused = _predict_all(models, {"top": 3, "gradcam": False}, b"no image", rule)
    assert refused["status"] == 415


def test_teachers_of_a_cascade_answer_together(cascade_run):
    run, (_, unsure) = cascade_run
    calibration = Cascade.read(run / "distilled").calibration
    Cascade("distilled", ("teacher", "baseline"), "probabilities", (3.0, 1.0), calibration).write(run)
    folders, rule = _cascade_folders(run, 0.05)
    models = _load_models({stage: str(folder) for stage, folder in folders.items()})
    answer = _predict_all(models, {"top": 3, "gradcam": True}, Path(unsure).read_bytes(), rule)["models"][-1]
    one, other = (dict(predict(run / stage, [unsure])[0].classes) for stage in ("teacher", "baseline"))
    for each in answer["predictions"]:
        mean = (3 * one[each["class"]] + other[each["class"]]) / 4
        assert each["probability"] == pytest.approx(mean, abs=1e-6)
    assert "no one place" in answer["gradcam"]["error"]


def test_models_say_the_rule_of_a_cascade(cascade_run):
    folders, rule = _cascade_folders(cascade_run[0], 0.05)
    worker = WorkerClient(folders, ServerLimits(), rule)
    client = TestClient(create_app(worker, "run", dict))
    found = client.get("/models").json()["cascade"]
    assert found == {"student": "distilled", "teachers": ["teacher"], "risk": 0.05, "threshold": rule.threshold}
    with pytest.raises(UsageError, match=r"a risk of 0\.001 cannot be promised"):
        _cascade_folders(cascade_run[0], 0.001)
    (cascade_run[0] / "teacher" / "model.json").unlink()
    with pytest.raises(ArtifactError, match="teacher is missing"):
        _cascade_folders(cascade_run[0], 0.05)


def test_the_page_offers_all_formats_that_are_read():
    page = (files("potstill.serve") / "static" / "page.html").read_text("utf-8")
    assert [kind for kind in FORMATS if f"image/{kind.lower()}" not in page or kind not in page.upper()] == []


def test_while_models_are_loaded_again_nobody_is_sent_to_other_images(tmp_path):
    worker = WorkerClient({"model": tmp_path}, ServerLimits(answer_seconds=0.2))
    try:
        for _ in range(2):  # the first starts to load; the second waits for it
            with pytest.raises(WorkerUnavailable, match="the models are being loaded"):
                worker.predict(b"image", top=1, gradcam=False)
    finally:
        worker.close()


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


def test_live_progress(server):
    teacher, student = httpx.get(f"{server.url}/runs/live").json()["stages"]
    assert (teacher["done"], teacher["planned"], teacher["eta_seconds"]) == (True, 4, None)
    assert (student["done"], student["planned"], student["eta_seconds"]) == (False, 10, 14.0)  # 7 more of 2 s
    assert [each["epoch"] for each in student["epochs"]] == [1, 2, 3]  # not the line that is just being written
    assert student["epochs"][2]["val_top1"] == 0.75


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
