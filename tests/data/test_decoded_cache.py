"""Decoded pixels on disk: made once, found again, never stale, never half, and never in the way."""

import errno
import os
import pickle
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from potstill.data import decoded_cache, image_io, scan
from potstill.data.concurrency import file_lock
from potstill.data.datasets import load_data
from potstill.data.decoded_cache import StagedSquares, decode_all
from potstill.data.image_sets import ArraySet, FileSet, SemiSupervisedSet, Subset, read_square
from potstill.data.loader import Loader
from potstill.data.preprocessing import resize_to_square
from potstill.data.settings import DataSettings
from potstill.data.splits import DataSplits
from potstill.errors import DataError
from potstill.input_spec import InputSpec

from ..forked import forked

pytestmark = pytest.mark.skipif(not hasattr(os, "preadv"), reason="without preadv, pixels are kept in memory")

SIDE = 8
IMAGE = 3 * SIDE * SIDE
CPU = torch.device("cpu")


class Heard:
    """What a run would show."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.waits: list[tuple[str, int, int]] = []

    def wait(self, what: str, done: int, total: int) -> None:
        self.waits.append((what, done, total))

    def note(self, message: str) -> None:
        self.notes.append(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


class Drawn:
    """Images that come from somewhere and count how often they are asked for."""

    def __init__(self, count: int = 20, seed: int = 0) -> None:
        self.names = tuple(f"made/{i}" for i in range(count))
        self.labels = np.arange(count) % 2
        self.all = np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.names)

    def pixels(self, i: int) -> np.ndarray:
        self.asked.append(i)
        return self.all[i]

    @property
    def expected(self) -> torch.Tensor:
        return torch.from_numpy(self.all.transpose(0, 3, 1, 2).copy())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one, where even small sets are worth a file, in blocks of two images."""
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(decoded_cache, "SMALLEST", 1)
    monkeypatch.setattr(decoded_cache, "_PROBED", 1)
    monkeypatch.setattr(decoded_cache, "BLOCK", 2 * IMAGE)
    return tmp_path / "cache" / "pixels"


def packed_pixels(images: Any, heard: Heard | None = None, **options: Any) -> torch.Tensor | None:
    given = {"side": SIDE, "resize_mode": "crop", "cache_fraction": 0.5, "identity": "id", "device": CPU} | options
    return decode_all(images, progress=heard, **given)


def folders(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir()) if cache.exists() else []


def is_mapped(found: torch.Tensor, cache: Path) -> bool:
    start = found.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(each, 16) for each in line.split()[0].split("-"))
        if first <= start < last:
            return str(cache) in line
    return False


def test_the_second_start_decodes_nothing(cache: Path) -> None:
    for start in range(2):
        images, heard = Drawn(), Heard()
        found = packed_pixels(images, heard)
        assert found is not None
        assert torch.equal(found, images.expected)
        assert len(images.asked) == (21 if start == 0 else 1)  # one image is part of the key
        if start == 0:
            (note,) = heard.notes
            assert note == f"decoding 20 images once, into {folders(cache)[0]}/pixels.bin (3.84 kB)"
            assert heard.waits[0] == ("decoding images", 2, 20)
            assert heard.waits[-1] == ("decoding images", 20, 20)
        else:
            assert not heard.notes
            assert not heard.waits
        assert not heard.warnings
    assert len(folders(cache)) == 1


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_pixels_are_mapped_from_the_file(cache: Path) -> None:
    images = Drawn()
    found = packed_pixels(images)
    assert found is not None
    assert is_mapped(found, cache)
    assert packed_pixels(images) is found  # for as long as the images live


