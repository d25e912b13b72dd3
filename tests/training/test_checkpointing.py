import pytest
import torch
from torch import nn

from potstill.errors import ArtifactError
from potstill.evaluation.metrics import StreamingMetrics, TermAverages
from potstill.io import write_checksummed
from potstill.training.checkpointing import (
    EpochState,
    add_prefix,
    load_checkpoint,
    pack_optimizer,
    save_checkpoint,
    strip_prefix,
    unpack_optimizer,
)


def test_tensors_and_facts_come_back(tmp_path):
    tied = torch.randn(3)
    tensors = {"a": tied, "b": tied, "half": torch.ones(2).bfloat16(), "count": torch.tensor(7)}
    facts = {"epoch": 3, "records": [{"lr": 1e-4, "best": True, "auc": None}]}
    save_checkpoint(tmp_path / "x", tensors, facts)
    loaded, read = load_checkpoint(tmp_path / "x")
    assert read == facts
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], tensors[key]) and loaded[key].dtype == tensors[key].dtype for key in tensors)


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path):
    path = tmp_path / "x"
    save_checkpoint(path, {"a": torch.arange(20.0)}, {"epoch": 1})
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for position in torch.randint(len(whole), (60,), generator=generator).tolist():
        for bit in (0, 7):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(ArtifactError, match="is damaged"):
                load_checkpoint(path)
    for length in (0, 10, 64, 65, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ArtifactError, match="is damaged"):
            load_checkpoint(path)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_an_optimizer_goes_on_as_if_nothing_had_happened(tmp_path, kind):
    def trained(steps, net, optimizer):
        for step in range(steps):
            optimizer.zero_grad()
            net(torch.full((2, 3), float(step))).square().sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    optimizer = kind(net.parameters(), lr=0.01, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    trained(3, net, optimizer)
    tensors, facts = pack_optimizer(optimizer)
    save_checkpoint(tmp_path / "x", add_prefix("o", tensors) | add_prefix("n", net.state_dict()), facts)
    trained(2, net, optimizer)

    other = nn.Linear(3, 2)
    resumed = kind(other.parameters(), lr=0.5)
    loaded, facts = load_checkpoint(tmp_path / "x")
    other.load_state_dict(strip_prefix("n", loaded))
    unpack_optimizer(resumed, strip_prefix("o", loaded), facts)
    trained(2, other, resumed)
    assert torch.equal(net.weight, other.weight)


def test_what_is_the_same_is_stored_once(tmp_path):
    weights = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    odd = torch.tensor([0.0, float("nan")])
    tensors = {"a": weights, "best/a": weights.clone(), "n": torch.tensor(3), "best/n": torch.tensor(3)}
    tensors |= {"odd": odd, "best/odd": odd.clone(), "zero": torch.zeros(2), "best/zero": -torch.zeros(2)}
    tensors |= {"half": torch.ones(4).bfloat16(), "best/half": torch.ones(4), "wide": torch.ones(2, 3)}
    tensors |= {"best/wide": torch.ones(3, 2), "image": torch.ones(1, 3, 2, 2)}
    tensors |= {"best/image": tensors["image"].contiguous(memory_format=torch.channels_last)}
    alike = {name: name.removeprefix("best/") for name in tensors if name.startswith("best/")}
    save_checkpoint(tmp_path / "x", tensors, {}, duplicates=alike)
    loaded, _ = load_checkpoint(tmp_path / "x")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        bits, expected = (each.contiguous().reshape(-1).view(torch.uint8) for each in (loaded[name], tensor))
        assert bits.tolist() == expected.tolist(), name
    assert (tmp_path / "x").stat().st_size < 6000  # 4000 bytes of weights
    loaded["best/a"].zero_()
    assert torch.equal(loaded["a"], weights)  # no memory of another's


def test_a_name_that_is_not_there_is_no_crash(tmp_path):
    text = b'{"__metadata__":{"facts":"{}","same":"{\\"a\\":\\"b\\"}"}}'
    write_checksummed(tmp_path / "x", len(text).to_bytes(8, "little") + text)
    with pytest.raises(ArtifactError, match="is no checkpoint"):
        load_checkpoint(tmp_path / "x")


def test_an_epoch_goes_on_upon_the_device_of_its_training():
    """A checkpoint is read on the CPU; "meta" stands for a GPU, which the CPU's tensors cannot be joined with either."""

    def state(device):
        return EpochState(StreamingMetrics(3, device=device), TermAverages(), lr=0.1)

    before, after = state("cpu"), state("meta")
    before.averages.update({"ce": torch.tensor(1.0)}, 4)
    before.metrics.update(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
    before.step = 1
    after.unpack(*before.pack())
    after.averages.update({"ce": torch.tensor(2.0, device="meta")}, 4)
    tensors, facts = after.pack()
    assert {value.device.type for value in tensors.values()} == {"meta"}
    assert [number for _, _, number in facts["terms"]] == [1, 2]
