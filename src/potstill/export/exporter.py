"""``export``: convert a model, compare it with the original, quantize it, measure its latency and write it.

Nothing is written before the comparison has passed.
"""

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from potstill.config import sort_stages, stage_role
from potstill.data.datasets import load_data
from potstill.data.image_io import format_range
from potstill.data.image_sets import ImageSet, read_pixels, set_value_range
from potstill.data.preprocessing import decoded_side
from potstill.data.splits import DataSplits
from potstill.errors import ArtifactError, DataError, PotstillError, UsageError, did_you_mean
from potstill.evaluation.cost import THREAD_CLOCK, measure_latency
from potstill.experiment.run_folder import find_model
from potstill.export.evaluate import check_unseen, run_data_settings
from potstill.export.formats import (
    ExportedFiles,
    ExportFormat,
    Predictor,
)
from potstill.export.int8 import calibration_images, class_balanced_indices, quantize_network
from potstill.export.loading import find_model_folder, load_classifier
from potstill.export.onnx import export_graph, facts_path, finalize_model, prepare_batch
from potstill.export.options import (
    ALL_THAT_RUN,
    COMPARED_IMAGES,
    EXPORT_FOLDER,
    FORMATS,
    NAME,
    ExportOptions,
    MessageCallback,
    check_all_options,
    check_options,
    create_metadata,
    export_data_settings,
    find_format,
    weights_sha256,
    without_preprocessing,
)
from potstill.export.preprocessing import create_preprocessing
from potstill.formatting import format_columns, format_many, format_names
from potstill.hub import is_hub_model, model_path
from potstill.input_spec import InputSpec
from potstill.io import check_exists, read_checksummed_json, sha256_hex, write_bytes, write_checksummed_json
from potstill.models.exported_files import LABELS, ExportMetadata, create_onnx_predictor
from potstill.models.model_file import Classifier, load_class_model
from potstill.training.autotune import select_fastest


def export(
    model: Path | str, stage: str | None = None, options: ExportOptions | None = None, *, note: MessageCallback = print
) -> Path:
    """Write an exported model, and ``NAME.json`` with its SHA-256 and measurements.

    ``model`` is a run folder, or the folder of one of its models; ``hf-hub:USER/NAME`` or ``local-dir:PATH``; ``stage``
    of a run: None: distilled, else baseline, else teacher.  Return the written file; of several, the one to open.
    """
    options = options or ExportOptions()
    form = find_format(options.format, options.runtime)
    check_options(options, form)
    name = os.fspath(model)
    if is_hub_model(name) and stage is None:
        folder, (classifier, label) = model_path(name), load_classifier(name, note=note)
        folder = find_model_folder(name) or folder
        written = options.output or Path(f"{NAME}{'-int8' if options.int8 else ''}{form.suffix}")  # not into the cache
        options = replace(options, output=written)
    else:
        folder = _model_folder(model_path(name), stage)
        classifier, label = load_class_model(folder), str(folder)
    job = Exporter(folder, classifier, label, options, form, note)
    files, facts = job.files()
    return _write_files(folder, options, form, files, facts)


def export_all(
    model: Path | str, stage: str | None = None, options: ExportOptions | None = None, *, note: MessageCallback = print
) -> "dict[str, Path | PotstillError]":
    """Export to each format whose engine is installed and runs here; return its file, or why there is none."""
    options = replace(options or ExportOptions(), format=ALL_THAT_RUN)
    check_all_options(options)
    found: dict[str, Path | PotstillError] = {}
    for name, form in FORMATS.items():
        if form.open is None:
            found[name] = UsageError("its files run on other machines only")
            continue
        if options.int8 and form.from_onnx is None:
            found[name] = UsageError("has no int8")
            continue
        try:
            runtime = options.runtime if name == "page" else None
            found[name] = export(model, stage, replace(options, format=name, runtime=runtime), note=note)
        except (UsageError, ArtifactError) as error:  # images that are missing are so for all formats
            found[name] = error
    if not any(isinstance(each, Path) for each in found.values()):
        raise next(each for each in found.values() if isinstance(each, PotstillError))
    return found


