"""Tar files made by the standard library, of small images in two colours."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def picture(seed, kind="PNG"):
    random = np.random.default_rng(seed)
    pixels = random.normal([(200, 40, 40), (40, 40, 200)][seed % 2], 20, (12, 10, 3)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_tar(target, members):
    """members: (name, bytes), or a TarInfo by itself."""
    with tarfile.open(fileobj=target, mode="w") if hasattr(target, "write") else tarfile.open(target, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))


def samples(first, last, label=lambda i: ("cls", str(i % 2).encode())):
    for i in range(first, last):
        yield f"{i:05d}.png", picture(i)
        if label is not None:
            suffix, content = label(i)
            yield f"{i:05d}.{suffix}", content


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tools():
    return Tools


class Tools:
    picture = staticmethod(picture)
    write_tar = staticmethod(write_tar)
    samples = staticmethod(samples)


@pytest.fixture
def shards(tmp_path) -> Path:
    """train-00.tar and train-01.tar of 20 images each."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for at in range(2):
        write_tar(folder / f"train-{at:02d}.tar", samples(20 * at, 20 * at + 20))
    return folder
