"""A small store of answers that anybody can compute again."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from potstill.distillation.teacher_cache.cache import TeacherCache
from potstill.distillation.teacher_cache.record_format import RecordFormat


class Known:
    """Logits that are whole numbers, so that float16 holds them, with the largest at 0."""

    record = RecordFormat("float16", 4)

    @staticmethod
    def answer(view, ids):
        ids = np.asarray(ids, np.int64)
        columns = [np.zeros(len(ids)), -(ids % 2039), -((ids // 7 + view) % 2029), -((view * 31 + ids * 3) % 2017)]
        return np.stack(columns, axis=1).astype(np.float32)

    @classmethod
    def records(cls, view, ids):
        return cls.record.encode(cls.answer(view, ids))

    @classmethod
    def store(cls, root, samples=10_000, **identity):
        facts = {"teacher": "vgg16", "data": "some"}
        return TeacherCache.open(Path(root), {"name": "a"} | identity, cls.record, samples, facts)

    @classmethod
    def fill(cls, store, view, ids):
        store.write(view, np.asarray(ids, np.int64), cls.records(view, ids))

    @classmethod
    def check(cls, store, view):
        """(how many records are there, how many of them are not what was written)"""
        ids = np.arange(store.samples)
        found, present = store.read(view, ids)
        differ = (cls.record.decode(found)[0] != cls.answer(view, ids)).any(axis=1)
        return int(present.sum()), int((differ & present).sum())


@pytest.fixture
def known():
    return Known


@pytest.fixture
def script():
    """Runs Python that knows ``Known`` in another process; what it prints."""

    def run(text, *arguments):
        whole = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom conftest import Known\n{text}"
        done = subprocess.run(
            [sys.executable, "-c", whole, *map(str, arguments)], capture_output=True, text=True, timeout=1200
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def mounted(tmp_path):
    """Mounts a file system in memory with these options, or skips."""
    with contextlib.ExitStack() as stack:
        yield lambda options: stack.enter_context(_mounted(tmp_path / "disk", options))


@contextlib.contextmanager
def _mounted(path: Path, options: str) -> Iterator[Path]:
    path.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no mount here: {error}")
    if done.returncode:
        pytest.skip(f"mounting needs root rights: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)
