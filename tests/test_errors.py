"""What other libraries raise, as errors of ours."""

import errno
import sys

import pytest

from potstill.data.entries import name_problem
from potstill.errors import (
    Stopped,
    StorageError,
    UsageError,
    WorkerError,
    advising,
    did_you_mean,
    root_cause_line,
    storage_error,
)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EMFILE])
def test_a_failing_disk_is_recognised_inside_the_errors_of_a_library(number: int) -> None:
    outer = RuntimeError("step 1/3 failed. Next steps:")
    outer.__cause__ = OSError(number, "the reason", "a.bin")
    found = storage_error(outer)
    assert isinstance(found, StorageError)
    assert str(found) == "the reason: a.bin"
    assert "the reason" in root_cause_line(outer)
    assert storage_error(RuntimeError("another")) is None


def test_names_are_near_whatever_their_case() -> None:
    assert did_you_mean("ONNX", ["onnx", "openvino"]) == "; did you mean 'onnx'?"
    assert did_you_mean("Opnevino", ["onnx", "openvino"]) == "; did you mean 'openvino'?"
    assert did_you_mean("adamm", ["Adam", "adamw"]) == "; did you mean 'adamw'?"


def test_a_name_that_only_this_locale_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    name = b"\xc3\xa9t\xc3\xa9".decode("ascii", "surrogateescape")
    assert "rename it" in str(name_problem(name))
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    assert "set PYTHONUTF8=1" in str(name_problem(name))


@pytest.mark.parametrize("error", [Stopped(15), KeyboardInterrupt(), WorkerError("a process has died")])
def test_what_can_be_continued_says_how(error: BaseException) -> None:
    with pytest.raises(type(error)) as found, advising("--resume continues", lambda: False):
        raise error
    assert not hasattr(found.value, "__notes__")
    with pytest.raises(type(error)) as found, advising("--resume continues"):
        raise error
    assert found.value.__notes__ == ["--resume continues"]
    with pytest.raises(UsageError) as other, advising("--resume continues"):
        raise UsageError("u")
    assert not hasattr(other.value, "__notes__")
