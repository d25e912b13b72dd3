"""One writer for each run folder; however it ends, even by SIGKILL, the next one gets in.

The system's own lock on ``.lock`` ends with its holder.  Some file systems (of networks, of containers) have none:
there a file ``.lock-holder`` says who writes, by process, machine and time of its start.  Where that process is known
to be gone, its file is taken over; of another machine's nobody here can know, and a person has to say so.
"""

import errno
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from potstill.errors import StorageError

NAME, HOLDER = ".lock", ".lock-holder"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
_MOST = 1000  # bytes of a holder's file


class RunLock:
    """The lock of one folder, which must be there; held at most once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: BaseFileLock = FileLock(folder / NAME, mode=0o644, fallback_to_soft=False)

    def acquire(self, way_out: str = "wait for it") -> None:
        """Become the one writer.

        Args:
            way_out: what the message tells to do.

        Raises:
            StorageError: another process writes there, or may.
            OSError: the lock's file cannot be made.
        """
        try:
            try:
                self._lock.acquire(timeout=0)
            except OSError as error:
                if isinstance(error, Timeout) or error.errno not in _NO_LOCKS:
                    raise
                self._lock = SoftFileLock(self.folder / HOLDER, mode=0o644)
                self._lock.acquire(timeout=0)
        except Timeout:
            message = f"{self.folder} is being written by another process; {way_out}{self._doubt()}"
            raise StorageError(message) from None

    def release(self) -> None:
        """Let others write; may be called twice."""
        self._lock.release()

    def _doubt(self) -> str:
        """What a person can do who knows better, on a file system without locks."""
        path = self.folder / HOLDER
        if not isinstance(self._lock, SoftFileLock):
            return ""
        try:
            with path.open("rb") as file:
                lines = file.read(_MOST).decode("ascii", "replace").splitlines()
        except OSError:
            lines = []
        known = len(lines) >= 2 and lines[0].isdigit()
        who = f"process {lines[0]} on {lines[1]}" if known else "somebody who was interrupted while saying so"
        return f".\nThis file system has no locks; {path} was left by {who}: if that is gone, delete the file"