def export_table(found: "Mapping[str, Path | PotstillError]") -> str:
    """Return the table of what ``export_all`` has written, then the formats left out, with the reason."""
    rows = [("format", "file", "MiB", "p50 ms", "p95 ms", "same top class")]
    for name, path in found.items():
        if isinstance(path, Path):
            facts = read_checksummed_json(facts_path(path))
            times, same = facts["latency_ms"], facts["accuracy"] or facts["parity"]
            time = times["int8" if facts["int8"] else next(each for each in times if each != "pytorch")]
            size = sum(each["bytes"] for each in facts["files"].values()) / 2**20
            figures = (f"{size:.1f}", f"{time['p50']:.2f}", f"{time['p95']:.2f}", f"{same['agreement']:.2%}")
            rows.append((name, str(path), *figures))
    lines = format_columns(rows, left=(0, 1))
    left_out = {name: str(each) for name, each in found.items() if not isinstance(each, Path)}
    lines += [f"left out: {name}: {'; '.join(reason.splitlines())}" for name, reason in left_out.items()]
    return "\n".join(lines) + "\n"


def _model_folder(model: Path, stage: str | None) -> Path:
    if stage is None:
        return find_model(model)
    check_exists(model)
    trained = sort_stages(each.parent.name for each in model.glob("*/model.json"))
    if not trained:
        raise ArtifactError(f"{model} is no run folder with a trained model, so it has no stage {stage!r}")
    if not stage_role(stage) or stage not in trained:
        raise ArtifactError(
            f"{model} has no trained {stage!r}{did_you_mean(stage, trained)}; it has {', '.join(trained)}"
        )
    return model / stage


def _write_files(
    folder: Path, options: ExportOptions, form: ExportFormat, files: ExportedFiles, facts: dict[str, Any]
) -> Path:
    suffix = form.suffix
    main = options.output or folder / EXPORT_FOLDER / f"{NAME}{'-int8' if options.int8 else ''}{suffix}"
    stem = main.name.removesuffix(suffix)
    written = {f"{stem}{each}": content for each, content in files.items()}
    for name, content in written.items():
        write_bytes(main.with_name(name), content)
    listed = {name: {"bytes": len(content), "sha256": sha256_hex(content)} for name, content in written.items()}
    write_checksummed_json(facts_path(main), {"schema": FACTS_SCHEMA, "files": listed, **facts})
    return main


FACTS_SCHEMA = 1


MAX_RELATIVE_DIFFERENCE = 1e-3  # of a logit, relative to the largest logit if that is above 1
COMPARISON_BATCH_SIZE = 32


@dataclass(frozen=True)
class Parity:
    """The difference of an exported model from the original, on the same images."""

    images: int
    max_difference: float  # of a logit
    largest_logit: float  # of the original, as an absolute value
    agreement: float  # share of images with the same top class
    limit: float = MAX_RELATIVE_DIFFERENCE

    @property
    def within(self) -> bool:
        """Whether no logit differs by more than ``limit``, relative to the largest logit if that is above 1."""
        return self.max_difference <= self.limit * max(1.0, self.largest_logit)  # False for NaN


def compute_parity(reference: NDArray[Any], exported: NDArray[Any]) -> Parity:
    """Compare logits [N, K] of the network with those of the exported model.

    Example:
        >>> compute_parity(np.array([[2.0, 0.0], [0.0, 1.0]]), np.array([[2.0, 0.0], [1.0, 0.5]]))
        Parity(images=2, max_difference=1.0, largest_logit=2.0, agreement=0.5, limit=0.001)
    """
    return Parity(
        len(reference),
        float(np.abs(reference.astype(np.float64) - exported).max()),
        float(np.abs(reference).max()),
        float((reference.argmax(axis=1) == exported.argmax(axis=1)).mean()),
    )


