"""G15: to open a model, a checkpoint or weights runs no code of theirs, fills no memory and asks no network."""

import io
import os
import pickle
import re
import socket
import struct
from pathlib import Path

import pytest
import torch

from potstill.errors import ArtifactError, UsageError
from potstill.experiment.run_folder import find_model
from potstill.input_spec import InputSpec
from potstill.io import read_checksummed_json, sha256_hex, write_bytes, write_checksummed, write_checksummed_json
from potstill.models import state_dict
from potstill.models.factory import create_model
from potstill.models.model_file import Classifier, load_model, save_model
from potstill.training.checkpointing import load_checkpoint


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A folder that pickles below make, if anybody unpickles them."""
    alive = tmp_path / "alive"
    pickle.loads(pickle.dumps(Malicious(alive)))
    assert alive.exists()
    return tmp_path / "canary"


@pytest.fixture
def pickles(canary: Path) -> list[bytes]:
    """Plain, as torch writes it, and as torch wrote it once."""
    found = [pickle.dumps(Malicious(canary))]
    for modern in (True, False):
        file = io.BytesIO()
        torch.save({"a": torch.zeros(2), "b": Malicious(canary)}, file, _use_new_zipfile_serialization=modern)
        found.append(file.getvalue())
    return found


def test_pickles_whose_digest_fits_are_not_run(tmp_path: Path, canary: Path, pickles: list[bytes]) -> None:
    folder = tmp_path / "model"
    save_model(
        Classifier(create_model("cifar/resnet8", 2, size=16), "cifar/resnet8", ("a", "b"), InputSpec(16)), folder
    )
    facts = read_checksummed_json(folder / "model.json")
    for content in pickles:
        write_checksummed(tmp_path / "last.checkpoint", content)
        with pytest.raises(ArtifactError, match=r"last\.checkpoint is no checkpoint"):
            load_checkpoint(tmp_path / "last.checkpoint")
        write_bytes(folder / "model.safetensors", content)
        write_checksummed_json(folder / "model.json", facts | {"sha256": sha256_hex(content)})
        with pytest.raises(ArtifactError, match="cannot be used"):
            load_model(folder)
        for name in ("weights.pt", "weights.pth", "weights.safetensors"):
            write_bytes(tmp_path / name, content)
            with pytest.raises(ArtifactError, match="never loaded: they could run code"):
                state_dict.read_state_dict(tmp_path / name)
    assert not canary.exists()


def test_many_names_for_the_same_bytes_are_no_archive(tmp_path: Path) -> None:
    """Such an archive is stored, not compressed, and may nevertheless become a thousand times as large."""
    file = io.BytesIO()
    torch.save({str(i): torch.zeros(100) for i in range(50)}, file)
    data = bytearray(file.getvalue())
    (place,) = struct.unpack_from("<I", data, data.rfind(b"PK\5\6") + 16)
    first = None
    while data[place : place + 4] == b"PK\1\2":  # the directory's entries; at 42 stands where the content is
        name, extra, comment = struct.unpack_from("<HHH", data, place + 28)
        if b"/data/" in data[place + 46 : place + 46 + name]:
            first = first or bytes(data[place + 42 : place + 46])
            data[place + 42 : place + 46] = first
            struct.pack_into("<I", data, place + 20, 4000)
            struct.pack_into("<I", data, place + 24, 4000)
        place += 46 + name + extra + comment
    (tmp_path / "bomb.pt").write_bytes(data)
    with pytest.raises(ArtifactError, match="would become larger when it is read; it is not opened"):
        state_dict.read_state_dict(tmp_path / "bomb.pt")
    (tmp_path / "plain.pt").write_bytes(file.getvalue())
    assert len(state_dict.read_state_dict(tmp_path / "plain.pt")) == 50


def test_an_address_is_only_a_name_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    for address in ("https://example.org/model", "http://127.0.0.1/model.json", "hf-hub:timm/resnet18", "file:///etc"):
        for read in (load_model, load_checkpoint, state_dict.read_state_dict, find_model):
            with pytest.raises((ArtifactError, UsageError), match=re.escape(address.partition(":")[0])):
                read(Path(address))