def test_everything_that_decides_the_pixels_decides_the_key(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed_pixels(Drawn())
    wide = Drawn()
    wide.all = np.random.default_rng(0).integers(0, 256, (20, SIDE, SIDE + 4, 3), dtype=np.uint8)
    renamed = Drawn()
    renamed.names = (*renamed.names[1:], renamed.names[0])
    changes: list[tuple[Any, dict[str, Any]]] = [
        (Drawn(), {"identity": "other"}),
        (Drawn(), {"side": SIDE + 1}),
        (Drawn(), {"resize_mode": "stretch"}),
        (Drawn(), {"resize_mode": "pad"}),
        (Drawn(19), {}),
        (renamed, {}),
        (Drawn(seed=1), {}),  # other content under the same word: found by a look at one of them
        (wide, {}),
    ]
    for number, (images, options) in enumerate(changes):
        found = packed_pixels(images, **options)
        side, resize_mode = options.get("side", SIDE), options.get("resize_mode", "crop")
        expected = np.stack([resize_to_square(image, side, resize_mode) for image in images.all])
        assert found is not None
        assert torch.equal(found, torch.from_numpy(expected))
        assert len(folders(cache)) == number + 2
    monkeypatch.setattr(decoded_cache, "decoder_version", lambda: "Pillow 99")
    packed_pixels(Drawn())
    assert len(folders(cache)) == len(changes) + 2


def test_an_edited_image_is_found_at_the_next_start(
    make_folder: Callable[..., Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "RACY", 50_000_000)
    root = make_folder({f"{split}/{name}": 3 for split in ("train", "val", "test") for name in "ab"})

    def start() -> tuple[list[str], torch.Tensor, str]:
        time.sleep(0.1)
        data = load_data(DataSettings(source=str(root)))
        loader = Loader(data.train, InputSpec(SIDE), batch_size=6, identity=f"{data.fingerprint}/train")
        assert loader.resident
        return list(data.train.names), next(loader.epoch()).images, data.fingerprint

    names, before, old = start()
    assert len(folders(cache)) == 1
    edited = root / "train" / "a" / "1.png"
    times = edited.stat()
    Image.new("RGB", (12, 10), (255, 0, 0)).save(edited)
    os.utime(edited, ns=(times.st_atime_ns, times.st_mtime_ns))
    _, after, new = start()
    changed = [name for i, name in enumerate(names) if not torch.equal(before[i], after[i])]
    assert changed == ["train/a/1.png"]
    assert new != old
    assert len(folders(cache)) == 2


def test_an_image_edited_during_the_run_is_not_kept_as_the_one_that_was_checked(
    make_folder: Callable[..., Path], cache: Path
) -> None:
    root = make_folder({f"{split}/{name}": 3 for split in ("train", "val", "test") for name in "ab"})
    data = load_data(DataSettings(source=str(root)))
    Image.new("RGB", (12, 10), (255, 0, 0)).save(root / "train" / "a" / "1.png")
    for options in ({"identity": "id"}, {}):
        with pytest.raises(DataError, match=r"a/1\.png: the file has changed since it was checked"):
            Loader(data.train, InputSpec(SIDE), batch_size=6, **options)
    with pytest.raises(DataError, match="has changed"):
        list(Loader(data.train, InputSpec(SIDE), batch_size=6, cache_fraction=1e-12).epoch())


@pytest.mark.parametrize("name", ["pixels.bin", "done.bin", "manifest.json"])
def test_changed_bits_are_mended(cache: Path, name: str) -> None:
    packed_pixels(Drawn())
    path = folders(cache)[0] / name
    data, chance = path.read_bytes(), random.Random(1)
    for _ in range(40):
        at, bit = chance.randrange(len(data)), chance.randrange(8)
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :])
        images = Drawn()
        found = packed_pixels(images)
        assert found is not None
        assert torch.equal(found, images.expected)
        assert path.read_bytes() == data, (at, bit)
        assert len(images.asked) == (1 if name == "manifest.json" else 3)  # one block of two images
    for wrong in (b"", data[: len(data) // 2]):
        path.write_bytes(wrong)
        assert torch.equal(packed_pixels(Drawn()), Drawn().expected)
        assert path.read_bytes() == data


def test_a_file_that_grew_is_mended_without_decoding(cache: Path) -> None:
    packed_pixels(Drawn())
    with (folders(cache)[0] / "pixels.bin").open("ab") as more:
        more.write(b"more")
    images = Drawn()
    assert torch.equal(packed_pixels(images), images.expected)


def test_what_cannot_be_decoded_is_an_error_and_the_rest_is_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bad(Drawn):
        def pixels(self, i: int) -> np.ndarray:
            if i == 13:
                raise DataError("13: damaged")
            return super().pixels(i)

    monkeypatch.setattr(decoded_cache, "_SYNC_SECONDS", -1.0)
    with pytest.raises(DataError, match="13: damaged"):
        packed_pixels(Bad())
    images, heard = Drawn(), Heard()
    assert torch.equal(packed_pixels(images, heard), images.expected)
    assert heard.notes[0].endswith("(3.84 kB), of which 12 exist already")
    assert sorted(images.asked) == [0, *range(12, 20)]


# where files are not kept


def test_small_sets_arrays_and_sets_of_nobody_knows_what_stay_in_memory(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = ArraySet(Drawn().all, Drawn().labels, Drawn().names)
    for images in (arrays, Subset(arrays, range(10)), SemiSupervisedSet(arrays, arrays)):
        assert packed_pixels(images) is not None
    assert packed_pixels(Drawn(), identity=None) is not None
    monkeypatch.setattr(decoded_cache, "SMALLEST", 20 * IMAGE + 1)
    assert packed_pixels(Drawn()) is not None
    assert not cache.exists()


def test_arrays_that_memory_has_no_room_for_are_kept_on_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded_cache, "free_bytes", lambda device: 0)
    arrays = ArraySet(Drawn().all, Drawn().labels, Drawn().names)
    assert torch.equal(packed_pixels(arrays), Drawn().expected)
    assert len(folders(cache)) == 1


def test_processes_of_a_machine_share_one_file_and_divide_the_memory(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 images, half of the room: twice their size suffices on the disk, of memory twice that for each of four."""
    room = {"disk": 40 * IMAGE, "memory": 160 * IMAGE - 1}
    monkeypatch.setattr(decoded_cache.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, room["disk"]))
    monkeypatch.setattr(decoded_cache, "free_bytes", lambda device: room["memory"])

    def of_four(seed: int) -> torch.Tensor | None:
        return decode_all(Drawn(seed=seed), SIDE, "crop", device=CPU, cache_fraction=0.5, processes=4, identity="drawn")

    assert of_four(1) is not None
    assert len(folders(cache)) == 1
    room["disk"] = 0
    assert of_four(2) is None
    room["memory"] += 1
    assert of_four(3) is not None


def test_where_the_disk_has_no_room_it_is_said_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = {"disk": 40 * IMAGE - 1, "memory": 10**9}
    monkeypatch.setattr(decoded_cache.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, room["disk"]))
    monkeypatch.setattr(decoded_cache, "free_bytes", lambda device: room["memory"])
    heard = Heard()
    for seed in range(2):
        assert torch.equal(packed_pixels(Drawn(seed=seed), heard), Drawn(seed=seed).expected)
    assert heard.notes == [f"decoded pixels are not cached on disk: 3.84 kB is over 50 % of the free space in {cache}"]
    assert folders(cache) == []
    room["memory"] = 0
    assert packed_pixels(Drawn(), heard) is None
    room["disk"] = 40 * IMAGE
    assert packed_pixels(Drawn(), heard) is not None
    assert len(heard.notes) == 2


@pytest.mark.own_process
@pytest.mark.parametrize("reserves", [True, False])
def test_a_full_disk(
    tmp_path: Path, mounted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, reserves: bool
) -> None:
    disk = mounted("size=2m")
    monkeypatch.setenv("POTSTILL_CACHE", str(disk))
    monkeypatch.setattr(decoded_cache, "make_room", lambda *args: True)  # others were quicker
    if not reserves:
        monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(decoded_cache, "BLOCK", 2**18)
    heard = Heard()
    for seed in range(2):
        images = Drawn(15_000, seed=seed)
        assert torch.equal(packed_pixels(images, heard), images.expected)
    (warning,) = heard.warnings
    assert warning.startswith(f"decoded pixels are not cached on disk: {disk}")
    assert warning.endswith("No space left on device")
    assert os.statvfs(disk).f_bavail * 4096 > 1.9 * 2**20  # the room was given back


@pytest.mark.own_process
def test_a_read_only_cache_is_read_and_not_missed(
    tmp_path: Path, mounted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = mounted("size=2m")
    monkeypatch.setenv("POTSTILL_CACHE", str(disk))
    packed_pixels(Drawn())
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    images, heard = Drawn(), Heard()
    assert torch.equal(packed_pixels(images, heard), images.expected)
    assert len(images.asked) == 1
    assert not heard.warnings
    for seed in (1, 2):
        assert torch.equal(packed_pixels(Drawn(seed=seed), heard), Drawn(seed=seed).expected)
    (warning,) = heard.warnings
    assert warning.endswith("Read-only file system")


def test_a_cache_that_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "file"))
    heard = Heard()
    assert torch.equal(packed_pixels(Drawn(), heard), Drawn().expected)
    assert len(heard.warnings) == 1


def test_an_input_output_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    heard = Heard()
    assert torch.equal(packed_pixels(Drawn(), heard), Drawn().expected)
    assert "Input/output error" in heard.warnings[0]


# other processes

CHILDREN = """
import os, sys, time
import numpy as np, torch
torch.set_num_threads(1)
from potstill.data import decoded_cache
from potstill.data.decoded_cache import decode_all
decoded_cache.SMALLEST, decoded_cache._SYNC_SECONDS, decoded_cache.BLOCK = 1, -1.0, 384

class Slow:
    names, labels = tuple(map(str, range(40))), np.zeros(40, np.int64)
    def __init__(self, word, seconds):
        self.word, self.seconds = word, seconds
    def __len__(self):
        return 40
    def pixels(self, i):
        time.sleep(self.seconds)
        return np.full((8, 8, 3), (i * 7 + self.word) % 256, np.uint8)

class Says:
    def __init__(self):
        self.said = []
    def wait(self, what, done, total):
        pass
    def note(self, message):
        self.said.append(message)
    warn = note

def child(word, seconds):
    images, says = Slow(word, seconds), Says()
    found = decode_all(images, 8, "crop", device=torch.device("cpu"), cache_fraction=0.5,
        identity=f"id {word}", progress=says)
    expected = (torch.arange(40) * 7 + word) % 256
    assert torch.equal(found, expected.to(torch.uint8).view(-1, 1, 1, 1).expand(40, 3, 8, 8)), word
    return says.said

def forked(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
    return pid
"""

AT_ONCE = (
    CHILDREN
    + """
for word in range(int(sys.argv[1])):
    def work():
        said = child(word, 0.001)
        os.write(1, f"{word} {'; '.join(said) or 'found'}\\n".encode())
    for pid in [forked(work) for _ in range(3)]:
        assert os.waitpid(pid, 0)[1] == 0
"""
)

KILLED = (
    CHILDREN
    + """
import itertools, random, signal
chance, kills, finished, resumed = random.Random(0), 0, 0, 0
child(-1, 0)  # loads what is loaded once

def die_at(at):
    calls = itertools.count()
    def counted(call):
        def one(*arguments):
            if next(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments)
        return one
    Slow.pixels, os.pwrite, os.fsync = counted(Slow.pixels), counted(os.pwrite), counted(os.fsync)

for turn in range(int(sys.argv[1])):
    at = chance.randrange(100)  # an image, a write or a sync; a whole file takes more of them
    def work():
        die_at(at)
        if "already" in " ".join(child(finished, 0)):
            os._exit(7)
    pid = forked(work)
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) in (0, 7), status
        finished += 1
        resumed += os.WEXITSTATUS(status) == 7
    else:
        kills += 1
child(finished, 0)
print(kills, finished, resumed)
"""
)


def script(text: str, cache: Path, *arguments: str) -> str:
    done = forked(["-c", text, *arguments], os.environ | {"POTSTILL_CACHE": str(cache.parent)})
    assert done.returncode == 0, done.out + done.errors
    return done.out


@pytest.mark.parametrize("times", [4, pytest.param(10, marks=pytest.mark.slow)])
def test_of_three_processes_at_once_one_decodes_and_all_have_the_pixels(cache: Path, times: int) -> None:
    said = sorted(script(AT_ONCE, cache, str(times)).splitlines())
    for word in range(times):
        mine = [line.split(" ", 1)[1] for line in said if line.startswith(f"{word} ")]
        assert len(mine) == 3
        assert sum(line.startswith("decoding 40 images once") for line in mine) == 1, mine
        assert mine.count("found") == 2


@pytest.mark.parametrize("times", [20, pytest.param(60, marks=pytest.mark.slow)])
def test_killed_while_filling(cache: Path, times: int) -> None:
    kills, finished, resumed = map(int, script(KILLED, cache, str(times)).split())
    assert kills > times / 6
    assert finished >= 1
    assert resumed >= 1  # what a killed process had marked was not decoded again


def test_a_process_that_does_not_get_on_is_not_waited_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded_cache, "_STALLED", 0.3)
    packed_pixels(Drawn())
    (folder,) = folders(cache)
    (folder / "done.bin").unlink()
    heard = Heard()
    with file_lock(folder / "lock", lambda: None):
        assert torch.equal(packed_pixels(Drawn(), heard), Drawn().expected)
    assert heard.waits[0] == ("waiting for another process that decodes images", 0, 10)
    assert "has made no progress" in heard.warnings[0]


# what is no longer used


def used(folder: Path, days: float) -> None:
    at = time.time() - days * 86_400
    os.utime(folder / "manifest.json", (at, at))


def made(cache: Path, days: dict[int, float]) -> dict[int, Path]:
    found = {}
    for seed in days:
        before = folders(cache)
        packed_pixels(Drawn(seed=seed))
        (found[seed],) = set(folders(cache)) - set(before)
    for seed, age in days.items():
        used(found[seed], age)
    return found


def test_pixels_unused_for_a_month_make_way_when_others_come(cache: Path) -> None:
    there = made(cache, {0: 40, 1: 31, 2: 29, 3: 0})
    held = there[1] / "lock"
    with file_lock(held, lambda: None):  # somebody fills it
        packed_pixels(Drawn(seed=9))
    assert [there[seed].exists() for seed in range(4)] == [False, True, True, True]
    packed_pixels(Drawn(seed=2))  # found, which counts as a use
    packed_pixels(Drawn(seed=10))
    assert [there[seed].exists() for seed in range(4)] == [False, False, True, True]
    assert time.time() - (there[2] / "manifest.json").stat().st_mtime < 3600


def test_where_room_is_short_what_was_not_used_today_makes_way(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = made(cache, {0: 3, 1: 5, 2: 0.5})
    count = lambda: sum((folder / "manifest.json").exists() for folder in folders(cache))  # noqa: E731
    free = lambda: (5 - count()) * 20 * IMAGE  # noqa: E731
    monkeypatch.setattr(decoded_cache.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free()))
    packed_pixels(Drawn(seed=9), cache_fraction=0.4)  # 0.4 of two such files is too little, 0.4 of three is enough
    assert [there[seed].exists() for seed in range(3)] == [True, False, True]
    monkeypatch.setattr(decoded_cache.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 0))
    heard = Heard()
    packed_pixels(Drawn(seed=10), heard)
    assert [there[seed].exists() for seed in range(3)] == [False, False, True]
    assert "not cached on disk" in heard.notes[0]


# beside


def test_a_files_content_is_part_of_the_key_whatever_its_owner_calls_it(tmp_path: Path, cache: Path) -> None:
    def files(colour: int) -> Subset:
        root = tmp_path / str(colour)
        root.mkdir()
        for i in range(4):
            Image.new("RGB", (SIDE, SIDE), (i, colour if i == 2 else 0, 0)).save(root / f"{i}.png")
        images = FileSet(root, [f"{i}.png" for i in range(4)], [0, 1, 0, 1])
        from potstill.data.scan import check_files

        images.expect(check_files(root, images.names, "test"))
        return Subset(images, [3, 2, 0])

    found = [packed_pixels(files(colour)) for colour in (10, 20)]
    assert [each[1, 1, 0, 0].item() for each in found if each is not None] == [10, 20]
    assert found[0][:, 0, 0, 0].tolist() == [3, 2, 0]  # type: ignore[index]
    assert len(folders(cache)) == 2


def test_what_files_hold_of_a_containers_memory_counts_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded_cache, "_CGROUP", tmp_path)
    monkeypatch.setattr(decoded_cache, "_available", lambda: 10**12)
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 300\nfile 600\ninactive_file 250\nactive_file 150\nshmem 200\n")
    assert decoded_cache.free_bytes(CPU) == 1000 - (900 - 250 - 150)
    (tmp_path / "memory.max").write_text("max\n")
    assert decoded_cache.free_bytes(CPU) == 10**12


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system in memory with these options, or skips."""
    path = tmp_path / "disk"
    path.mkdir()

    def mount(options: str) -> Path:
        try:
            done = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True, text=True
            )
        except OSError as error:
            pytest.skip(f"no mount here: {error}")
        if done.returncode:
            pytest.skip(f"mounting needs root rights: {done.stderr.strip()}")
        return path

    yield mount
    subprocess.run(["umount", "-l", str(path)], capture_output=True)


# squares of the check


SQUARES = {
    "train": {(32, "whole"), (30, "crop")},
    "val": {(SIDE, "crop")},
    "test": {(SIDE, "crop"), (12, "crop"), (80, "crop")},
}


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """JPEG files that are decoded at a reduced scale, some of them turned, PNG files, and images of 16 bits."""
    generator, root = np.random.default_rng(0), tmp_path / "photographs"
    for i in range(30):
        folder = root / ("a" if i % 2 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(generator.integers(0, 256, (6, 5, 3), dtype=np.uint8)).resize((170, 210))
        exif = Image.Exif()
        exif[0x0112] = 1 + i % 8
        if i % 10 < 7:
            image.save(folder / f"{i}.jpg", exif=exif.tobytes())
        elif i % 10 < 9:
            image.save(folder / f"{i}.png")
        else:
            Image.fromarray(generator.integers(0, 4000, (40, 50), dtype=np.uint16)).save(folder / f"{i}.png")
    return root


Loaded = tuple[DataSplits, dict[str, list[Any]]]


def loaded(root: Path, cache: Path, staged: StagedSquares | None, **settings: Any) -> Loaded:
    """The data, of which nothing is known before, and all squares by split."""
    shutil.rmtree(cache.parent, ignore_errors=True)
    data = load_data(DataSettings(source=str(root), **settings), staged=staged)
    return data, {
        f"{split} {side} {mode}": [read_square(data.split(split), i, side, mode) for i in range(len(data.split(split)))]
        for split, squares in SQUARES.items()
        for side, mode in sorted(squares)
    }


def same(one: Loaded, other: Loaded) -> bool:
    return one[0].fingerprint == other[0].fingerprint and all(
        np.array_equal(np.stack(squares), np.stack(other[1][key])) for key, squares in one[1].items()
    )


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of the files that were decoded."""
    counted: list[int] = []
    own = image_io._decode
    monkeypatch.setattr(image_io, "_decode", lambda content, *rest: counted.append(len(content)) or own(content, *rest))
    return counted


@pytest.mark.parametrize("skip_bad", [False, True])
def test_the_squares_of_the_check_are_those_of_a_decode_of_their_own(
    photographs: Path, cache: Path, decodes: list[int], skip_bad: bool
) -> None:
    if skip_bad:
        (photographs / "a" / "bad.jpg").write_bytes((photographs / "a" / "1.jpg").read_bytes()[:-900])
    staged = StagedSquares(SQUARES, 0.3)
    data, squares = loaded(photographs, cache, staged, skip_bad=skip_bad)
    # Images of 16 bits wait for the range of all; a JPEG file in test is needed at three scales, one in train at one.
    again = [name for name in data.test.names if name.endswith("jpg")] * 2
    wide = {split: sum(name.endswith("9.png") for name in data.split(split).names) for split in SQUARES}
    again_wide = sum(wide[split] * len(each) for split, each in SQUARES.items())
    assert again_wide > 0 < len(again)
    # A file that is left out may change the splits of a few others.
    assert 30 + skip_bad + len(again) + again_wide <= len(decodes) <= 30 + 6 * skip_bad + len(again) + again_wide
    assert not any(cache.iterdir())
    before = len(decodes)
    assert same((data, squares), loaded(photographs, cache, None, skip_bad=skip_bad))
    assert len(decodes) - before == 30 + skip_bad + sum(map(len, squares.values()))
    assert squares["train 32 whole"][0].shape == (3, 33, 32)


def test_each_square_is_there_once_and_its_room_is_given_back(photographs: Path, cache: Path) -> None:
    staged = StagedSquares(SQUARES, 0.3)
    load_data(DataSettings(source=str(photographs)), staged=staged)
    assert os.fstat(staged._handle).st_size > 0
    digest = next(iter(staged._rows[32, "whole"]))
    assert staged.take(digest, 32, "whole") is not None
    assert staged.take(digest, 32, "whole") is None
    assert staged.take(digest, 32, "pad") is None
    for (side, mode), rows in staged._rows.items():
        for each in list(rows):
            assert staged.take(each, side, mode) is not None
    assert os.fstat(staged._handle).st_size == 0
    assert pickle.loads(pickle.dumps(staged)).take(digest, 32, "whole") is None


def test_without_room_everything_is_decoded_again(
    photographs: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = loaded(photographs, cache, None)

    def full(handle: int, at: int, data: memoryview) -> None:
        if at > 20_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(handle, at, data)

    write = decoded_cache.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(decoded_cache, "pwrite", full)
        assert same(loaded(photographs, cache, StagedSquares(SQUARES, 0.3)), expected)
    monkeypatch.setattr(decoded_cache.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 10_000))
    staged = StagedSquares(SQUARES, 0.3)
    assert same(loaded(photographs, cache, staged), expected)
    assert staged._handle < 0


def test_what_is_cut_off_is_found_at_every_scale(photographs: Path) -> None:
    content = (photographs / "a" / "1.jpg").read_bytes()
    refused = 0
    for end in range(2, len(content), 37):
        reasons = []
        for side in (None, 40, 10):
            try:
                image_io.read_image(content[:end], "x", side=side)
                reasons.append("")
            except DataError as error:
                reasons.append(str(error))
        assert bool(reasons[0]) == bool(reasons[1]) == bool(reasons[2]), (end, reasons)
        refused += bool(reasons[0])
    assert refused > 20
