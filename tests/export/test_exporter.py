"""Export compares before it writes; what it writes answers as the original does."""

import dataclasses
import json
import os
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from potstill.data.image_sets import FileSet, read_square
from potstill.data.preprocessing import normalize_array
from potstill.data.settings import DataSettings
from potstill.errors import ArtifactError, DataError, UsageError
from potstill.export import exporter
from potstill.export import options as export_options
from potstill.export.exporter import Exporter, compute_parity, export, single_thread_latency
from potstill.export.onnx import load_onnx
from potstill.export.options import FORMATS, ExportOptions, find_format
from potstill.export.predict import predict
from potstill.input_spec import InputSpec
from potstill.io import read_checksummed_json, sha256_hex
from potstill.models.exported_files import ExportMetadata, create_onnx_predictor
from potstill.models.factory import create_model
from potstill.models.model_file import Classifier

for _name in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(_name, reason="needs potstill[export]")
import onnx  # noqa: E402

CORPUS = Path(__file__).parents[3] / "shared" / "corpora" / "core"


def quiet(line: str) -> None:
    """Nobody reads along."""


def exported(run: Path, **options) -> Path:
    return export(run, options=ExportOptions(data="digits", **options), note=quiet)


@pytest.fixture(scope="module")
def plain(run: Path) -> Path:
    return exported(run)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, digits) -> Path:
    """200 digits of other sizes, some wide, some tall; PNG and JPEG."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(200):
        image = Image.fromarray(digits.test.pixels(i)).resize((17 + i % 23, 17 + i % 31))
        image.save(folder / (f"{i:03d}.png" if i % 2 else f"{i:03d}.jpg"))
    return folder


@pytest.fixture(scope="module")
def wanted(run: Path, pictures: Path):
    return predict(run, [pictures], top=3, device="cpu")


def test_one_file_that_says_all_that_is_needed(run: Path, plain: Path, digits) -> None:
    assert plain == run / "distilled" / "export" / "model.onnx"
    model = onnx.load(plain, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert not any(each.data_location for each in model.graph.initializer)
    (taken,), (given,) = model.graph.input, model.graph.output
    shapes = [[each.dim_param or each.dim_value for each in x.type.tensor_type.shape.dim] for x in (taken, given)]
    assert shapes == [["batch", 3, 16, 16], ["batch", 10]]
    assert (taken.name, given.name) == ("images", "logits")
    (entry,) = model.metadata_props
    said = json.loads(entry.value)
    assert (entry.key, said["class_names"], said["inside"], said["int8"]) == (
        "potstill", list(digits.class_names), "none", False,
    )  # fmt: skip
    assert said["input"] == {
        "size": 16, "mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "crop", "crop_share": 1.0, "range": None,
    }  # fmt: skip


def test_no_path_of_this_machine_is_in_the_file(plain: Path) -> None:
    content = plain.read_bytes()
    assert b"/potstill/" not in content
    assert b".py" not in content


def test_the_facts_beside_it(run: Path, plain: Path) -> None:
    facts = read_checksummed_json(plain.with_name("model.onnx.json"))
    content = plain.read_bytes()
    assert facts["files"] == {"model.onnx": {"bytes": len(content), "sha256": sha256_hex(content)}}
    assert facts["model_sha256"] == sha256_hex((run / "distilled" / "model.safetensors").read_bytes())
    assert (facts["format"], facts["stage"], facts["accuracy"]) == ("onnx", "distilled", None)
    assert facts["parity"]["images"] == 200
    assert 0 < facts["parity"]["max_difference"] < 1e-4
    assert facts["parity"]["agreement"] == 1
    assert set(facts["latency_ms"]) == {"pytorch", "onnx"}
    assert 0 < facts["latency_ms"]["onnx"]["p50"] <= facts["latency_ms"]["onnx"]["p95"]


def same(found, wanted, tolerance: float = 1e-5) -> None:
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.path == theirs.path
        assert (mine.error is None) == (theirs.error is None)
        assert [name for name, _ in mine.classes] == [name for name, _ in theirs.classes]
        assert np.allclose([p for _, p in mine.classes], [p for _, p in theirs.classes], atol=tolerance)


def test_predict_gives_the_same_top_classes_on_200_images(plain: Path, pictures: Path, wanted) -> None:
    assert len(wanted) == 200
    assert len({each.classes[0][0] for each in wanted}) == 10
    same(predict(plain, [pictures], top=3), wanted)


@pytest.mark.skipif(not CORPUS.is_dir(), reason="needs ../shared/corpora")
def test_odd_files_are_judged_alike(run: Path, plain: Path) -> None:
    files = sorted(each for each in CORPUS.iterdir() if each.is_file())[::4]
    found, wanted = predict(plain, files), predict(run, files, device="cpu")
    assert 0 < sum(each.error is None for each in found) < len(found)
    same(found, wanted)


_WITHOUT_TORCH = """
import sys
BLOCKED = "torch torchvision timm onnx sklearn matplotlib safetensors yaml filelock".split()
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
from potstill.cli import main
code = main(sys.argv[1:])
sys.stderr.write("modules: " + " ".join(sorted({name.partition(".")[0] for name in sys.modules})))
sys.exit(code)
"""


def test_predicting_needs_neither_torch_nor_much_else(plain: Path, pictures: Path, wanted) -> None:
    command = [sys.executable, "-c", _WITHOUT_TORCH, "predict", str(plain), str(pictures), "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": ""})
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert [[each["class"] for each in one["predictions"]] for one in found] == [
        [name for name, _ in one.classes] for one in wanted
    ]
    loaded = set(ran.stderr.rpartition("modules: ")[2].split())
    slow = {"torch", "torchvision", "timm", "onnx", "sklearn", "scipy", "pandas", "matplotlib", "jinja2", "yaml"}
    assert not loaded & slow  # a start below one second leaves no room for them


@pytest.mark.parametrize("inside", ["normalise", "resize"])
def test_preparation_inside_gives_the_same(run: Path, tmp_path: Path, pictures: Path, wanted, inside: str) -> None:
    path = exported(run, inside=inside, output=tmp_path / "whole.onnx")
    (taken,) = onnx.load(path).graph.input
    assert taken.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    few = wanted[:40]
    found = predict(path, [each.path for each in few])
    assert [each.classes[0][0] for each in found] == [each.classes[0][0] for each in few]
    wide = [(a, b) for a, b in zip(found, few, strict=True) if _wide(a.path)]
    assert len(wide) > 10
    for mine, theirs in wide:  # tall ones are rounded otherwise by newer Pillows
        same([mine], [theirs])


def _wide(path: Path) -> bool:
    with Image.open(path) as image:
        return image.width >= image.height


def test_the_time_of_one_thread_is_its_own(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calm = single_thread_latency(plain.read_bytes(), 16)
    predictor = create_onnx_predictor(plain.read_bytes(), threads=1)

    def interrupted(batch: NDArray[Any]) -> NDArray[Any]:  # as by another process
        time.sleep(0.02)
        return predictor(batch)

    monkeypatch.setattr(exporter, "create_onnx_predictor", lambda *args, **options: interrupted)
    assert 0 < calm < 20
    assert 0 < single_thread_latency(plain.read_bytes(), 16) < 20


def test_large_files_are_compared_as_evaluation_and_prediction_decode_them(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (400, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg", quality=95)
    images = FileSet(tmp_path, ["a.jpg"], [0])
    spec = InputSpec(size=16)
    metadata = ExportMetadata("some", ("one",), spec)
    (found,) = exporter.compute_logits([lambda batch: batch.reshape(1, -1)], images, [0], metadata)
    square = read_square(images, 0, 16, "crop")  # decoded at an eighth, then resized
    np.testing.assert_allclose(found.reshape(3, 16, 16), normalize_array(square, spec), atol=1e-6)
    (full,) = exporter.compute_logits([lambda batch: batch.reshape(1, -1)], images, [0], metadata, full_size=True)
    assert np.abs(full - found).max() > 0.05


def test_int8_within_max_drop_is_written_with_its_accuracies(run: Path, pictures: Path, wanted, digits) -> None:
    path = exported(run, int8=True, max_drop=0.2)
    assert path.name == "model-int8.onnx"
    model = onnx.load(path)
    assert {"QuantizeLinear", "DequantizeLinear"} <= {each.op_type for each in model.graph.node}
    assert json.loads(model.metadata_props[0].value)["int8"] is True
    facts = read_checksummed_json(path.with_name("model-int8.onnx.json"))
    found = predict(path, [pictures], top=1)
    agreed = np.mean([a.classes[0][0] == b.classes[0][0] for a, b in zip(found, wanted, strict=True)])
    assert agreed > 0.9
    accuracy = facts["accuracy"]
    assert accuracy["images"] == len(digits.test)
    assert accuracy["before"] > 0.7  # solved, not random
    assert abs(accuracy["before"] - accuracy["after"]) < 0.2
    assert set(facts["latency_ms"]) == {"pytorch", "onnx", "int8"}
    calibration = facts["calibration"]
    assert {key: calibration[key] for key in ("images", "split", "classes")} == {
        "images": 256,
        "split": "train",
        "classes": 10,
    }
    assert calibration["method"] == "MinMax"
    assert calibration["batch"] in {None, 64, 32, 16, 8}
    assert 0 <= calibration["divergence"] < 0.05


def test_int8_of_openvino_is_as_accurate_in_openvino(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="needs potstill[openvino]")
    path = exported(run, format="openvino", int8=True, max_drop=0.05, output=tmp_path / "small.xml")
    facts = read_checksummed_json(path.with_name("small.xml.json"))
    assert b"FakeQuantize" in path.read_bytes()
    assert facts["accuracy"]["before"] > 0.7
    assert set(facts["latency_ms"]) == {"pytorch", "openvino", "int8"}


def test_all_that_run_are_written_and_the_others_named(run: Path, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def export_one(model, stage, options, *, note):
        if options.format == "onnx":
            return plain
        raise ArtifactError("it has no operation for x\nTry --format onnx")

    monkeypatch.setattr(exporter, "export", export_one)
    found = exporter.export_all(run, options=ExportOptions(data="digits"), note=quiet)
    assert list(found) == list(FORMATS)
    head, onnx_row, *left_out = exporter.export_table(found).splitlines()
    assert head.split()[:3] == ["format", "file", "MiB"]
    assert onnx_row.split()[:2] == ["onnx", str(plain)]
    assert onnx_row.endswith("100.00%")
    assert left_out[0] == "left out: openvino: it has no operation for x; Try --format onnx"
    assert "left out: coreml: its files run on other machines only" in left_out
    with pytest.raises(UsageError, match="names one file"):
        exporter.export_all(run, options=ExportOptions(output=Path("x.onnx")), note=quiet)
    monkeypatch.setattr(exporter, "FORMATS", {"ncnn": FORMATS["ncnn"]})
    with pytest.raises(ArtifactError, match="no operation for x"):
        exporter.export_all(run, options=ExportOptions(data="digits"), note=quiet)


def test_int8_that_loses_more_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([0.95, 0.93])
    monkeypatch.setattr(exporter, "accuracy", lambda logits, labels: next(found))
    with pytest.raises(ArtifactError, match=r"int8 loses 2\.00 points .* \(95\.00% to 93\.00%\)"):
        exported(run, int8=True, max_drop=0.019, output=tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_differs_is_refused(
    run: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(*arguments):
        answer = torch_answer(*arguments)
        return lambda images: answer(images) * np.float32(1.0015)

    torch_answer = exporter.create_torch_predictor
    monkeypatch.setattr(exporter, "create_torch_predictor", off)
    # The same network is not converted again.
    form = dataclasses.replace(find_format("onnx"), convert=lambda module, metadata: {".onnx": plain.read_bytes()})
    monkeypatch.setattr(exporter, "find_format", lambda name, runtime=None: form)
    with pytest.raises(ArtifactError, match=r"differs from the original.* not written"):
        exported(run, output=tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("scale", "off", "within"), [(1, 0.0009, True), (1, 0.0011, False), (100, 0.09, True), (100, 0.11, False)]
)
def test_the_limit_of_a_difference(scale: float, off: float, within: bool) -> None:
    logits = np.array([[scale, 0.0]])
    assert compute_parity(logits, logits + np.array([[0, off]])).within is within
    assert not compute_parity(logits, logits * np.nan).within


@pytest.mark.parametrize(
    ("name", "suffixes"),
    [
        ("openvino", [".xml", ".bin"]),
        ("torch-export", [".pt2"]),
        ("litert", [".tflite"]),
        ("ncnn", [".ncnn.param", ".ncnn.bin"]),
        pytest.param("executorch", [".pte"], marks=pytest.mark.slow),
        pytest.param("coreml", [".mlpackage.zip"], marks=pytest.mark.slow),
    ],
)
def test_other_formats(run: Path, tmp_path: Path, name: str, suffixes: list[str]) -> None:
    try:
        find_format(name)
    except UsageError as error:
        pytest.skip(str(error).splitlines()[0])
    path = exported(run, format=name, output=tmp_path / f"it{suffixes[0]}")
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(
        [f"it{suffix}" for suffix in suffixes] + [f"it{suffixes[0]}.json"]
    )
    facts = read_checksummed_json(path.with_name(f"{path.name}.json"))
    assert set(facts["files"]) == {f"it{suffix}" for suffix in suffixes}
    assert facts["parity"] is None if name == "coreml" else facts["parity"]["agreement"] == 1
    if name == "litert":  # a zip at the end of the file, as Android's tools write it
        with zipfile.ZipFile(path) as appended:
            assert appended.read("labels.txt").decode().split() == facts["class_names"]
            assert json.loads(appended.read("potstill.json"))["input"] == facts["input"]


class Attention(torch.nn.Module):
    """Queries, keys and values from one tensor of five dimensions, which ncnn does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(4, 12)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.project(images.flatten(2).transpose(1, 2))
        parts = tokens.reshape(images.shape[0], -1, 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
        return torch.nn.functional.scaled_dot_product_attention(*parts)


class Bessel(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.special.i0e(images)


@pytest.mark.parametrize(
    ("name", "part", "operation"), [("ncnn", Attention(), "torch.unbind"), ("litert", Bessel(), "aten.special_i0e")]
)
def test_a_missing_operation_is_named_with_its_layer(name: str, part: torch.nn.Module, operation: str) -> None:
    try:
        form = find_format(name)
    except UsageError as error:
        pytest.skip(str(error).splitlines()[0])
    network = torch.nn.Sequential(OrderedDict(stem=torch.nn.Conv2d(3, 4, 3), mixer=part, flat=torch.nn.Flatten()))
    metadata = ExportMetadata("mine", ("a", "b"), InputSpec(8))
    with pytest.raises(
        ArtifactError, match=rf"no operation for {operation}\S* .*the layer mixer \({type(part).__name__}\)"
    ):
        form.convert(network.eval(), metadata)


def test_what_is_wrong_is_said(run: Path, tmp_path: Path) -> None:
    def refused(error: type, match: str, stage: str | None = None, **options) -> None:
        with pytest.raises(error, match=match):
            export(run, stage, ExportOptions(**({"data": "digits"} | options)), note=quiet)

    refused(UsageError, r"no format 'onx'; did you mean 'onnx'\?\nKnown formats: onnx, openvino", format="onx")
    refused(UsageError, "--int8 goes with --format onnx or openvino or page", int8=True, format="torch-export")
    refused(UsageError, "--runtime goes with --format page, not with onnx", runtime=tmp_path)
    refused(UsageError, "share from 0 to 1", max_drop=2)
    refused(UsageError, "none, normalise, resize.*did you mean 'resize'", inside="resized")
    refused(UsageError, r"ends in \.onnx", output=tmp_path / "model.pt2")
    refused(ArtifactError, "no trained 'baseline'; .*it has teacher, distilled|no trained 'baseline'", "baseline")
    refused(ArtifactError, "no trained 'teachr'; did you mean 'teacher'", "teachr")
    refused(DataError, "is not in a run", data=None)
    with pytest.raises(UsageError, match="does not exist"):
        export(tmp_path / "none", note=quiet)


def test_data_that_is_not_where_the_run_began_is_named_with_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_options, "run_data_settings", lambda _: DataSettings(source="photos-of-the-run"))
    with pytest.raises(UsageError, match=r"(?s)'photos-of-the-run'.*runs/x has moved.*name it with --data DIR"):
        export_options.export_data_settings(Path("runs/x"), None)
    assert export_options.export_data_settings(Path("runs/x"), "digits").source == "digits"


def test_other_data_take_the_options_of_the_run_only_if_they_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = DataSettings(source="solar", options={"classes": 2})
    monkeypatch.setattr(export_options, "run_data_settings", lambda _: recorded)
    for data, options in (
        (str(tmp_path), {}),
        ("moved.tar", {"classes": 2}),
    ):  # "folders and manifests take no options"
        assert export_options.export_data_settings(Path("runs/x"), data).options == options


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("potstill.export.options.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs onnx and onnxscript and onnxruntime.*\n.*potstill\[export\]"):
        find_format("onnx")
    for name in FORMATS:
        if name != "torch-export":
            with pytest.raises(UsageError, match=r'pip install "potstill\['):
                find_format(name)


def test_a_network_that_cannot_be_exported(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wilful(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if images.sum() > 0:  # decided by the data: no graph can say that
                return images.mean(dim=(1, 2))
            return images.mean(dim=(2, 3))

    load_class_model = exporter.load_class_model

    def other(folder: Path):
        found = load_class_model(folder)
        found.module = Wilful()
        return found

    monkeypatch.setattr(exporter, "load_class_model", other)
    with pytest.raises(ArtifactError, match="cannot be exported to ONNX") as raised:
        exported(run)
    assert "data-dependent" in str(raised.value)  # the cause, not "Failed to export ... Next steps:"
    assert "\x1b" not in str(raised.value)


def test_other_data_have_the_range_of_the_model(tmp_path: Path) -> None:
    """Values up to 255 of 4095: nearly black to the network, white by the range of these images alone."""
    for split in ("train", "val", "test"):
        for name in ("cat", "dog"):
            (folder := tmp_path / "d" / split / name).mkdir(parents=True)
            values = np.arange(64, dtype=np.uint16).reshape(8, 8) + 192 + len(split) * (name == "cat")
            Image.fromarray(values.clip(max=255)).save(folder / f"{split}.png")
    spec = InputSpec(8, range=(0.0, 4095.0))
    classifier = Classifier(create_model("cifar/resnet8", 2, size=8), "cifar/resnet8", ("cat", "dog"), spec)
    options, notes = ExportOptions(format="page", data=str(tmp_path / "d")), list[str]()
    job = Exporter(tmp_path, classifier, "m", options, FORMATS["onnx"], notes.append)

    assert {int(images.pixels(i).max()) for images in (job.splits.train, job.splits.test) for i in range(2)} == {15}
    assert "a browser reads the high byte of their values, whatever the range of training, [0, 4095]" in notes[0]


def test_other_classes_are_refused(run: Path, tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        for name in ("cat", "dog"):
            for i in range(2):
                path = tmp_path / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.random.default_rng(len(name) + i).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(
                    path
                )
    with pytest.raises(DataError, match="has the classes cat, dog, the model 0, 1"):
        export(run, options=ExportOptions(data=str(tmp_path)), note=quiet)


def test_one_changed_bit_is_found_before_the_file_is_parsed(plain: Path, tmp_path: Path) -> None:
    for name in ("model.onnx", "model.onnx.json"):
        (tmp_path / name).write_bytes((plain.parent / name).read_bytes())
    path = tmp_path / "model.onnx"
    content = bytearray(path.read_bytes())
    for at in range(0, len(content), len(content) // 40):
        content[at] ^= 4
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match="is damaged"):
            load_onnx(path)
        content[at] ^= 4
    path.write_bytes(content)
    assert load_onnx(path).metadata.class_names[0] == "0"


def test_files_from_elsewhere_are_refused(plain: Path, tmp_path: Path) -> None:
    model = onnx.load(plain)
    del model.metadata_props[:]
    foreign = tmp_path / "foreign.onnx"
    foreign.write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="was not exported by potstill"):
        load_onnx(foreign)

    outside = tmp_path / "outside.onnx"
    onnx.save(onnx.load(plain), outside, save_as_external_data=True, size_threshold=0, location="weights.bin")
    with pytest.raises(ArtifactError, match="weights in another file"):
        load_onnx(outside)

    for said in ("{}", "[", '{"schema": 2}', json.dumps({"schema": 1, "input": {"size": "x"}}), "[" * 9000):
        onnx.helper.set_model_props(model, {"potstill": said})
        foreign.write_bytes(model.SerializeToString())
        with pytest.raises(ArtifactError, match=r"foreign\.onnx"):
            load_onnx(foreign)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": ["0", "1", "2"]}, "its metadata names 3 classes, and its network has 10 outputs"),
        ({"class_names": [*map(str, range(10)), "ten"]}, "its metadata names 11 classes, and its network has 10"),
        ({"class_names": ["0", "0", *map(str, range(2, 10))]}, "values that potstill never writes"),
        ({"class_names": list(range(10))}, "values that potstill never writes"),
        ({"inside": "resize"}, "does not take the images of its metadata"),
        ({"inside": "normalise"}, "does not take the images of its metadata"),
    ],
    ids=["fewer classes", "more classes", "a class twice", "numbers", "resize", "normalise"],
)
def test_metadata_of_another_network_are_refused(plain: Path, tmp_path: Path, changes, message) -> None:
    model, path = onnx.load(plain), tmp_path / "edited.onnx"
    written = json.loads(next(entry.value for entry in model.metadata_props if entry.key == "potstill"))
    onnx.helper.set_model_props(model, {"potstill": json.dumps(written | changes)})
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match=rf"edited\.onnx.*{message}"):
        load_onnx(path)


def test_latency_is_measured_with_the_threads_that_are_faster(run: Path, tmp_path: Path, monkeypatch) -> None:
    create, engines = exporter.create_torch_predictor, []

    def create_predictor(*arguments):
        predict = create(*arguments)

        def on_busy_cores(images: NDArray[Any]) -> NDArray[Any]:
            time.sleep(0.01 * (torch.get_num_threads() > 1))  # two threads wait for each other
            return predict(images)

        return on_busy_cores

    def open_engine(files, *, threads: int):
        engines.append(threads)
        return onnx_format.open(files, threads=threads)

    onnx_format = FORMATS["onnx"]
    monkeypatch.setitem(FORMATS, "onnx", dataclasses.replace(onnx_format, open=open_engine))
    monkeypatch.setattr(exporter, "create_torch_predictor", create_predictor)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        written = exported(run, output=tmp_path / "model.onnx")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    times = read_checksummed_json(tmp_path / f"{written.name}.json")["latency_ms"]
    assert [times[name]["threads"] for name in ("pytorch", "onnx")] == [1, 1]
    assert engines == [1]
