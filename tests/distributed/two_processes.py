"""What each of two processes finds; torchrun starts this file, and the tests read what it writes.

Not a test by itself: ``python two_processes.py FOLDER``, by torchrun.
"""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from potstill.data.image_sets import ArraySet
from potstill.data.loader import Loader
from potstill.distillation.cached_outputs import CachedTeacherOutputs
from potstill.distillation.distiller import MEASURED_STEPS, Distiller, TermScaling
from potstill.distillation.teacher_cache.cache import TeacherCache
from potstill.distillation.teacher_cache.record_format import RecordFormat
from potstill.distributed.group import ProcessGroup, process_group
from potstill.errors import PotstillError
from potstill.evaluation.metrics import BUFFER_ROWS, StreamingMetrics, TermAverages
from potstill.evaluation.predictions import predict_probabilities, predict_split
from potstill.input_spec import InputSpec
from potstill.methods.cosine import Cosine
from potstill.methods.kd import KD
from potstill.training.callbacks import SilentObserver
from potstill.training.devices import Compute, DistributedDistiller, gather_metrics
from potstill.training.optim import GradientAccumulator
from potstill.training.settings import TrainingSettings
from potstill.training.trainer import Trainer
from potstill.types import Batch

SPEC = InputSpec(size=4, mean=(0.5,) * 3, std=(0.25,) * 3)
BATCH, IMAGES, CLASSES = 8, 45, 3  # the last training batch of 5 is shared 3 to 2


def images():
    random = np.random.default_rng(0)
    labels = np.arange(IMAGES) % CLASSES
    pixels = random.integers(0, 128, (IMAGES, 4, 4, 3), dtype=np.uint8)
    pixels[np.arange(IMAGES), :, :, labels] += 60
    return ArraySet(pixels, labels, [f"{i:02d}" for i in range(IMAGES)])


def distiller():
    """Of a student that begins otherwise in each process, until they share."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(48, CLASSES))
    return Distiller(student, teacher, KD(temperature=2.0, alpha=0.5))


def loader(processes, order="shuffled"):
    return Loader(images(), SPEC, batch_size=BATCH, order=order, share=(processes.rank, processes.count))


def logits(count, classes=4):
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, classes, generator=generator), torch.randint(classes, (count,), generator=generator)


def metrics_of(processes, count):
    """The figures of logits of which each process has every second one."""
    metrics, (rows, labels) = StreamingMetrics(4), logits(count)
    metrics.update(rows[processes.rank :: processes.count], labels[processes.rank :: processes.count])
    found = gather_metrics(metrics, processes)
    assert (found is not None) == processes.first
    return processes.share(None if found is None else found.compute())


def terms_of(processes):
    averages = TermAverages()
    for step in range(processes.rank, 5, processes.count):
        averages.update({"ce": torch.tensor(float(step)), "kd": torch.tensor(2.0 * step)}, 10 + step, step + 1)
    found = TermAverages()
    found.merge(processes.gather(averages.pack()))
    return found.compute("here")


def train(processes, folder):
    found = distiller()
    with torch.no_grad():
        found.student[1].weight.add_(float(processes.rank))  # undone by the first process's
    compute = Compute(torch.device("cpu"), bf16=False, channels_last=False, processes=processes)
    settings = TrainingSettings(epochs=3, batch_size=BATCH, optimizer="sgd", lr=0.2, checkpoint_seconds=0)
    loaders = loader(processes), loader(processes, "listed")
    training = Trainer(
        found, *loaders, settings, compute, folder=folder, observer=SilentObserver(), classes=CLASSES
    )  # fmt: skip
    history = training.run()
    predicted = predict_probabilities(found.student, loaders[1], classes=CLASSES, processes=processes)
    return {
        "weights": [parameter.tolist() for parameter in found.student.parameters()],
        "records": [{key: record[key] for key in ("train", "val", "best")} for record in history.records],
        "predicted": None if predicted is None else [each.tolist() for each in predicted],
        "wrote": sorted(path.name for path in folder.rglob("*") if path.is_file()),
    }


def evaluate(processes, folder):
    """What each process gets of an evaluation by rows and in bins, and of one that fails in the second's images."""
    network = distiller().student
    split = [
        predict_split(
            network, loader(processes, "listed"), classes=CLASSES, processes=processes, file=folder / f"{at}.npy",
            max_values=at,
        )
        for at in (10**6, 0)
    ]  # fmt: skip
    with torch.no_grad():
        network[3].bias.fill_(torch.nan if processes.rank else 0.0)
    errors = []
    for what in ("x", ""):
        try:
            predict_probabilities(network, loader(processes, "listed"), classes=CLASSES, processes=processes, what=what)
        except PotstillError as error:
            errors.append([type(error).__name__, str(error), error.exit_code])
    return {
        "predicted": [None if each is None else [each.predicted.tolist(), each.auc_micro] for each in split],
        "errors": errors,
        "first": processes.run_on_first(lambda: processes.rank),
    }


