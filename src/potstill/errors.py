"""Errors that a user can fix, with a message of one to five lines and an exit code; others are bugs (exit 1)."""

import difflib
import errno
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


class PotstillError(Exception):
    """Base class.  Messages name what was given, what is allowed, the nearest known name and what to do."""

    exit_code = 1


class UsageError(PotstillError, ValueError):
    """A wrong option, recipe or argument."""

    exit_code = 2


class DataError(PotstillError):
    """Images, labels or splits that cannot be trained on."""

    exit_code = 3


class ArtifactError(PotstillError):
    """A model, checkpoint or run folder that is damaged or does not fit."""

    exit_code = 4


class StorageError(PotstillError):
    """No space, no permission, an I/O error, or no memory."""

    exit_code = 5


class NonFiniteError(PotstillError):
    """A loss, gradient or weight became NaN or infinite."""

    exit_code = 6


class WorkerError(PotstillError):
    """A process of the run died or stalled."""

    exit_code = 7


class RankLost(WorkerError):
    """Another process of the run has died or stalled."""


class Stopped(BaseException):
    """A signal stopped the process.  Not an ``Exception``, so that nothing handles it as a failure and continues.

    Attributes:
        signal: its number.
        exit_code: 128 more, as in shells.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal, self.exit_code = signal, 128 + signal


RESUME = "--resume continues a run from its last checkpoint"
REPEAT = "the same command continues from here"


@contextmanager
def advising(advice: str, when: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Add a note on how to continue, if there is what to continue, to a signal or the loss of a process."""
    try:
        yield
    except (Stopped, KeyboardInterrupt, WorkerError) as error:
        if when():
            error.add_note(advice)
        raise


class RemoteFailure(BaseException):
    """Another process of the run has failed and reported why; this one ends silently.

    Attributes:
        exit_code: what the other one exits with.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"another process of the run has ended with exit code {exit_code}, and shows the reason")
        self.exit_code = exit_code


_STORAGE = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE,
    errno.ENFILE,
)  # fmt: skip
_MEMORY = "out of memory; a smaller training.batch_size or data.cache_fraction needs less"


def storage_error(error: BaseException) -> StorageError | None:
    """Return the StorageError for a failing disk or too little memory, whichever library raised it; else None.

    What a library raises from such an error counts too.

    Example:
        >>> storage_error(OSError(28, "No space left on device", "a.txt"))
        StorageError('No space left on device: a.txt')
        >>> storage_error(KeyError("a"))
    """
    if isinstance(error, OSError) and error.errno in _STORAGE:
        return StorageError(f"{error.strerror}: {error.filename or 'the disk is full or fails'}")
    no_memory = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    # torch's, of a GPU and of the CPU
    if no_memory or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        return StorageError(_MEMORY)
    return None if error.__cause__ is None else storage_error(error.__cause__)


@contextmanager
def storing(what: str) -> Iterator[None]:
    """Raise an OSError of the block as a StorageError: ``cannot WHAT: REASON``."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot {what}: {error.strerror or error}") from error


def check_argument(name: str, value: object, types: tuple[type, ...], wanted: str) -> None:
    """Raise UsageError unless an argument of a Python function has one of the types.

    Example:
        >>> check_argument("recipe", "photos", (str,), "a name")
        >>> check_argument("recipe", None, (str,), "a name")
        Traceback (most recent call last):
        potstill.errors.UsageError: recipe must be a name, got NoneType
    """
    if not isinstance(value, types):
        raise UsageError(f"{name} must be {wanted}, got {type(value).__name__}")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 300 characters, or its type.

    Example:
        >>> first_line(KeyError()), first_line(ValueError("no number"))
        ('KeyError', 'no number')
    """
    return (strip_ansi(str(error)).strip().splitlines() or [type(error).__name__])[0][:300]


_ANSI_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def strip_ansi(text: str) -> str:
    """Return the text of another library without the escape codes of colours.

    Example:
        >>> strip_ansi(chr(27) + "[96mstep 1/3" + chr(27) + "[0m")
        'step 1/3'
    """
    return _ANSI_ESCAPES.sub("", text)


def root_cause_line(error: BaseException) -> str:
    """Return the first line of the error that a chain of exceptions began with, at most 300 characters.

    Exporters wrap an error in others, whose first lines report only that there was one.

    Example:
        >>> try:
        ...     raise RuntimeError("step 1 of 3 failed. Next steps:") from ValueError("no such operator")
        ... except RuntimeError as error:
        ...     root_cause_line(error)
        'no such operator'
    """
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def exit_code_of(error: BaseException) -> int:
    """Return the exit code for an error.

    Example:
        >>> exit_code_of(DataError("no images")), exit_code_of(MemoryError()), exit_code_of(KeyError())
        (3, 5, 1)
    """
    if (code := getattr(error, "exit_code", None)) is not None:
        return int(code)
    if isinstance(error, KeyboardInterrupt):
        return 130
    return PotstillError.exit_code if storage_error(error) is None else StorageError.exit_code


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'kd'?"`` for a message, or "" if no known name is close.

    Example:
        >>> did_you_mean("resnet81", ["resnet18", "vgg16"])
        "; did you mean 'resnet18'?"
        >>> did_you_mean("KD", ["kd", "dkd"])
        "; did you mean 'kd'?"
        >>> did_you_mean("zebra", ["resnet18"])
        ''
    """
    listed = list(known)
    names = {each.lower(): each for each in reversed(listed)}
    if name.lower() in names:
        return f"; did you mean {names[name.lower()]!r}?"
    near = difflib.get_close_matches(name, listed, n=1) or [
        names[each] for each in difflib.get_close_matches(name.lower(), names, n=1)
    ]
    return f"; did you mean {near[0]!r}?" if near else ""
