"""Heat maps as small pictures that lie over a photograph."""

import base64
import io
from collections.abc import Sequence

_ALPHA = 0.84  # of the strongest field


def heat_uri(rows: Sequence[bytes]) -> str:
    """A PNG of one pixel a field, as a ``data:`` address; the browser makes it large and smooth.

    From nothing over orange to light yellow: lighter is more, for colour-blind readers and in black and white too.

    Args:
        rows: h of w bytes, 0 to 255.
    """
    from PIL import Image

    pixels = b"".join(bytes(_colour(value / 255)) for row in rows for value in row)
    file = io.BytesIO()
    Image.frombytes("RGBA", (len(rows[0]), len(rows)), pixels).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _colour(value: float) -> tuple[int, int, int, int]:
    return 255, round(80 + 160 * value), round(30 + 120 * value * value), round(255 * _ALPHA * value)
