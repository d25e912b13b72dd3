"""Decode AVIF and HEIC in processes of their own: the structure of such a file does not bound the work of its decoder.

A process reads one image at a time from its input, and writes pixels or a reason to its output.  It may take 10 s of
CPU and as much memory as the limits leave; beyond, it dies, and the image is refused.  It ends with the process that
started it, as soon as its input is closed.
"""

import atexit
import contextlib
import io
import os
import struct
import subprocess  # nosec B404 # starts this module itself
import sys
import threading
from importlib.util import find_spec
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from potstill.data.image_structure import MAX_EXTRA, MAX_PIXELS, check_extra_memory, check_pixel_count
from potstill.errors import DataError

MAX_CPU_SECONDS = 10  # of CPU for an image
_WALL_SECONDS = 120.0  # seconds by the clock, on a machine that is busy
_REQUEST_HEADER = struct.Struct("<4sQ")  # format and length of a request
_RESPONSE_HEADER = struct.Struct("<III")  # height, width, bytes of a reason; 0, 0, n: there are no pixels
_HEIF_EXTRA = "heif"  # of potstill's optional dependencies

_idle_processes: list["_DecoderProcess"] = []
_idle_lock = threading.Lock()


def decode_isolated(content: bytes, kind: str) -> NDArray[np.uint8]:
    """Decode an image in another process.

    Args:
        content: of the file.
        kind: "AVIF" or "HEIC".

    Returns:
        uint8 RGB pixels [H, W, 3], upright.

    Raises:
        DataError: the image is damaged or takes too much, or the package that reads it is missing.
    """
    if kind == "HEIC" and find_spec("pillow_heif") is None:
        raise DataError(
            f"a HEIC image; reading it needs the extra {_HEIF_EXTRA}: pip install 'potstill[{_HEIF_EXTRA}]'"
        )
    with _idle_lock:
        child = _idle_processes.pop() if _idle_processes else None
    child = child if child is not None and child.process.poll() is None else _DecoderProcess()
    try:
        pixels = child.decode(content, kind)
    except DataError:
        _return_process(child)
        raise
    except BaseException as error:
        child.kill()
        if isinstance(error, (OSError, EOFError)):
            raise DataError(
                f"{'an' if kind == 'AVIF' else 'a'} {kind} image whose decoding ended its process: beyond the limits "
                f"({MAX_CPU_SECONDS} s of CPU, {MAX_EXTRA // 2**20} MiB more than the pixels), or damaged"
            ) from error
        raise  # interrupted by a signal: the response must not be read by another request
    _return_process(child)
    return pixels


def _return_process(child: "_DecoderProcess") -> None:
    with _idle_lock:
        _idle_processes.append(child)


def _clear_after_fork() -> None:
    """In a forked process: the decoders belong to the parent."""
    global _idle_lock
    _idle_lock = threading.Lock()
    _idle_processes.clear()


@atexit.register
def close_decoders() -> None:
    """End the idle processes."""
    with _idle_lock:
        waiting = [*_idle_processes]
        _idle_processes.clear()
    for child in waiting:
        child.kill()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_clear_after_fork)


class _DecoderProcess:
    """One decoder process."""

    def __init__(self) -> None:
        paths = os.pathsep.join(each for each in sys.path if each)
        self.process = subprocess.Popen(  # nosec B603 # a fixed command line, no shell
            [sys.executable, "-P", "-m", "potstill.data.isolated_decoder"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C at a terminal is for the main process
        )

    def decode(self, content: bytes, kind: str) -> NDArray[np.uint8]:
        """Return the pixels; OSError or EOFError if the process has died."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        watch = threading.Timer(_WALL_SECONDS, self.process.kill)
        watch.daemon = True
        watch.start()
        try:
            self.process.stdin.write(_REQUEST_HEADER.pack(kind.encode(), len(content)))
            self.process.stdin.write(content)
            self.process.stdin.flush()
            height, width, words = _RESPONSE_HEADER.unpack(_read_exactly(self.process.stdout, _RESPONSE_HEADER.size))
            if words or not 0 < height * width <= MAX_PIXELS:
                raise DataError(_read_exactly(self.process.stdout, min(words, 4096)).decode("utf-8", "replace"))
            pixels = np.empty((height, width, 3), np.uint8)
            _read_into(self.process.stdout, pixels.data.cast("B"))
            return pixels
        finally:
            watch.cancel()

    def kill(self) -> None:
        """Kill the process."""
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()
        self.process.wait()


def _read_exactly(stream: IO[bytes], count: int) -> bytes:
    found = bytearray(count)
    _read_into(stream, memoryview(found))
    return bytes(found)


def _read_into(stream: IO[bytes], target: memoryview) -> None:
    at = 0
    while at < len(target):
        count = stream.readinto(target[at:])  # type: ignore[attr-defined] # typed for some streams only
        if not count:
            raise EOFError("the process has died")
        at += count


# In the process ------------------------------------------------------------------------------------------------------


def serve_decoder() -> None:
    """Decode requests until the input is closed."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    from PIL import AvifImagePlugin

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # else a limit of memory would be one of threads
    import potstill.data.image_io  # noqa: F401 # before memory is limited

    _limit_memory()
    while True:
        try:
            kind, length = _REQUEST_HEADER.unpack(_read_exactly(source, _REQUEST_HEADER.size))
            content = _read_exactly(source, length)
        except EOFError:
            return
        _limit_seconds()
        try:
            pixels = _decode_in_child(content, kind.decode())
        except Exception as error:  # as around decode: decoders raise nearly anything
            words = " ".join(str(error).split())[:300] or type(error).__name__
            reason = words if isinstance(error, DataError) else f"damaged image ({words})"
            reason = (
                "too large for the memory that decoding may take: beyond the limits"
                if isinstance(error, MemoryError)
                else reason
            )
            encoded = reason.encode()[:4096]
            sink.write(_RESPONSE_HEADER.pack(0, 0, len(encoded)) + encoded)
        else:
            sink.write(_RESPONSE_HEADER.pack(*pixels.shape[:2], 0))
            sink.write(pixels.data)
        sink.flush()


def _decode_in_child(content: bytes, kind: str) -> NDArray[np.uint8]:
    from PIL import Image

    from potstill.data.image_io import to_upright_rgb

    if kind == "AVIF":
        with Image.open(io.BytesIO(content), formats=("AVIF",)) as image:
            check_pixel_count(*image.size)
            check_extra_memory(image.width, image.height, 12, len(content), "AVIF")
            image.load()
            return to_upright_rgb(image)
    import pillow_heif  # type: ignore[import-not-found,unused-ignore]

    pillow_heif.options.DECODE_THREADS = 1
    found: Any = pillow_heif.open_heif(io.BytesIO(content))
    width, height = found.size
    check_pixel_count(width, height)
    check_extra_memory(width, height, 6, len(content), "HEIC")
    pixels = np.asarray(found)
    if found.mode != "RGB":
        return to_upright_rgb(Image.fromarray(pixels, found.mode))
    return np.ascontiguousarray(pixels)


def _limit_memory() -> None:
    """Limit memory to the present use plus that of the pixels and of decoding."""
    try:
        import resource

        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):  # no Linux
        return
    most = now + 3 * MAX_PIXELS + MAX_EXTRA
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_seconds() -> None:
    try:
        import resource
    except ImportError:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    end = int(used.ru_utime + used.ru_stime) + MAX_CPU_SECONDS
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (end if hard == resource.RLIM_INFINITY else min(end, hard), hard))


if __name__ == "__main__":
    serve_decoder()
