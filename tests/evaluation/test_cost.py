import time

import pytest
import torch
from torch import nn

from potstill.evaluation.cost import (
    MAX_SUMMARY_ROWS,
    THREAD_CLOCK,
    count_flops,
    count_parameters,
    measure_latency,
    measure_reference,
    model_summary,
)
from potstill.input_spec import InputSpec


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16 * 16, 5)
    )


def test_parameters_by_hand():
    assert count_parameters(network()) == 3 * 8 * 9 + 2 * 8 + (8 * 256 * 5 + 5)


def test_shared_parameters_count_once():
    layer = nn.Linear(4, 4)
    assert count_parameters(nn.Sequential(layer, layer)) == 20


def test_flops_are_two_per_multiply_add():
    convolution = 2 * (3 * 9) * 8 * 16 * 16
    linear = 2 * (8 * 256) * 5
    assert count_flops(network(), InputSpec(16)) == convolution + linear


def test_resnet18_has_its_published_costs():
    """He et al. 2016, table 1: 1.8 billion multiply-adds at 224 px; 11.69 million parameters as in torchvision."""
    timm = pytest.importorskip("timm")
    net = timm.create_model("resnet18")
    assert count_parameters(net) == 11_689_512
    assert count_flops(net, InputSpec(224)) / 2 == pytest.approx(1.8e9, rel=0.02)


def transformer_flops(width, depth, tokens, patch, classes=1000):
    """By hand, two per multiply-add: projections, the two products of attention, the MLP; patches and head."""
    block = 2 * tokens * width * 3 * width + 2 * tokens * width * width + 2 * 2 * tokens**2 * width
    block += 2 * 2 * tokens * width * 4 * width
    return depth * block + 2 * (tokens - 1) * 3 * patch**2 * width + 2 * width * classes


def test_fused_attention_of_torchvision_is_counted():
    """ViT-B/16: 35.1 billion.  In eval mode ``nn.MultiheadAttention`` runs as one kernel unknown to torch's counter."""
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        net = torchvision.models.vit_b_16()
    counted = count_flops(net, InputSpec(224))
    assert counted == transformer_flops(768, 12, 197, 16)
    assert counted == pytest.approx(35.1e9, rel=0.002)
    assert torch.backends.mha.get_fastpath_enabled()


def test_fused_attention_of_timm_is_counted():
    """ViT-Ti/16 by hand; Swin-T: 4.5 billion multiply-adds (Liu et al. 2021, table 1)."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        vit = timm.create_model("vit_tiny_patch16_224")
    assert count_flops(vit, InputSpec(224)) == transformer_flops(192, 12, 197, 16)
    swin = timm.create_model("swin_tiny_patch4_window7_224")
    assert count_flops(swin, InputSpec(224)) / 2 == pytest.approx(4.5e9, rel=0.01)


def test_attention_is_counted():
    """4 projections and the two products of 16 tokens of width 8, two heads."""
    timm = pytest.importorskip("timm")
    attention = timm.models.vision_transformer.Attention(8, num_heads=2)

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = attention

        def forward(self, images):
            return self.attention(images.flatten(1)[:, : 16 * 8].view(-1, 16, 8))

    assert count_flops(Tokens(), InputSpec(8)) == 2 * (16 * 8 * 8 * 4) + 2 * (16 * 16 * 8 * 2)


def test_looking_leaves_no_trace():
    net = network().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    count_flops(net, InputSpec(16))
    model_summary(net, InputSpec(16), ["a", "b"])
    measure_latency({"net": (net, InputSpec(16))}, rounds=1)
    assert all(module.training for module in net.modules())
    assert not any(module._forward_hooks for module in net.modules())
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_summary_names_layers_shapes_and_totals():
    lines = model_summary(network(), InputSpec(16), ["cat", "dog\x1b[2J", "c", "d", "e"]).splitlines()
    assert lines[0].split() == ["layer", "type", "output", "parameters"]
    assert lines[2].split() == ["0", "Conv2d", "8", "x", "16", "x", "16", "216"]
    assert lines[6].split() == ["4", "Linear", "5", "10,245"]
    text = "\n".join(lines)
    assert "parameters   10,477" in text
    assert "FLOPs        131,072 for one image" in text
    assert "classes      5: cat, dog?[2J, c, d, e" in text


def test_summary_of_half_precision_networks():
    assert "Linear" in model_summary(network().bfloat16(), InputSpec(16), ["a", "b"])


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet50", "mobilenetv3_small_050"])
def test_summary_of_deep_networks_stays_short_and_adds_up(name):
    timm = pytest.importorskip("timm")
    net = timm.create_model(name, num_classes=3)
    text = model_summary(net, InputSpec(224), ["a", "b", "c"])
    rows = text.split("\n\n")[0].splitlines()[2:]
    assert 20 < len(rows) <= MAX_SUMMARY_ROWS
    assert max(map(len, text.splitlines())) <= 120
    assert sum(int(row.split()[-1].replace(",", "")) for row in rows) == count_parameters(net)


def test_latency_takes_turns_and_records_its_circumstances():
    calls = []

    class Recorder(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, images):
            calls.append((self.name, tuple(images.shape), self.training, torch.is_grad_enabled()))
            return images

    models = {name: (Recorder(name), InputSpec(size)) for name, size in (("teacher", 8), ("student", 4))}
    result = measure_latency(models, batch=2, rounds=6, warmup=1)
    assert calls == [("teacher", (2, 3, 8, 8), False, False), ("student", (2, 3, 4, 4), False, False)] * 7
    for entry in result.values():
        assert 0 < entry["p50"] <= entry["p95"]
        assert (entry["batch"], entry["threads"], entry["device"]) == (2, torch.get_num_threads(), "cpu")


def test_latency_stops_when_its_time_is_up():
    calls = []
    net = nn.Identity()
    net.register_forward_hook(lambda module, args, output: calls.append(1))
    measure_latency({"net": (net, InputSpec(4))}, rounds=1000, warmup=0, seconds=0)
    assert len(calls) == 5


@pytest.mark.skipif(THREAD_CLOCK is time.perf_counter, reason="the thread's own clock is too coarse on this system")
def test_waiting_for_the_processor_is_no_latency_of_one_thread(monkeypatch):
    class Interrupted(nn.Module):  # as by another process, for at least 50 ms
        def forward(self, images):
            time.sleep(0.05)
            return images

    found = measure_latency({"net": (Interrupted(), InputSpec(4))}, rounds=3, warmup=0)["net"]
    assert found["p50"] >= 50
    monkeypatch.setattr("potstill.evaluation.cost.build_model", lambda *args, **options: Interrupted())
    assert 0 < measure_reference() < 25
