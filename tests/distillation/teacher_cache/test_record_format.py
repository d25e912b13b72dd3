"""Records against bytes by hand and against softmax in float64."""

import struct

import numpy as np
import pytest

from potstill.distillation.teacher_cache.record_format import RecordFormat
from potstill.errors import UsageError

TOP = 16


def softmax(logits, temperature):
    scaled = logits.astype(np.float64) / temperature
    power = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return power / power.sum(axis=1, keepdims=True)


def kd(teacher, student, temperature):
    """T squared times the divergence of each image, in float64."""
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    return temperature**2 * np.where(p > 0, p * np.log(np.maximum(p, 1e-300) / q), 0).sum(axis=1)


def realistic(count, classes, seed=0):
    """As of a trained network: noise, a few similar classes, and one that stands out by 2 to 10."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 1.2, (count, classes)) + 0.4 * random.standard_t(4, (count, classes))
    near = np.argsort(random.random((count, classes)), axis=1)[:, :8]
    more = random.exponential(2.5, (count, 8))
    more[:, 0] = more.max(axis=1) + random.uniform(2, 10, count)
    np.put_along_axis(logits, near, np.take_along_axis(logits, near, axis=1) + more, axis=1)
    return logits.astype(np.float32)


def by_hand(classes=100):
    """One row: classes 20 and 7 lead, the classes below 16 but 7 follow at -1, all others are at -3."""
    logits = np.full((1, classes), 2.0, np.float32)
    logits[0, :16] = 4.0
    logits[0, 20], logits[0, 7] = 5.0, 4.5
    return logits


@pytest.mark.parametrize(
    ("record", "nbytes"),
    [
        (RecordFormat("float16", 4), 8),
        (RecordFormat("float16", 64), 128),
        (RecordFormat("float32", 4), 16),
        (RecordFormat("float16", 4, 3), 14),
        (RecordFormat("float32", 4, 3), 28),
        (RecordFormat("top16", 65), 72),
        (RecordFormat("top16", 65_536), 72),
        (RecordFormat("top16", 65_537), 104),
        (RecordFormat("top16", 1000, 512), 72 + 1024),
    ],
)
def test_the_size_is_that_of_the_table(record, nbytes):
    assert record.nbytes == nbytes
    kept = record.encode(
        np.zeros((2, record.classes), np.float32),
        np.zeros((2, record.embedding), np.float32) if record.embedding else None,
    )
    assert (kept.shape, kept.dtype) == ((2, nbytes), np.uint8)


def test_float16_bytes_by_hand():
    kept = RecordFormat("float16", 4, 1).encode(np.float32([[3, 1, 2.5, -1]]), np.float32([[7]]))
    assert kept.tobytes() == struct.pack("<5e", 0, -2, -0.5, -4, 7)


def test_float32_bytes_are_the_logits_own():
    logits = np.float32([[-0.0, 1e-42, 3.4e38, -np.pi], [1, 2, 3, 4]])
    embedding = np.float32([[1 / 3], [-1e30]])
    record = RecordFormat("float32", 4, 1)
    kept = record.encode(logits, embedding)
    assert kept.tobytes() == struct.pack("<10f", *logits[0], *embedding[0], *logits[1], *embedding[1])
    again = record.decode(kept, 3.0)
    assert again[0].tobytes() == logits.tobytes()
    assert again[1].tobytes() == embedding.tobytes()


def test_top16_bytes_by_hand():
    kept = RecordFormat("top16", 100).encode(by_hand())
    index = [20, 7, *(i for i in range(16) if i != 7)][:16]  # of equals the lower class: 15 of them are at 4.0
    differences = [0, -0.5, *[-1] * 14]
    # The tail: one class at -1 and 83 at -3.
    masses = [np.log(np.exp(-1 / t) + 83 * np.exp(-3 / t)) for t in (1, 2, 4, 8)]
    found = struct.unpack("<16H16e4e", kept.tobytes())
    assert list(found[:16]) == index
    assert list(found[16:32]) == differences
    assert found[32:] == pytest.approx(masses, abs=2e-3)


@pytest.mark.parametrize("temperature", [0.5, 1, 4, 20])
def test_float16_keeps_the_softened_shares_at_any_temperature(temperature):
    logits = realistic(64, 10) * 3
    record = RecordFormat("float16", 10)
    found = record.decode(record.encode(logits), temperature)[0]
    assert found.dtype == np.float32
    assert np.abs(softmax(found, temperature) - softmax(logits, temperature)).max() < 2e-3
    assert (found.max(axis=1) == 0).all()


@pytest.mark.parametrize("classes", [100, 1000, 70_000])
@pytest.mark.parametrize("temperature", [1, 2, 4, 8])
def test_top16_keeps_the_shares_of_the_16_largest_and_the_mass_of_the_others(classes, temperature):
    logits = realistic(20, classes)
    record = RecordFormat("top16", classes)
    found = record.decode(record.encode(logits), temperature)[0]
    top = np.argsort(-logits, axis=1)[:, :TOP]
    before, after = (np.take_along_axis(softmax(z, temperature), top, axis=1) for z in (logits, found))
    # float16 has 11 bits: at differences of 8 to 16 it rounds by up to 1/256, at masses up to 16 too.
    assert after == pytest.approx(before, rel=0.01)
    assert 1 - after.sum(axis=1) == pytest.approx(1 - before.sum(axis=1), rel=0.01)
    others = np.ones_like(found, bool)
    np.put_along_axis(others, top, False, axis=1)
    for row, rest in zip(found, others, strict=True):
        assert len(np.unique(row[rest])) == 1  # the others are equal
        assert row[rest][0] <= row[~rest].min()  # and none has moved among the largest


def test_of_equal_logits_the_lower_class_is_kept():
    """As with a teacher in bfloat16, whose logits have eight bits: several classes are as large as the 16th."""
    logits = realistic(200, 100).round(0)
    found = RecordFormat("top16", 100).encode(logits)
    index = np.ascontiguousarray(found[:, : 2 * TOP]).view("<u2")
    np.testing.assert_array_equal(index, np.argsort(-logits, axis=1, kind="stable")[:, :TOP])


@pytest.mark.parametrize(("temperature", "error"), [(1.5, 0.02), (3, 0.01), (6, 0.01), (20, 0.01), (1000, 0.01)])
def test_top16_between_the_kept_temperatures(temperature, error):
    logits = realistic(50, 1000)
    record = RecordFormat("top16", 1000)
    found = record.decode(record.encode(logits), temperature)[0]
    top = np.argsort(-logits, axis=1)[:, :TOP]
    before, after = (np.take_along_axis(softmax(z, temperature), top, axis=1).sum(axis=1) for z in (logits, found))
    assert 1 - after == pytest.approx(1 - before, rel=error)


@pytest.mark.parametrize(("classes", "temperature", "error"), [(100, 1, 0.02), (100, 4, 0.05), (1000, 1, 0.05)])
def test_the_kd_loss_of_a_top16_record_is_close(classes, temperature, error):
    """What is lost is how the tail's mass is spread: little at T = 1, more where T moves much of the mass there."""
    logits = realistic(200, classes)
    student = (0.6 * logits + np.random.default_rng(1).normal(0, 1, logits.shape)).astype(np.float32)
    record = RecordFormat("top16", classes)
    found = record.decode(record.encode(logits), temperature)[0]
    live = kd(logits, student, temperature).mean()
    assert kd(found, student, temperature).mean() == pytest.approx(live, rel=error)
    if temperature == 4:  # a tail whose mass is right at T = 1 alone is worse by far
        wrong = record.decode(record.encode(logits), 1)[0]
        errors = [abs(kd(each, student, temperature).mean() - live) for each in (found, wrong)]
        assert errors[1] > 2 * errors[0]