def reductions(processes):
    """How many all-reduces each training step has, of every kind and of any origin, as torch's profiler sees them."""

    def count(module, call, sync=lambda: None):
        optimizer, counts = torch.optim.SGD(module.parameters(), 0.1), []
        for batch in itertools.islice(itertools.cycle(list(loader(processes).epoch(0))), MEASURED_STEPS + 3):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                call(batch)
                optimizer.step()
                sync()
            counts.append(sum(each.count for each in profile.key_averages() if each.key == "c10d::allreduce_"))
        return counts

    def of(sharing):
        def step(batch):
            with processes.stepping(), sharing.step(True):
                sharing.call(batch.images, batch.labels).loss.backward()

        return count(sharing.distiller.student, step, sharing.sync_method_buffers)

    found = {}
    for static in (True, False):
        student = distiller().student
        plain = DistributedDataParallel(student, static_graph=static, find_unused_parameters=not static)
        found[f"plain {static}"] = count(
            student,
            lambda batch, plain=plain: torch.nn.functional.cross_entropy(plain(batch.images), batch.labels).backward(),
        )
        found[f"distiller {static}"] = of(DistributedDistiller(distiller(), processes, static_graph=static))
    for scaling in (None, "auto"):
        network = distiller()
        hinted = Distiller(
            network.student, network.teacher.networks[0], Cosine(), example=torch.zeros(2, 3, 4, 4), scaling=scaling
        )
        found[f"scaling {scaling}"] = of(DistributedDistiller(hinted, processes))
    return found


def held_back(processes):
    """Gradients after three of four batches of an update, and after the last: not exchanged, exchanged."""
    found = distiller()
    sharing, weight = DistributedDistiller(found, processes), found.student[3].bias
    gradients, norms = GradientAccumulator(torch.optim.SGD(found.student.parameters()), []), []
    for position, batch in enumerate(loader(processes).epoch(0)):
        if position == 4:
            break
        with sharing.step(position == 3):
            gradients.add(sharing.call(batch.images, batch.labels), 4)
        norms.append(weight.grad.tolist())
    return norms[-2:]


def scaled(processes):
    """The factor of a term on a hidden layer of which each process sees another size."""
    weight, scaling = torch.nn.Parameter(torch.tensor(1.0)), TermScaling()
    hidden = weight * 1.0
    logits = hidden.reshape(1, 1)
    terms = {"ce": logits.sum(), "hint": (2.0 + 6.0 * processes.rank) * hidden}
    batch = Batch(torch.zeros(1, 3, 2, 2), torch.tensor([0]))
    return scaling(terms, {"ce"}, logits, batch, [weight])["hint"].item()


def fill(processes, folder):
    """A store that both fill: what each has asked, and what is there afterwards."""
    found, asked = distiller(), []
    teacher = found.teacher.networks[0]
    teacher.register_forward_hook(lambda *_: asked.append(1))
    batches = loader(processes)
    record = RecordFormat("float32", CLASSES, 0)
    store = TeacherCache.open(folder, {"who": "two"}, record, IMAGES, {})
    recorded = CachedTeacherOutputs(
        found, batches, [store], autocast=torch.no_grad, warn=lambda text: sys.exit(text), processes=processes
    )
    counts = []
    for epoch in (0, 0, 0):  # one view
        recorded.start_epoch(epoch)
        for batch in batches.epoch(epoch):
            recorded(batch)
        recorded.flush()
        counts.append(len(asked))
    coverage = store.coverage(1)
    recorded.close()
    return {"asked": counts, "coverage": coverage, "counts": vars(recorded.counts)}


def main(folder):
    with process_group() as processes:
        own = folder / str(processes.rank)
        own.mkdir()
        tensors = [torch.full((2, 2), float(processes.rank)), torch.tensor([processes.rank, 7])]
        processes.share_tensors(tensors)
        found = {
            "place": [processes.rank, processes.count, processes.local_rank, processes.local_count],
            "share": processes.share({"rank": processes.rank}),
            "gather": processes.gather(f"rank {processes.rank}"),
            "highest": processes.highest(processes.rank, 5 - processes.rank),
            "add": processes.add({"a": torch.tensor([1, processes.rank])})["a"].tolist(),
            "shared tensors": [tensor.tolist() for tensor in tensors],
            "metrics": {count: metrics_of(processes, count) for count in (7, 1001, BUFFER_ROWS + 501)},
            "terms": terms_of(processes),
            "training": train(processes, own),
            "held back": held_back(processes),
            "evaluation": evaluate(processes, folder),
            "reductions": reductions(processes),
            "scaled": scaled(processes),
            "store": fill(processes, folder / "store"),
        }
        (folder / f"{processes.rank}.json").write_text(json.dumps(found))


def alone(folder):
    """The same training in a single process."""
    return train(ProcessGroup(), folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
