"""Commands that use a trained model: predict, evaluate, export, benchmark, push, serve."""

import json
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from potstill.cli.check import FollowLinks, SkipBad, print_skipped
from potstill.code_references import allowed_code
from potstill.console import Progress, escape_control, print_next_command, print_section, silence_native_stderr
from potstill.errors import REPEAT, DataError, RemoteFailure, Stopped, UsageError, advising
from potstill.formatting import format_duration, format_scaled
from potstill.io import read_checksummed_json
from potstill.training.callbacks import SignalHandler

if TYPE_CHECKING:
    from potstill.export.predict import Prediction


Model = Annotated[
    Path,
    typer.Argument(
        metavar="RUN_OR_MODEL",
        help="A run folder (its distilled student), a model folder, ARCH@WEIGHTS, a weight file, or hf-hub:USER/NAME.",
    ),
]
Classes = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Class names, one per line, for weights without class names; or cifar10, cifar100, imagenet-1k, "
        "imagenet-21k.",
    ),
]
AllowCode = Annotated[bool, typer.Option("--allow-code", help="Run the code that the model file names.")]
WithCascade = Annotated[
    bool, typer.Option("--cascade", help="Let the teacher answer where the student is not confident.")
]
Risk = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Of a cascade: largest share of images that the student gets wrong and the teacher would have got "
        "right.  [default: 0.05]",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def predict(
    model: Model,
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATHS...", help="Images, folders of images, videos, or a camera such as /dev/video0."),
    ],
    top: Annotated[int, typer.Option("--top", "--top-k", min=1, help="Number of classes for each image.")] = 3,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a table, .csv or .parquet, a row for each image.")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(metavar="P", min=0.0, max=1.0, help='Below this probability the prediction is "unknown".'),
    ] = None,
    every: Annotated[int, typer.Option(metavar="N", min=1, help="Of videos, every N-th frame.")] = 1,
    cascade: WithCascade = False,
    risk: Risk = None,
    classes: Classes = None,
    allow_code: AllowCode = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Exit with 0 though files cannot be read; they have an error as result.")
    ] = False,
    follow_links: FollowLinks = False,
    as_json: AsJson = False,
) -> None:
    """Classify images and frames of videos.

    Files in folders that are no images are listed on stderr.  Exits with code 3 if an image cannot be read.
    """
    from potstill.data.sources import ignored_files_note
    from potstill.export import predict as predicting

    promised = _promised_risk(cascade, risk)
    if output is not None and as_json:
        raise UsageError("--output writes a table and --json prints: give one of them")
    if output is not None:
        predicting.check_table(output)
    found = predicting.find_images(paths, follow_links=follow_links)
    videos = [path for path in found.images if predicting.is_video(path)]
    if output is not None and any(path.is_char_device() for path in videos):
        raise UsageError("a camera has no end, at which a table could be written: leave --output out")
    label = ", ".join(map(str, paths[:3])) + (" ..." if len(paths) > 3 else "")
    if found.left_out:
        print_skipped(label, found.left_out)
    if found.passed_over:
        sys.stderr.write(escape_control(f"{label}: {ignored_files_note(found.passed_over)}") + "\n")
    with silence_native_stderr(), allowed_code(allow_code):
        predictor = predicting.create_predictor(model, classes=classes, risk=promised, note=_note)
        items = predicting.read_items(found.images, every)
        counted = _Counts(None if videos else len(found.images))
        predictions = counted.count(predictor.predict(items, top=top, threshold=threshold))
        if output is not None:
            shown = min(top, len(predictor.network.names))
            predicting.write_table(output, predictions, shown, cascade=cascade, video=bool(videos))
            sys.stdout.write(f"predictions: {escape_control(str(output))} ({counted.summary()})\n")
        elif as_json:
            sys.stdout.write(json.dumps([each.as_dict() for each in predictions], indent=2) + "\n")
        else:
            for each in predictions:
                sys.stdout.write(escape_control(_prediction_line(each)) + "\n")
    sys.stdout.flush()
    if cascade:
        _note(f"cascade: the teacher answered {counted.deferred:,} of {counted.images:,} images")
    if counted.broken and skip_bad:
        broken = [(path, reason.removeprefix(f"{path}: ")) for path, reason in counted.broken]
        print_skipped(label, broken, "unreadable")
    elif counted.broken:
        lines = "".join(f"\n{escape_control(reason)}" for _, reason in counted.broken)
        raise DataError(
            f"{len(counted.broken)} of {counted.images} images could not be read:{lines}\n"
            "For the exit code 0 all the same: --skip-bad"
        )