def create_torch_predictor(module: nn.Module, spec: InputSpec, inside: str) -> Predictor:
    """Return the network, in eval mode on the CPU, with its preprocessing, as a function of arrays."""
    network = nn.Sequential(*create_preprocessing(spec, inside), module).eval()

    def predict(images: NDArray[Any]) -> NDArray[Any]:
        with torch.no_grad():
            logits: NDArray[Any] = network(torch.from_numpy(images)).float().numpy()
        return logits

    return predict


def compute_logits(
    predictors: Sequence[Predictor],
    images: ImageSet,
    index: Sequence[int],
    metadata: ExportMetadata,
    *,
    any_batch: bool = True,
    full_size: bool = False,
) -> list[NDArray[Any]]:
    """Return the logits [N, K] of several models for the same images.

    ``any_batch``: the models take batches of any size.  ``full_size``: decode large JPEG files at full size, as other
    programs do, and not as evaluation and prediction do.
    """
    # "resize" takes only images of equal size in a batch.
    step = COMPARISON_BATCH_SIZE if any_batch and metadata.inside != "resize" else 1
    side = decoded_side(metadata.input)
    parts: list[list[NDArray[Any]]] = []
    for i in range(0, len(index), step):
        part = index[i : i + step]
        pixels = [images.pixels(each) if full_size else read_pixels(images, each, side) for each in part]
        prepared = prepare_batch(pixels, metadata)
        parts.append([predict(prepared) for predict in predictors])
    return [np.concatenate(each) for each in zip(*parts, strict=True)]


