"""Where marks stand, by hand; and the bytes that a view costs."""

import zlib

import numpy as np
import pytest

from potstill.distillation.teacher_cache.files import FileLayout, are_bits_set, sum_checksums


def test_a_large_view_by_hand():
    layout = FileLayout(samples=10_000, nbytes=8, seed=0)  # blocks of 4096, 4096 and 1808 records
    assert (layout.blocks, layout.width, layout.view_bytes) == (3, 512, 80_000)
    assert [len(layout.ids_of(block)) for block in range(3)] == [4096, 4096, 1808]
    # A mark has 4 + 512 bytes; 7 of them stand in a page of 4096, so one for each 585 bytes.
    assert layout.mark_offsets(0).tolist() == [0, 585, 1170, 1755]
    assert layout.mark_offsets(2).tolist() == [6 * 585, 4096, 4096 + 585, 4096 + 1170]
    assert [layout.views_in_size(size) for size in (0, 1, 586, 1755, 1756, 4096, 4682)] == [0, 1, 1, 1, 2, 3, 3]


@pytest.mark.parametrize("samples", [1, 7, 8, 9, 100, 4095, 4096, 4097, 60_000])
def test_no_mark_crosses_a_page_and_none_overlaps(samples):
    layout = FileLayout(samples, 8, 0)
    ends = 0
    for view in range(40):
        places = layout.mark_offsets(view).tolist()
        for at in places[:-1]:
            assert at >= ends
            assert at // 4096 == (at + 4 + layout.width - 1) // 4096
            ends = at + 4 + layout.width
        assert places[-1] >= ends
        assert layout.views_in_size(ends) == view + 1


@pytest.mark.parametrize("samples", [1000, 4096, 60_000, 1_281_167])
def test_marks_cost_less_than_a_fifth_of_a_byte_a_record(samples):
    layout = FileLayout(samples, 8, 0)
    views = 8
    assert layout.mark_offsets(views - 1)[-1] / (views * samples) < 0.2


def test_a_mark_comes_back_and_what_cannot_be_one_is_told():
    layout = FileLayout(samples=12, nbytes=1, seed=0)
    bits = np.array([0b1000_0001, 0b0000_1000], np.uint8)  # samples 0, 7 and 11
    mark = layout.encode_mark(0x01020304, bits)
    assert mark == b"\x04\x03\x02\x01\x81\x08"
    check, found = layout.decode_mark(0, mark + b"\0")
    assert check == 0x01020304
    assert np.flatnonzero(are_bits_set(found, np.arange(12))).tolist() == [0, 7, 11]
    assert layout.decode_mark(0, mark[:5])[1].tolist() == [0x81, 0]  # the file ends there
    assert layout.decode_mark(0, mark + b"\1") is None
    assert layout.decode_mark(0, b"\x04\x03\x02\x01\x81\x18") is None  # there is no sample 12


def test_checksums_depend_on_the_store_the_view_the_sample_and_the_bytes():
    layout = FileLayout(samples=10, nbytes=3, seed=77)
    checks = layout.checksums(2, [4, 9], b"abcdef")
    assert checks == [zlib.crc32(b"abc", 77 + 24), zlib.crc32(b"def", 77 + 29)]
    others = [
        layout.checksums(1, [4, 9], b"abcdef"),
        layout.checksums(2, [5, 9], b"abcdef"),
        layout.checksums(2, [9, 4], b"abcdef"),
        layout.checksums(2, [4, 9], b"abddef"),
        FileLayout(10, 3, 78).checksums(2, [4, 9], b"abcdef"),
    ]
    assert all(sum_checksums(other) != sum_checksums(checks) for other in others)
    assert sum_checksums(checks[::-1]) == sum_checksums(checks) == sum(checks) % 2**32