def _prediction_line(each: "Prediction") -> str:
    shown = ", ".join(f"{name} {share:.1%}" for name, share in each.classes) or "error"
    where = "" if each.frame is None else f" frame {each.frame}"
    who = "" if each.answered_by is None else f" ({each.answered_by})"
    return f"{each.path}{where}: {f'unknown ({shown})' if each.unknown else shown}{who}"


class _Counts:
    """Counts predictions as they pass, and shows on stderr how many there are and how fast they come.

    Attributes:
        images: so far.
        deferred: those that a teacher has answered.
        unknown: those below the threshold.
        broken: path and reason of those that could not be read.
    """

    DELAY_SECONDS, LINE_SECONDS = 5.0, 10.0  # until the first line, and between lines; on a terminal one line changes

    def __init__(self, total: int | None) -> None:
        self.total = total
        self.images = self.deferred = self.unknown = 0
        self.broken: list[tuple[str, str]] = []
        self._start = self._end = time.monotonic()

    def count(self, predictions: "Iterable[Prediction]") -> "Iterator[Prediction]":
        terminal = sys.stderr.isatty() and not sys.stdout.isatty()
        self._start = time.monotonic()
        due = self._start + self.DELAY_SECONDS
        for each in predictions:
            self.images += 1
            self.deferred += each.answered_by == "teacher"
            self.unknown += each.unknown
            if each.error is not None:
                self.broken.append((str(each.path), each.error))
            yield each
            self._end = time.monotonic()
            if self._end >= due:
                sys.stderr.write(f"\r{self._progress()}\33[K" if terminal else f"{self._progress()}\n")
                sys.stderr.flush()
                due = self._end + (0.5 if terminal else self.LINE_SECONDS)
        if terminal and self._end - self._start >= self.DELAY_SECONDS:
            sys.stderr.write("\r\33[K")

    def summary(self) -> str:
        parts = [f"{self.images:,} image{'' if self.images == 1 else 's'}, {self._speed():,.0f} images/s"]
        parts += [f"{self.unknown:,} unknown"] if self.unknown else []
        parts += [f"{len(self.broken):,} could not be read"] if self.broken else []
        return ", ".join(parts)

    def _speed(self) -> float:
        return self.images / max(self._end - self._start, 1e-9)

    def _progress(self) -> str:
        speed = self._speed()
        if self.total is None:
            return f"{self.images:,} images  {speed:,.0f} images/s"
        left = format_duration((self.total - self.images) / speed)
        return f"{self.images:,} of {self.total:,} images  {speed:,.0f} images/s  {left} left"


def _note(line: str) -> None:
    sys.stderr.write(f"{escape_control(line)}\n")


