import numpy as np

from potstill.data.samplers import CounterRNG, random_bits, splitmix64, uniform


def test_splitmix64_reference_sequence() -> None:
    # First outputs of the reference generator seeded with 1234567 (its state grows by the golden gamma).
    states = np.uint64(1234567) + np.arange(5, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert splitmix64(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_words_by_a_slow_reference() -> None:
    import zlib

    def step(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    found = random_bits(2**62 + 1, "hflip", np.array([3, 70000]), np.array([9, 0]))
    for value, (sample, view) in zip(found.tolist(), [(3, 9), (70000, 0)], strict=True):
        assert value == step(step(step(step(2**62 + 1) ^ zlib.crc32(b"hflip")) ^ sample) ^ view)


def test_uniform_fills_the_interval_and_fields_are_independent() -> None:
    ids = np.arange(20000)
    first, second = uniform(0, "shift x", ids, 0), uniform(0, "shift y", ids, 0)
    assert first.min() >= 0
    assert first.max() < 1
    assert np.abs(np.histogram(first, bins=10, range=(0, 1))[0] / 2000 - 1).max() < 0.1
    for other in (second, uniform(1, "shift x", ids, 0), uniform(0, "shift x", ids, 1)):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.03


def test_draws_are_uniform_numbers_field_by_field() -> None:
    ids, view = np.array([5, 9, 5]), np.array([0, 1, 2])
    draws = CounterRNG(-3, ids, view)
    assert len(draws) == 3
    assert draws("hflip").tolist() == uniform(-3, "hflip", ids, view).tolist()
    assert draws("hflip").tolist() == draws("hflip").tolist() != draws("vflip").tolist()
