"""Large images are decoded one at a time, in whichever thread, so that memory does not grow with the cores."""

import contextlib
import io
import threading
from contextlib import AbstractContextManager

from PIL import Image

from potstill.data.image_structure import examine
from potstill.data.quiet import quiet_pillow

MOST_PIXELS = 4_000_000  # of an image, and
MOST_BYTES = 8 * 2**20  # of its file; what has more is large

_large = threading.RLock()


def one_at_a_time(large: bool) -> AbstractContextManager[object]:
    """Whoever has a large image waits until no other thread has one."""
    return _large if large else contextlib.nullcontext()


def header(content: bytes) -> tuple[str, str, int]:
    """Format, mode and number of pixels; what cannot be opened is refused by the decoder, with its reason."""
    try:
        structure = examine(content)
        if structure.isolated:  # in a process of its own, whose memory is limited
            return structure.format, "RGB", 0
        with quiet_pillow(), Image.open(io.BytesIO(structure.content), formats=(structure.format,)) as image:
            return structure.format, image.mode, image.width * image.height
    except Exception:  # as around decode: Pillow raises nearly anything
        return "", "", 0