def evaluate(
    model: Model,
    data: Annotated[
        str, typer.Option(metavar="DIR", help="Labelled images: a folder, a manifest, or the name of a data set.")
    ],
    classes: Classes = None,
    allow_code: AllowCode = False,
    skip_bad: SkipBad = False,
    follow_links: FollowLinks = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate a trained model on labelled images.

    Classes are matched by name.
    """
    from potstill.cli.results import metrics_lines
    from potstill.export.evaluate import evaluate as evaluate_model

    with silence_native_stderr(), allowed_code(allow_code):
        metrics: dict[str, Any] = evaluate_model(
            model, data, classes=classes, skip_bad=skip_bad, follow_links=follow_links, note=_note
        )
    skipped = metrics.get("skipped", ())
    if skipped:
        print_skipped(data, skipped)
    if as_json:
        sys.stdout.write(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write("\n".join(metrics_lines(metrics)) + "\n")


Run = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="A run folder, the folder of one of its models, or hf-hub:USER/NAME."),
]
RunData = Annotated[str | None, typer.Option("--data", metavar="DIR", help="The run's data, if it has moved.")]
FinetuningEpochs = Annotated[
    int | None,
    typer.Option(
        "--epochs", metavar="N", min=1, help="Epochs of the fine-tuning.  [default: a quarter of the student's]"
    ),
]
FinetuningSettings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting of the fine-tuning; may be repeated."),
]
Stage = Annotated[
    str | None, typer.Option("--model", metavar="STAGE", help="teacher, baseline or distilled.  [default: distilled]")
]
FormatName = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="NAME",
        help="onnx, openvino, litert, ncnn, page (for browsers), executorch, coreml, torch-export; or all-that-run.",
    ),
]
Preprocessing = Annotated[
    str,
    typer.Option(
        "--preprocessing",
        metavar="none|normalise|resize",
        help="Preprocessing that the file includes: none (its input is normalised), normalise (its input is pixels of "
        "the network's size), resize (its input is pixels of any size).",
    ),
]


def export(
    run: Run,
    model: Stage = None,
    form: FormatName = "onnx",
    preprocessing: Preprocessing = "none",
    int8: Annotated[bool, typer.Option("--int8", help="Quantize to int8, calibrated on training images.")] = False,
    max_drop: Annotated[
        float | None,
        typer.Option(
            "--max-accuracy-drop",
            metavar="SHARE",
            help="Largest loss of test accuracy by --int8; 0.01 is one percentage point.  [default: 0.01]",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="[default: export/ beside the model]")] = None,
    data: RunData = None,
    runtime: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="onnxruntime-web for --format page.  [default: got by npm, once]"),
    ] = None,
    prune: Annotated[
        str | None,
        typer.Option(
            metavar="TARGET",
            help="Remove channels of the student and fine-tune it with its teacher: 0.5 (share of the weights to "
            "remove), 2MB (file), 5ms (one image, one thread of this CPU), or 5ms,2MB.",
        ),
    ] = None,
    epochs: FinetuningEpochs = None,
    settings: FinetuningSettings = None,
    allow_code: AllowCode = False,
) -> None:
    """Export a trained model for another inference engine.

    The exported model is compared with PyTorch on images of the run's test split.  A file NAME.json beside it holds
    its SHA-256 and the measurements.
    """
    from potstill.export.exporter import export as export_model
    from potstill.export.onnx import facts_path
    from potstill.export.options import ALL_THAT_RUN, MAX_DROP, ExportOptions, check_all_options

    if max_drop is not None and not int8:
        raise UsageError(f"--max-accuracy-drop {max_drop:g} is for quantized files: add --int8")
    drop = MAX_DROP if max_drop is None else max_drop
    options = ExportOptions(form, preprocessing, int8, drop, output, data, runtime)
    if prune is None and (epochs or settings):
        raise UsageError("--epochs and --set are for the fine-tuning after --prune; --prune 0 fine-tunes all channels")
    with allowed_code(allow_code):
        if prune is not None:
            from potstill.sweep.shrink import Finetuning, parse_target, prune_run

            check_all_options(options)  # before the fine-tuning, which takes long
            target, finetuning = parse_target(prune), Finetuning(epochs, tuple(settings or ()), data, int8)
            with advising(REPEAT), SignalHandler() as stopping, Progress() as progress:
                run = prune_run(run, model, target, finetuning, observer=progress, stopping=stopping)
            model = None
            _note(f"pruned: {run}")
        if form == ALL_THAT_RUN:
            from potstill.export.exporter import export_all, export_table

            found = export_all(run, model, options, note=_note)
            sys.stdout.write(escape_control(export_table(found), keep="\n"))
            return
        path = export_model(run, model, options, note=_note)
    sizes = [each["bytes"] for each in read_checksummed_json(facts_path(path))["files"].values()]
    sys.stdout.write(f"export: {escape_control(str(path))} ({format_scaled(sum(sizes), 'B')})\n")
    if form == "onnx":
        sys.stdout.write(f"next:   potstill predict {escape_control(shlex.quote(str(path)))} IMAGE\n")
    if form == "page":
        sys.stdout.write("next:   open it in a browser; for the camera of a phone, put it on a server with https\n")


def shrink(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    max_loss: Annotated[
        float, typer.Option("--max-loss", metavar="POINTS", help="Largest loss of accuracy, in percentage points.")
    ] = 1.0,
    int8: Annotated[bool, typer.Option("--int8/--no-int8", help="Quantize the files to int8.")] = True,
    model: Annotated[
        str | None, typer.Option("--model", metavar="STAGE", help="distilled or baseline.  [default: distilled]")
    ] = None,
    epochs: FinetuningEpochs = None,
    settings: FinetuningSettings = None,
    data: RunData = None,
    allow_code: AllowCode = False,
) -> None:
    """Find the smallest file of a run's student that loses at most so many points, with 95 % confidence.

    Channels are removed step by step, and each network is fine-tuned with the run's teacher, whose outputs are cached.
    """
    from potstill.report.sweep import render_shrink
    from potstill.sweep.shrink import Finetuning
    from potstill.sweep.shrink import shrink as search

    finetuning = Finetuning(epochs, tuple(settings or ()), data, int8)
    with allowed_code(allow_code), advising(REPEAT), SignalHandler() as stopping, Progress() as progress:
        folder, found = search(run, model, max_loss, finetuning, observer=progress, stopping=stopping)
    page, lines = render_shrink(folder)
    print_section(f"shrink {folder}: {page}", lines)
    print_next_command(["potstill", "predict", found["file"], "IMAGE"])


def benchmark(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILES...", help="Exported files: .onnx, .xml, .tflite, .ncnn.param.")
    ],
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 1,
    threads: Annotated[int, typer.Option(min=0, help="Threads of each engine; 0: as many as cores.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each file.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Measure the latency of exported files on this device.

    Needs the files' engines, but not PyTorch.  The files take turns.
    """
    from potstill.export.benchmark import benchmark as measure

    with silence_native_stderr():
        found = measure(files, batch=batch, threads=threads, rounds=rounds)
    if as_json:
        sys.stdout.write(json.dumps([each.as_dict() for each in found], indent=2) + "\n")
        return
    width = max(len(escape_control(each.file)) for each in found)
    lines = [f"{found[0].machine}, {found[0].threads} threads, batches of {batch}"]
    lines += [
        f"{escape_control(each.file):<{width}}  {each.bytes / 2**20:6.1f} MiB  {each.p50_ms:8.2f} ms (p50)  "
        f"{each.p95_ms:8.2f} ms (p95)  {each.images_per_second:8.1f} images/s  {each.engine} {each.version}"
        for each in found
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, whose student is sent.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="Repository of the hub: USER/NAME.")],
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    update: Annotated[bool, typer.Option("--update", help="Add a commit to a repository that exists.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent, and send nothing.")] = False,
) -> None:
    """Publish a run's student on the Hugging Face hub: weights, model.json, recipe and model card.

    The way back: potstill predict hf-hub:REPO IMAGE
    """
    from potstill.export import push as publishing

    publication = publishing.prepare(run, repository)
    if dry_run:
        kind = "private " if private else ""
        lines = [f"would be sent to the {kind}repository {repository}:", ""]
        lines += [f"  {name:<18} {format_scaled(len(content), 'B')}" for name, content in publication.files.items()]
        sys.stdout.write(escape_control("\n".join([*lines, "", publication.card]), keep="\n"))
        return
    address = publishing.push(publication, private=private, update=update)
    sys.stdout.write(f"pushed: {escape_control(address)}\nnext:   potstill predict hf-hub:{repository} IMAGE\n")


