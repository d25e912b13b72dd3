"""A trained model as a file that runs without our Python code, compared with the original before it is written."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.artifacts import digest, write_bytes
from potstill.deploy.description import INSIDE, Description
from potstill.deploy.evaluate import data_of_run
from potstill.deploy.formats import find_format
from potstill.deploy.formats.format import Files, Format
from potstill.deploy.onnx_model import facts_path
from potstill.errors import ArtifactError, DataError, UsageError, nearest
from potstill.experiments.run_folder import find_model
from potstill.experiments.stage_names import in_order, role
from potstill.sealed import read_sealed_json, write_sealed_json

SCHEMA = 1
FOLDER, NAME = "export", "model"
COMPARED, CALIBRATING = 200, 256  # images: for the comparison with PyTorch, to calibrate int8

Note = Callable[[str], None]


@dataclass(frozen=True)
class Wish:
    """What is to be exported, and how.

    Attributes:
        format: one of ``formats.FORMATS``.
        inside: how much of the preparation of images becomes part of the file: "none", "normalise" or "resize".
        int8: quantize to 8 bits; ONNX only.
        max_drop: largest loss of accuracy on the test split that int8 may cost, as a share in [0, 1].
        output: the file, with the format's suffix; None: ``export/`` in the folder of the model.
        data: where the run's data are now, if not where its recipe says.
    """

    format: str = "onnx"
    inside: str = "none"
    int8: bool = False
    max_drop: float = 0.01
    output: Path | None = None
    data: str | None = None


def export(model: Path | str, stage: str | None = None, wish: Wish | None = None, *, note: Note = print) -> Path:
    """Write an exported model, and beside it ``NAME.json`` with its SHA-256 and what was measured.

    Args:
        model: a run folder, or the folder of one of its models.
        stage: of a run folder: "teacher", "baseline", "distilled" and so on; None: distilled, else baseline, else
            teacher.
        wish: all else.
        note: is told what was found, line by line.

    Returns:
        The file; of several, the one to open.

    Raises:
        UsageError: an unknown format, a wrong option, or a package that is not installed.
        DataError: the run's images are not there, or have other classes.
        ArtifactError: no such stage; a model that cannot be exported, or whose export differs; int8 that loses more
            than ``max_drop``.
        StorageError: it cannot be written.
    """
    wish = wish or Wish()
    form = find_format(wish.format)
    _check(wish, form)
    folder = _folder(Path(model), stage)

    from potstill.deploy.exporting import Exporting

    job = Exporting(folder, wish, form, note)
    files, facts = job.files()
    return _write(folder, wish, form, files, facts)


def settings_of(folder: Path, source: str | None) -> Any:
    """The data settings of the run that a model stands in, with another source where one is given.

    Raises:
        DataError: a model without a run, and no source either.
    """
    own = data_of_run(folder)
    if own is None and source is None:
        raise DataError(
            f"{folder} stands in no run, so that its images are not known, on which an export is compared with it; "
            "name them: --data DIR"
        )
    if own is None:
        from potstill.data.settings import DataSettings

        return DataSettings(source=str(source))
    return own if source is None else own.model_copy(update={"source": source, "target": None})


def _check(wish: Wish, form: Format) -> None:
    if wish.inside not in INSIDE:
        raise UsageError(f"--inside is one of {', '.join(INSIDE)}, got {wish.inside!r}{nearest(wish.inside, INSIDE)}")
    if wish.inside not in form.inside:
        raise UsageError(f"the format {wish.format} takes --inside {' or '.join(form.inside)}, not {wish.inside}")
    if wish.int8 and wish.format != "onnx":
        raise UsageError(f"--int8 goes with --format onnx, not with {wish.format}")
    output = wish.output
    if output is not None and (not output.name.endswith(form.suffix) or output.name == form.suffix or output.is_dir()):
        raise UsageError(f"--output is a file that ends in {form.suffix}, got {str(output)!r}")
    if not 0 <= wish.max_drop <= 1:
        raise UsageError(f"--max-drop is a share from 0 to 1 (0.01 is one point of accuracy), got {wish.max_drop:g}")


def _folder(model: Path, stage: str | None) -> Path:
    if stage is None:
        return find_model(model)
    trained = in_order(each.parent.name for each in model.glob("*/model.json"))
    if not trained:
        raise ArtifactError(f"{model} is no run folder with a trained model, so it has no stage {stage!r}")
    if not role(stage) or stage not in trained:
        raise ArtifactError(f"{model} has no trained {stage!r}{nearest(stage, trained)}; it has {', '.join(trained)}")
    return model / stage


def _write(folder: Path, wish: Wish, form: Format, files: Files, facts: dict[str, Any]) -> Path:
    suffix = form.suffix
    main = wish.output or folder / FOLDER / f"{NAME}{'-int8' if wish.int8 else ''}{suffix}"
    stem = main.name.removesuffix(suffix)
    written = {f"{stem}{each}": content for each, content in files.items()}
    for name, content in written.items():
        write_bytes(main.with_name(name), content)
    listed = {name: {"bytes": len(content), "sha256": digest(content)} for name, content in written.items()}
    write_sealed_json(facts_path(main), {"schema": SCHEMA, "files": listed, **facts})
    return main


def identity(folder: Path) -> str:
    """SHA-256 of the weights that a model folder holds: says later whether an export is still of them."""
    return str(read_sealed_json(folder / "model.json")["sha256"])


def described(classifier: Any, wish: Wish) -> Description:
    """What an export of a ``Classifier`` takes and gives."""
    return Description(
        classifier.architecture, tuple(classifier.class_names), classifier.input, wish.inside, int8=wish.int8
    )


def bare(what: Description) -> Description:
    """The same without preparation inside."""
    return dataclasses.replace(what, inside="none")
