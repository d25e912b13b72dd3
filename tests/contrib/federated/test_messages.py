import numpy as np
import pytest
import torch

from potstill.contrib.federated.messages import (
    Message,
    arrays_to_state_dict,
    check_reply,
    pack,
    state_dict_to_arrays,
    unpack,
)
from potstill.errors import ArtifactError, UsageError

STATE = {"conv.weight": torch.zeros(2, 3), "bn.num_batches_tracked": torch.tensor(4)}


def test_a_message_comes_back_whole():
    message = Message(
        "train", state_dict_to_arrays(STATE) | {"logits": np.ones((2, 3), np.float32)}, {"images": 5.0}, {"a": "é"}
    )
    again = unpack(pack(message))
    assert (again.task, again.numbers, again.texts) == ("train", {"images": 5.0}, {"a": "é"})
    assert {name: (value.shape, value.dtype) for name, value in again.arrays.items()} == {
        "state/conv.weight": ((2, 3), np.float32),
        "state/bn.num_batches_tracked": ((), np.int64),
        "logits": ((2, 3), np.float32),
    }
    assert int(arrays_to_state_dict(again.arrays)["bn.num_batches_tracked"]) == 4


def test_its_bytes_are_the_arrays_and_a_short_header():
    arrays = {"state/w": np.zeros(1000, np.float32)}
    assert 4000 < len(pack(Message("train", arrays))) < 4000 + 300


def test_channels_last_weights_keep_their_order():
    weight = torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)
    assert arrays_to_state_dict(unpack(pack(Message("train", state_dict_to_arrays({"w": weight})))).arrays)[
        "w"
    ].flatten().tolist() == list(range(24))


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\xff" * 64, pack(Message("train"))[:-3]], ids=["none", "few", "noise", "cut off"]
)
def test_other_bytes_are_refused(content):
    with pytest.raises(ArtifactError, match="a message cannot be read"):
        unpack(content)


def test_a_client_may_send_weights_logits_and_counts():
    good = Message("train", state_dict_to_arrays(STATE), {"images": 3.0, "loss": 0.5})
    assert check_reply(good, state=STATE) is good
    logits = Message("answer", {"logits": np.zeros((4, 3), np.float32)}, {"images": 3.0})
    assert check_reply(logits, state={}, logits=(4, 3)) is logits


@pytest.mark.parametrize(
    ("arrays", "numbers", "texts"),
    [
        ({"state/conv.weight": np.zeros((2, 3), np.uint8)}, {}, {}),  # pixels in the place of weights
        ({"state/conv.weight": np.zeros((200, 3), np.float32)}, {}, {}),
        ({"images": np.zeros((8, 3, 16, 16), np.float32)}, {}, {}),
        ({"logits": np.zeros((4, 3), np.float32)}, {}, {}),  # not asked for
        ({}, {"label of 7": 1.0}, {}),
        ({}, {}, {"names": "cat/1.png"}),
    ],
)
def test_and_nothing_else(arrays, numbers, texts):
    with pytest.raises(UsageError, match=r"a client (does not send|sends counts only)"):
        check_reply(Message("train", arrays, numbers, texts), state=STATE)
