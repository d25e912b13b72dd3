"""Decodes hostile files one after the other, each in a forked process of its own, and prints what it took.

``python decoded_alone.py NAME...`` of ``hostile_images.py``; a line of JSON for each: outcome, seconds of
CPU, and bytes of memory beyond what was there before and the pixels.
"""

import io
import json
import os
import resource
import sys
import tempfile
from pathlib import Path

import hostile_images
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from potstill.data.image_io import decode_bytes
from potstill.errors import DataError

SECONDS = 10
PLUGINS = AvifImagePlugin, BmpImagePlugin, GifImagePlugin, JpegImagePlugin, TiffImagePlugin, WebPImagePlugin


def in_a_fork(work) -> tuple[bytes, resource.struct_rusage]:
    """What ``work`` returns in a process of its own; empty where it was killed."""
    source, sink = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(sink, work())
        os._exit(0)
    os.close(sink)
    with os.fdopen(source, "rb") as pipe:
        found = pipe.read()
    return found, os.wait4(pid, 0)[2]


def memory(key: str) -> int:
    line = next(each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(key))
    return int(line.split()[1]) * 1024


def decoded(path: Path) -> bytes:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    before = memory("VmRSS")
    try:
        pixels = decode_bytes(path.read_bytes(), path.name)
        outcome, own = f"{pixels.shape[1]} x {pixels.shape[0]}", pixels.nbytes
    except DataError as error:
        outcome, own = str(error), 0
    return json.dumps([outcome, memory("VmHWM") - before - own]).encode()


def main(names: list[str]) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    decode_bytes(buffer.getvalue(), "warm")
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            path = Path(folder, name)
            in_a_fork(lambda path=path, name=name: path.write_bytes(hostile_images.FILES[name]()) and b"")
            found, usage = in_a_fork(lambda path=path: decoded(path))
            outcome, extra = json.loads(found) if found else ("killed", 0)
            print(json.dumps([name, outcome, usage.ru_utime + usage.ru_stime, extra]), flush=True)
            path.unlink()


if __name__ == "__main__":
    main(sys.argv[1:])