def accuracy(logits: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the accuracy in [0, 1] of logits [N, K]."""
    return float((logits.argmax(axis=1) == labels).mean())


class _ExportedModule(nn.Module):
    """An exported model as a module, for ``measure_latency``; its input is always the same image."""

    def __init__(self, predictor: Predictor, image: NDArray[Any]) -> None:
        super().__init__()
        self.predictor, self.image = predictor, image

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.predictor(self.image))


def measure_exported_latency(
    predictors: Mapping[str, Predictor],
    image: NDArray[Any],
    spec: InputSpec,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Return ``evaluation.cost.measure_latency`` of exported models."""
    modules = {name: (_ExportedModule(predictor, image), spec) for name, predictor in predictors.items()}
    return measure_latency(modules, rounds=50, warmup=10, clock=clock)


def measure_network(
    module: nn.Module, architecture: str, spec: InputSpec, splits: DataSplits, *, int8: bool
) -> tuple[float, int]:
    """Return milliseconds for one image on one thread, and bytes, of a network's ONNX file.  It need not be trained."""
    content = convert_network(module, architecture, spec, splits, int8=int8, choose_ranges=False)
    return single_thread_latency(content, spec.size), len(content)


def convert_network(
    module: nn.Module,
    architecture: str,
    spec: InputSpec,
    splits: DataSplits,
    *,
    int8: bool,
    choose_ranges: bool = True,
) -> bytes:
    """Return a network's ONNX file, not compared with the network; int8 is calibrated by images of ``splits``.

    ``choose_ranges`` looks for the activation ranges that change the outputs least; it takes longer, and matters where
    accuracy does.
    """
    find_format("onnx")
    metadata = ExportMetadata(architecture, tuple(splits.class_names), spec, "none", int8=int8)
    network = export_graph(module.eval(), metadata)
    if int8:
        network, _ = quantize_network(network, calibration_images(splits, spec), choose=choose_ranges)
    return finalize_model(network, metadata)


def single_thread_latency(content: bytes, size: int) -> float:
    """Return the median milliseconds of an ONNX file for one image of ``size`` pixels, on one thread.

    They are the thread's own, so that a busy machine changes them little.
    """
    predictor = create_onnx_predictor(content, threads=1, patient=True)
    found = measure_exported_latency({"onnx": predictor}, _black_image("none", size), InputSpec(size), THREAD_CLOCK)
    return float(found["onnx"]["p50"])


class Exporter:
    """Converts, compares and measures one export."""

    def __init__(
        self,
        folder: Path,
        classifier: Classifier,
        label: str,
        options: ExportOptions,
        form: ExportFormat,
        note: MessageCallback,
    ) -> None:
        self.folder, self.options, self.form, self.note = folder, options, form, note
        self.classifier, self.label = classifier, label
        if (what := LABELS.get(classifier.architecture)) is not None:
            raise UsageError(f"{label} is {what} and cannot be exported: give the student, or use the file as it is")
        self.metadata = create_metadata(self.classifier, options)
        settings, own = export_data_settings(folder, options.data), run_data_settings(folder)
        self.splits = load_data(settings).measured
        if options.int8 and own is not None and settings.source == own.source:  # whose accuracy is measured
            check_unseen(folder.parent, self.splits.test, own, is_target=own.target is not None)
        if tuple(self.splits.class_names) != tuple(self.classifier.class_names):
            raise DataError(
                f"{self.splits.source} has the classes {format_names(self.splits.class_names)}, "
                f"the model {format_names(self.classifier.class_names)}: give the data that it was trained on"
            )
        if (ends := self.classifier.input.range) is not None:
            for images in (self.splits.train, self.splits.test):
                set_value_range(images, ends)  # other data may have another one
            if options.format == "page":
                self.note(
                    "images of more than 8 bits: a browser reads the high byte of their values, whatever the range of "
                    f"training, {format_range(ends)}: give the page images of 8 bits"
                )
        self.compared = class_balanced_indices(self.splits.test.labels.tolist(), COMPARED_IMAGES)
        self.reference = create_torch_predictor(self.classifier.module, self.classifier.input, options.inside)

    def files(self) -> tuple[ExportedFiles, dict[str, Any]]:
        """Return the files and the facts about them."""
        self.note(f"exporting {self.classifier.architecture} of {self.label} to {self.options.format}")
        threads, image = torch.get_num_threads(), _black_image(self.metadata.inside, self.classifier.input.size)
        try:
            # On busy cores PyTorch is a hundred times slower with all threads than with one.
            select_fastest(lambda: self.reference(image), [threads, 1][:threads], apply=torch.set_num_threads)
            files, facts = self._export_int8() if self.options.int8 else self._plain()
        finally:
            torch.set_num_threads(threads)
        return files, {
            "format": self.options.format,
            "stage": self.label if is_hub_model(self.label) else self.folder.name,
            "model_sha256": weights_sha256(self.folder),
            **{key: value for key, value in self.metadata.as_json().items() if key != "schema"},
            "data": self.splits.source,
            **facts,
            "versions": self._versions(),
        }

    def _plain(self) -> tuple[ExportedFiles, dict[str, Any]]:
        files = self.form.convert(self.classifier.module, self.metadata)
        facts: dict[str, Any] = dict.fromkeys(("parity", "prepared", "accuracy", "calibration", "latency_ms"))
        if self.form.open is None:
            self.note("this format runs on other machines only: converted, not compared with PyTorch")
            return files, facts
        answer = self.form.open(files, threads=torch.get_num_threads())
        found, prepared = self._compare(answer)
        times = self._measure_latency({self._engine: answer})
        return files, facts | {"parity": asdict(found), "prepared": prepared, "latency_ms": times}

    def _compare(self, answer: Predictor) -> tuple[Parity, dict[str, Any] | None]:
        """Compare with PyTorch on the same input and, if the file resizes images, on images resized by Pillow too."""
        images, any_batch, full = self.splits.test, self.form.any_batch, self.options.inside == "resize"
        reference, found = compute_logits(
            [self.reference, answer], images, self.compared, self.metadata, any_batch=any_batch, full_size=full
        )
        same = compute_parity(reference, found)
        self.note(_parity_message("PyTorch", same))
        if not same.within:
            raise ArtifactError(
                f"the export differs from the original: by {same.max_difference:.2g} in a logit (largest "
                f"{same.largest_logit:.3g}) on {same.images} test images, more than {same.limit:g} of it; not written"
            )
        if self.options.inside != "resize":
            return same, None
        plain = create_torch_predictor(self.classifier.module, self.classifier.input, "none")
        bare = without_preprocessing(self.metadata)
        (outside,) = compute_logits([plain], images, self.compared, bare, full_size=full)
        other = compute_parity(outside, found)
        self.note(_parity_message("images that Pillow has resized", other))
        return same, {"max_difference": other.max_difference, "agreement": other.agreement}

    def _export_int8(self) -> tuple[ExportedFiles, dict[str, Any]]:
        make, load = self.form.from_onnx, self.form.open
        assert make is not None
        assert load is not None
        threads = torch.get_num_threads()
        network = export_graph(self.classifier.module, self.metadata)
        plain = load(make(finalize_model(network, self.metadata), self.metadata), threads=threads)
        same, prepared = self._compare(plain)
        images = calibration_images(self.splits, self.classifier.input)
        small, ranges = quantize_network(network, images)
        files = make(finalize_model(small, self.metadata), self.metadata)
        quantized = load(files, threads=threads)
        test = range(len(self.splits.test))
        reference, found = compute_logits([self.reference, quantized], self.splits.test, test, self.metadata)
        labels, labeled = self.splits.test.labels, "test" not in self.splits.teacher_labels
        if not labeled:  # then accuracy is agreement with the float network
            labels = reference.argmax(axis=1)
        before, after = accuracy(reference, labels), accuracy(found, labels)
        difference = compute_parity(reference, found)
        right = f"{after:.2%} of {len(labels)} test images right, {before:.2%} before; " if labeled else ""
        unlabeled = "" if labeled else f"of {len(labels)} images without labels "
        self.note(f"int8: {right}{difference.agreement:.2%} {unlabeled}with the same top class as before")
        if ranges["batch"] is not None:
            self.note(f"int8: activation ranges are means over batches of {ranges['batch']} training images")
        self._check_accuracy_drop(before, after, len(labels))
        return files, {
            "parity": asdict(same),
            "prepared": prepared,
            "accuracy": {
                "images": len(labels),
                "before": before,
                "after": after,
                "max_drop": self.options.max_drop,
                "agreement": difference.agreement,
            },
            "calibration": {"images": len(images.calibration), "split": "train", "classes": images.classes, **ranges},
            "latency_ms": self._measure_latency({self._engine: plain, "int8": quantized}),
        }

    @property
    def _engine(self) -> str:
        """What the measured latency is of: a page's network runs in onnxruntime here, not in a browser."""
        return "onnx" if self.options.format == "page" else self.options.format

    def _check_accuracy_drop(self, before: float, after: float, images: int) -> None:
        if before - after > self.options.max_drop + 1e-9:
            raise ArtifactError(
                f"int8 loses {100 * (before - after):.2f} points of accuracy on {images} test images "
                f"({before:.2%} to {after:.2%}), more than --max-accuracy-drop {self.options.max_drop:g} allows; "
                "not written.\n"
                "Export without --int8, or allow more"
            )

    def _measure_latency(self, exported: dict[str, Predictor]) -> dict[str, Any]:
        image = _black_image(self.metadata.inside, self.classifier.input.size)
        found = measure_exported_latency({"pytorch": self.reference, **exported}, image, self.classifier.input)
        for name, each in found.items():
            times = f"{each['p50']:.2f} ms for one image (p50), {each['p95']:.2f} ms (p95)"
            self.note(f"{name:<12} {times}, {format_many(each['threads'], 'thread')}")
        return found

    def _versions(self) -> dict[str, str]:
        names = ["torch", *self.form.packages]
        return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _black_image(inside: str, size: int) -> NDArray[Any]:
    if inside == "resize":
        return np.zeros((1, size, size, 3), np.uint8)
    return np.zeros((1, 3, size, size), np.float32 if inside == "none" else np.uint8)


def _parity_message(other: str, found: Parity) -> str:
    return (
        f"compared with {other} on {found.images} test images: largest difference of a logit "
        f"{found.max_difference:.2g} (largest logit {found.largest_logit:.3g}), same top class on {found.agreement:.2%}"
    )
