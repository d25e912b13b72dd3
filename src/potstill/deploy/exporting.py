"""The work of ``export``, once it is clear what is wanted: convert, compare, quantize, time."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from potstill.data.datasets import load_data
from potstill.data.square import normalised, squared
from potstill.deploy.export import CALIBRATING, COMPARED, Note, Wish, bare, described, identity, settings_of
from potstill.deploy.formats.format import Answer, Files, Format
from potstill.deploy.int8 import quantized, spread
from potstill.deploy.measure import Parity, accuracy, logits_of, milliseconds, parity, torch_answer
from potstill.deploy.onnx_session import answering
from potstill.errors import ArtifactError, DataError
from potstill.models.model_file import load_model


class Exporting:
    """One export: everything but writing it.

    Args:
        folder: of the model.
        wish: checked already.
        form: the wished format.
        note: is told what was found.
    """

    def __init__(self, folder: Path, wish: Wish, form: Format, note: Note) -> None:
        self.folder, self.wish, self.form, self.note = folder, wish, form, note
        self.classifier = load_model(folder)
        self.what = described(self.classifier, wish)
        self.splits = load_data(settings_of(folder, wish.data)).measured
        if tuple(self.splits.class_names) != tuple(self.classifier.class_names):
            raise DataError(
                f"{self.splits.source} has the classes {_shown(self.splits.class_names)}, "
                f"the model {_shown(self.classifier.class_names)}: give the data that it was trained on"
            )
        self.compared = spread(self.splits.test.labels.tolist(), COMPARED)
        self.reference = torch_answer(self.classifier.module, self.classifier.input, wish.inside)

    def files(self) -> tuple[Files, dict[str, Any]]:
        """The files and the facts about them.

        Raises:
            ArtifactError: it cannot be exported, differs from the original, or int8 loses too much.
            DataError: an image that cannot be decoded.
        """
        self.note(f"exporting {self.classifier.architecture} of {self.folder} to {self.wish.format}")
        files, facts = self._int8() if self.wish.int8 else self._plain()
        return files, {
            "format": self.wish.format,
            "stage": self.folder.name,
            "model_sha256": identity(self.folder),
            **{key: value for key, value in self.what.as_json().items() if key != "schema"},
            "data": self.splits.source,
            **facts,
            "versions": self._versions(),
        }

    def _plain(self) -> tuple[Files, dict[str, Any]]:
        files = self.form.convert(self.classifier.module, self.what)
        if self.form.open is None:
            self.note("this format runs on other machines only: converted, not compared with PyTorch")
            return files, {"parity": None, "prepared": None, "accuracy": None, "calibration": None, "latency_ms": None}
        answer = self.form.open(files)
        found, prepared = self._compare(answer)
        times = self._times({self.wish.format: answer if self.wish.format != "onnx" else _timed(files[".onnx"])})
        return files, {
            "parity": found.as_json(),
            "prepared": prepared,
            "accuracy": None,
            "calibration": None,
            "latency_ms": times,
        }

    def _compare(self, answer: Answer) -> tuple[Parity, dict[str, Any] | None]:
        """With PyTorch on the same input, and where images are resized inside, with images prepared outside too."""
        images, any_batch = self.splits.test, self.form.any_batch
        reference, found = logits_of([self.reference, answer], images, self.compared, self.what, any_batch=any_batch)
        same = parity(reference, found)
        self.note(_compared("PyTorch", same))
        if not same.within:
            raise ArtifactError(
                f"the export differs from the original: by {same.max_difference:.2g} in a logit (largest "
                f"{same.largest_logit:.3g}) on {same.images} test images, more than {same.limit:g} of it; not written"
            )
        if self.wish.inside != "resize":
            return same, None
        plain = torch_answer(self.classifier.module, self.classifier.input, "none")
        (outside,) = logits_of([plain], images, self.compared, bare(self.what))
        other = parity(outside, found)
        self.note(_compared("images that Pillow has resized", other))
        return same, {"max_difference": other.max_difference, "agreement": other.agreement}

    def _int8(self) -> tuple[Files, dict[str, Any]]:
        from potstill.deploy.formats.onnx import finished, network_graph

        network = network_graph(self.classifier.module, self.what)
        plain = finished(network, described(self.classifier, self.wish))
        same, prepared = self._compare(answering(plain))
        images, chosen = self._calibration()
        content = finished(quantized(network, images), self.what)
        test = range(len(self.splits.test))
        reference, found = logits_of([self.reference, answering(content)], self.splits.test, test, self.what)
        labels = self.splits.test.labels
        before, after = accuracy(reference, labels), accuracy(found, labels)
        difference = parity(reference, found)
        self.note(
            f"int8: {after:.2%} of {len(labels)} test images right, {before:.2%} before; "
            f"{difference.agreement:.2%} with the same top class as before"
        )
        self._refuse_loss(before, after, len(labels))
        return {".onnx": content}, {
            "parity": same.as_json(),
            "prepared": prepared,
            "accuracy": {
                "images": len(labels),
                "before": before,
                "after": after,
                "max_drop": self.wish.max_drop,
                "agreement": difference.agreement,
            },
            "calibration": {"images": len(images), "split": "train", "classes": chosen, "method": "MinMax"},
            "latency_ms": self._times({"onnx": _timed(plain), "int8": _timed(content)}),
        }

    def _calibration(self) -> tuple[NDArray[np.float32], int]:
        train, spec = self.splits.train, self.classifier.input
        index = spread(train.labels.tolist(), CALIBRATING)
        squares = np.stack([squared(train.pixels(i), spec) for i in index])
        return normalised(squares, spec), len(set(train.labels[index].tolist()))

    def _refuse_loss(self, before: float, after: float, images: int) -> None:
        if before - after > self.wish.max_drop + 1e-9:
            raise ArtifactError(
                f"int8 loses {100 * (before - after):.2f} points of accuracy on {images} test images "
                f"({before:.2%} to {after:.2%}), more than --max-drop {self.wish.max_drop:g} allows; not written.\n"
                "Export without --int8, or allow more"
            )

    def _times(self, exported: dict[str, Answer]) -> dict[str, Any]:
        image = _blank(self.what.inside, self.classifier.input.size)
        found = milliseconds({"pytorch": self.reference, **exported}, image, self.classifier.input)
        for name, each in found.items():
            self.note(f"{name:<12} {each['p50']:.2f} ms for one image (p50), {each['p95']:.2f} ms (p95)")
        return found

    def _versions(self) -> dict[str, str]:
        names = ["torch", *self.form.packages]
        return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _timed(content: bytes) -> Answer:
    return answering(content, threads=torch.get_num_threads(), patient=True)


def _blank(inside: str, size: int) -> NDArray[Any]:
    if inside == "resize":
        return np.zeros((1, size, size, 3), np.uint8)
    return np.zeros((1, 3, size, size), np.float32 if inside == "none" else np.uint8)


def _compared(other: str, found: Parity) -> str:
    return (
        f"compared with {other} on {found.images} test images: largest difference of a logit "
        f"{found.max_difference:.2g} (largest logit {found.largest_logit:.3g}), same top class on {found.agreement:.2%}"
    )


def _shown(names: tuple[str, ...]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
