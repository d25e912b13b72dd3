"""No image takes more than 10 s of CPU or 200 MB above its pixels, whatever its structure asks for.

The files that take longest are decoded by ``pytest -m slow tests/guarantees/test_hostile_images.py``.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .hostile_images import FILES

MOST_BYTES = 200 * 2**20
LONG = {
    "jpeg_scans_middle", "png_16_bits_and_alpha", "png_compressed_profile", "png_interlaced", "tiff_jpeg_scans",
    "tiff_jpeg_strips", "tiff_floats", "tiff_16_bits", "jpeg_baseline_full_colour", "jpeg_tables_between_scans",
    "gif_interlaced", "png_16_bit_gray", "webp_lossless", "avif_large", "avif_lying_size", "jpeg_progressive_cmyk",
    "jpeg_progressive_full_colour", "png_one_column", "png_one_row_of_16_bits",
}  # fmt: skip
READ = {  # all their pixels are there, and their metadata is not read
    "gif_interlaced", "jpeg_baseline_full_colour", "jpeg_comments_between_scans", "jpeg_exif_segments",
    "jpeg_scans_middle", "jpeg_tables_between_scans", "png_16_bit_gray", "png_16_bits_and_alpha",
    "png_compressed_profile", "png_compressed_texts", "png_interlaced", "tiff_16_bits", "tiff_floats",
    "tiff_lzma_dictionary", "webp_frames", "avif_lying_size",
}  # fmt: skip


def measured(names: set[str]) -> dict[str, tuple[str, float, int]]:
    script = Path(__file__).with_name("decoded_alone.py")
    done = subprocess.run(
        [sys.executable, str(script), *sorted(names)], capture_output=True, text=True, timeout=600, check=True
    )
    return {
        name: (outcome, seconds, extra) for name, outcome, seconds, extra in map(json.loads, done.stdout.splitlines())
    }


def check(names: set[str]) -> None:
    found = measured(names)
    assert set(found) == names
    # The processes are killed after 10 s of CPU.
    assert {name: outcome for name, (outcome, _, _) in found.items() if outcome == "killed"} == {}
    assert {name: extra // 2**20 for name, (_, _, extra) in found.items() if extra > MOST_BYTES} == {}
    read = {name for name, (outcome, _, _) in found.items() if outcome.replace(" x ", "").isdecimal()}
    assert read == READ & names
    refused = {name: outcome for name, (outcome, _, _) in found.items() if name not in read}
    assert all(outcome.startswith(f"{name}: ") and "\n" not in outcome for name, outcome in refused.items())


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory by /proc")
def test_files_that_are_refused_at_once() -> None:
    assert len(FILES) > 50
    check(set(FILES) - LONG)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures memory by /proc")
def test_files_that_take_long() -> None:
    check(LONG)
