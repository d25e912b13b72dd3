"""Calibrate a trained student by one temperature, in the weights of its last layer.

Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.data.loader import Loader
from potstill.evaluation.final_metrics import fit_temperature, temperature_pays
from potstill.evaluation.metrics import StreamingMetrics
from potstill.evaluation.predictions import evaluation_mode
from potstill.features.stages import find_stages
from potstill.formatting import format_percent
from potstill.models.model_file import Classifier
from potstill.training.callbacks import Observer
from potstill.training.checkpointing import EpochRecord
from potstill.training.devices import Compute


@torch.no_grad()
def scale_logits(
    student: Classifier, val: Loader, compute: Compute, observer: Observer, name: str
) -> tuple[dict[str, Any], EpochRecord]:
    """Divide the student's last layer by the temperature fitted on val, if that lowers the NLL there beyond doubt.

    In the weights, the temperature holds for every use of the model: predictions, exports, a further training.

    Returns:
        ``temperature``, ``images``, and ``before`` and ``after`` with ``nll`` and ``ece`` on val; and all val metrics.
        Both empty if nothing was changed.
    """
    network, size = student.module, student.input.size
    logits, labels = _logits_of(network, val)
    if not len(labels):
        return {}, {}
    temperature = fit_temperature(logits.double().softmax(dim=1).numpy(), labels.numpy())
    nll, scaled_nll = (F.cross_entropy(each, labels).item() for each in (logits, logits / temperature))
    pays = temperature_pays(nll - scaled_nll, len(labels), temperature)
    temperature, pays = compute.processes.share((temperature, pays))
    if not pays:
        return {}, {}
    example = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(compute.device)
    with evaluation_mode(network):
        path = find_stages(network, example).head
    if path is None:
        observer.note(f"{name}: not divided by the temperature {temperature:.3g}: no linear layer puts out the logits")
        return {}, {}
    head = network.get_submodule(path)
    saved = {key: each.detach().clone() for key, each in head.named_parameters()}
    for parameter in head.parameters():
        parameter.div_(temperature)
    scaled, _ = _logits_of(network, val)
    # Otherwise: parameters that serve in another place too, or two classes that are equal up to rounding.
    alike = torch.allclose(scaled * temperature, logits, rtol=1e-3, atol=1e-3)
    if not (alike and torch.equal(scaled.argmax(dim=1), logits.argmax(dim=1))):
        for key, parameter in head.named_parameters():
            parameter.copy_(saved[key])
        return {}, {}
    before, after = (_metrics_of(each, labels) for each in (logits, scaled))
    observer.note(
        f"{name}: logits divided by the temperature {temperature:.3g}, fitted on val: NLL {before['nll']:.3f} before, "
        f"{after['nll']:.3f} after; ECE {format_percent(before['ece'])} before, {format_percent(after['ece'])} after"
    )
    kept = [{metric: each[metric] for metric in ("nll", "ece")} for each in (before, after)]
    return {"temperature": temperature, "images": len(labels), "before": kept[0], "after": kept[1]}, after


def _metrics_of(logits: Tensor, labels: Tensor) -> EpochRecord:
    metrics = StreamingMetrics(logits.shape[1])
    metrics.update(logits, labels)
    return metrics.compute()


def _logits_of(network: nn.Module, val: Loader) -> tuple[Tensor, Tensor]:
    """Return logits and labels of the labelled images, on the CPU."""
    with evaluation_mode(network):
        parts = [(network(batch.images).float().cpu(), batch.labels.cpu()) for batch in val.epoch()]
    logits, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    return logits[labels >= 0], labels[labels >= 0]