def _promised_risk(cascade: bool, risk: float | None) -> float | None:
    """Return the risk of a cascade, given or the default; None without ``--cascade``."""
    from potstill.evaluation.cascade import DEFAULT_RISK

    if risk is not None and not cascade:
        raise UsageError(f"--risk {risk:g} is for a cascade of student and teacher: add --cascade")
    return (DEFAULT_RISK if risk is None else risk) if cascade else None


def serve(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="A run folder, the name of a run in --output-dir, a model folder, or hf-hub:USER/NAME."
        ),
    ],
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one.")] = 8000,
    output_dir: Annotated[Path, typer.Option("--output-dir", metavar="DIR", help="Folder of the runs to show.")] = Path(
        "runs"
    ),
    allow_code: AllowCode = False,
) -> None:
    """Serve a run's models on a local web page."""
    try:
        from potstill.serve.server import serve as serve_page
    except ImportError as error:
        if error.name not in ("fastapi", "uvicorn", "starlette", "h11"):
            raise
        raise UsageError(f'serve needs {error.name}\nInstall: pip install "potstill[serve]"') from error

    def print_address(address: str) -> None:
        sys.stdout.write(escape_control(f"{address}  (Ctrl-C stops it)") + "\n")
        sys.stdout.flush()

    below = output_dir / run
    try:
        with allowed_code(allow_code):
            serve_page(
                below if not run.exists() and below.is_dir() else run,
                host=host,
                port=port,
                output_dir=output_dir,
                on_start=print_address,
            )
    except Stopped as stopped:  # the normal end: no message
        raise RemoteFailure(stopped.exit_code) from None