@pytest.mark.parametrize("temperature", [0.1, 0.5, 0.9, 1.2, 7, 8, 9, 1e4])
@pytest.mark.parametrize("scale", [0, 1e-3, 1, 100, 1e6])
def test_top16_stays_finite_and_in_order_whatever_comes(temperature, scale):
    logits = np.random.default_rng(2).normal(0, 1, (30, 65)).astype(np.float32) * np.float32(scale)
    record = RecordFormat("top16", 65)
    kept = record.encode(logits)
    found = record.decode(kept, temperature)[0]
    assert record.finite(kept).all()
    assert np.isfinite(found).all()
    top = np.argsort(-logits, axis=1, kind="stable")[:, :TOP]
    kept_ones = np.take_along_axis(found, top, axis=1)
    np.put_along_axis(found, top, -np.inf, axis=1)
    assert (found.max(axis=1) <= kept_ones.min(axis=1)).all()
    assert (kept_ones.max(axis=1) == 0).all()


def test_differences_beyond_float16_become_its_largest():
    kept = RecordFormat("float16", 3, 1).encode(np.float32([[1e6, 0, 999_999]]), np.float32([[1e9]]))
    logits, embedding = RecordFormat("float16", 3, 1).decode(kept)
    assert logits.tolist() == [[0, -65504, -1]]
    assert embedding.tolist() == [[65504]]


@pytest.mark.parametrize("kind", ["float16", "float32", "top16"])
@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_what_is_not_finite_is_told(kind, odd):
    record = RecordFormat(kind, 70, 2)
    logits, embedding = np.random.default_rng(0).normal(size=(4, 70)).astype(np.float32), np.zeros((4, 2), np.float32)
    logits[1, 69] = odd
    embedding[2, 0] = np.nan
    kept = record.encode(logits, embedding)  # without a warning
    assert record.finite(kept).tolist() == [True, False, False, True]
    if kind != "top16":
        assert np.isnan(record.decode(kept)[0][1]).any() or np.isinf(record.decode(kept)[0][1]).any()


def test_no_images_are_no_records():
    record = RecordFormat("top16", 70)
    kept = record.encode(np.zeros((0, 70), np.float32).reshape(0, 70))
    assert kept.shape == (0, 72)
    assert record.decode(kept)[0].shape == (0, 70)
    assert record.finite(kept).shape == (0,)


def test_embeddings_alone_are_kept_bit_by_bit():
    record, values = RecordFormat("float32", 0, 3), np.array([[1 / 3, -2e-30, 5e7], [0, 1, 2]], np.float32)
    kept = record.encode(np.zeros((2, 0), np.float32), values)
    assert kept.shape == (2, 12)
    assert np.array_equal(record.decode(kept)[1], values)
    assert record.finite(record.encode(np.zeros((1, 0), np.float32), np.full((1, 3), np.nan))).tolist() == [False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("float8", 4), "one of float16, float32, top16, got 'float8'"),
        (("top16", 64), "more than 64 classes, and there are 64: use float16"),
        (("float16", 0), "not both 0: 0, 0"),
        (("float16", 0, 8), "a record without logits is of kind float32, got float16"),
        (("float16", 4, -1), "embedding >= 0"),
    ],
)
def test_impossible_records_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        RecordFormat(*arguments)
