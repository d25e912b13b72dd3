"""A small picture of an image, as text that a JSON file can hold."""

import base64
import io
from typing import Any

from PIL import Image

from potstill.data.decode import Pixels

SIDE = 120  # pixels of the longer side at most
_BYTES = 9_000  # of a picture: 24 of them, in base64, are 0.3 MB of a page
_QUALITIES = (82, 70, 55, 40, 25)


def thumbnail(pixels: Pixels) -> dict[str, Any]:
    """A PNG of images of a few pixels, which a browser can enlarge without blur, else a JPEG.

    Args:
        pixels: uint8 [H, W, 3].

    Returns:
        ``type`` ("png" or "jpeg"), ``width``, ``height`` of the picture in pixels, ``data`` in base64.
    """
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    small = max(image.size) < SIDE // 2
    content = _png(image) if small else _jpeg(image)
    return {
        "type": "png" if small else "jpeg",
        "width": image.width,
        "height": image.height,
        "data": base64.b64encode(content).decode(),
    }


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def _jpeg(image: Image.Image) -> bytes:
    """Of noise, which compresses badly, a worse picture rather than a larger one."""
    content = b""
    for quality in _QUALITIES:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality, optimize=True)
        content = file.getvalue()
        if len(content) <= _BYTES:
            break
    return content
