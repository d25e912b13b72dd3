"""Who may write which block: byte-range locks on one file, between processes and within one.

The locks are the system's (POSIX): they end with the process, however it ends.  But they are held by processes, not by
objects, and closing any handle of the file drops them all; so one process has one handle for each file.
"""

import contextlib
import errno
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from potstill.errors import StorageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = "lock"
_GROWING = 1 << 60  # bytes that no block has
_USING = _GROWING + 1
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_DENIED = (errno.EAGAIN, errno.EACCES)

_open: dict[tuple[int, int], "_File"] = {}  # (device, inode) -> this process's handle
_guard = threading.RLock()


class _File:
    """The one handle that this process has of a lock file."""

    def __init__(self, identity: tuple[int, int], handle: int) -> None:
        self.identity, self.handle, self.process = identity, handle, os.getpid()
        self.users = 0
        # A store that was forgotten, not closed, holds nothing any more.
        self.owners: weakref.WeakValueDictionary[int, Claims] = weakref.WeakValueDictionary()

    def lock(self, at: int, *, shared: bool = False, wait: bool = False) -> bool:
        flags = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        try:
            fcntl.lockf(self.handle, flags, 1, at)
        except OSError as error:
            if error.errno in _DENIED and not wait:
                return False
            raise
        return True

    def unlock(self, at: int) -> None:
        fcntl.lockf(self.handle, fcntl.LOCK_UN, 1, at)


class Claims:
    """One store's claims.

    Args:
        folder: the store's; has or gets a file ``lock``.

    Raises:
        StorageError: no such locks here.
    """

    def __init__(self, folder: Path) -> None:
        if fcntl is None:
            raise StorageError("stores of teacher outputs need byte-range locks, which this system does not have")
        self.path = folder / NAME
        try:
            self._file = _handle(self.path)
        except OSError as error:
            raise StorageError(f"cannot lock {self.path}: {error.strerror or error}") from error
        self._release = weakref.finalize(self, _let_go, self._file)
        self._mine: set[int] = set()

    @property
    def here(self) -> bool:
        """False in a process that was forked off: the claims are the parent's."""
        return self._file.process == os.getpid()

    def use(self) -> bool:
        """Say that the store is in use until ``release``; False: somebody is removing it, or has."""
        with _guard:
            if not self._file.lock(_USING, shared=True):
                return False
        return self._current()

    def use_alone(self) -> bool:
        """Keep all others out until ``release``; False: somebody uses the store, or it is another one by now."""
        with _guard:
            return self._file.users == 1 and self._file.lock(_USING) and self._current()

    def _current(self) -> bool:
        """Whether the file that is locked is the one that stands there."""
        try:
            found = self.path.stat()
        except OSError:
            return False
        return self._file.identity == (found.st_dev, found.st_ino)

    def claim(self, block: int) -> bool:
        """Whether this store may write a block (a number over all views) from now on, until ``release``.

        Raises:
            OSError: the file system has no locks.
        """
        if not self.here:
            return False
        if block in self._mine:
            return True
        with _guard:
            if self._file.owners.get(block) is not None or not self._file.lock(block):
                return False
            self._file.owners[block] = self
        self._mine.add(block)
        return True

    @contextlib.contextmanager
    def growing(self) -> Iterator[None]:
        """Alone among all processes while a file grows; waits for its turn."""
        with _guard:
            self._file.lock(_GROWING, wait=True)
            try:
                yield
            finally:
                self._file.unlock(_GROWING)

    def release(self) -> None:
        """Let others write.  May be called twice."""
        with _guard, contextlib.suppress(OSError):
            if self.here and self._release.alive:
                for block in self._mine:
                    self._file.owners.pop(block, None)
                    self._file.unlock(block)
        self._mine.clear()
        self._release()


def _handle(path: Path) -> _File:
    with _guard:
        found = path.stat() if path.exists() else None
        known: Any = None if found is None else _open.get((found.st_dev, found.st_ino))
        if known is None or known.process != os.getpid():
            try:
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:
                if error.errno not in READ_ONLY:
                    raise
                handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # a read-only store has readers
            found = os.fstat(handle)
            known = _open[found.st_dev, found.st_ino] = _File((found.st_dev, found.st_ino), handle)
        known.users += 1
        return known  # type: ignore[no-any-return]


def _let_go(file: _File) -> None:
    with _guard:
        file.users -= 1
        if file.users == 0 and file.process == os.getpid():
            os.close(file.handle)
            _open.pop(file.identity, None)


def _after_fork() -> None:
    global _guard
    _guard = threading.RLock()  # another thread may have held it
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
