import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.contrib.federated.partition import Partition, parse_partition, partition_indices
from potstill.errors import DataError, UsageError

LABELS = np.repeat(np.arange(4), 50)


@given(clients=st.integers(1, 8), seed=st.integers(0, 99), alpha=st.sampled_from([None, 0.3, 1.0, 100.0]))
@settings(max_examples=40, deadline=None)
def test_every_image_belongs_to_one_client(clients, seed, alpha):
    parts = partition_indices(LABELS, clients, Partition(alpha), seed)
    assert len(parts) == clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(200))
    assert min(map(len, parts)) >= 2


def test_the_seed_decides():
    first, again, other = (partition_indices(LABELS, 4, Partition(0.3), seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(len(a) != len(b) for a, b in zip(first, other, strict=True))


def test_a_small_alpha_makes_clients_differ_and_iid_does_not():
    def largest_class(alpha):
        shares = []
        for seed in range(5):
            for part in partition_indices(LABELS, 4, Partition(alpha), seed):
                shares.append(np.bincount(LABELS[part], minlength=4).max() / len(part))
        return np.mean(shares)

    # A client of one class alone has 1; one that is like all the others 1/4 and a little.
    assert largest_class(0.1) > 0.7
    assert largest_class(1000.0) < 0.3
    assert largest_class(None) < 0.4
    assert [len(part) for part in partition_indices(LABELS, 3, Partition(), 0)] == [67, 67, 66]


def test_what_cannot_be_divided_says_what_can():
    with pytest.raises(
        UsageError, match=r"5 training images cannot be divided among 3 clients with 2 or more .* at most 2"
    ):
        partition_indices(np.zeros(5, dtype=np.int64), 3, Partition(), 0)
    with pytest.raises(UsageError, match="--clients must be at least 1, got 0"):
        partition_indices(LABELS, 0, Partition(), 0)
    with pytest.raises(DataError, match=r"dirichlet:0.001 leaves one of 20 clients .* fewer clients, dirichlet:0.003"):
        partition_indices(LABELS, 20, Partition(0.001), 0)


@pytest.mark.parametrize("text", ["iid", "dirichlet:0.3", "folders:clients"])
def test_partitions_are_read_and_shown(text):
    assert str(parse_partition(text)) == text


@pytest.mark.parametrize("value", ["", ":", ":0", ":nan", ":inf", ":-1", ":x"])
def test_an_alpha_must_be_a_number_above_zero(value):
    with pytest.raises(UsageError, match=r"--partition dirichlet:ALPHA needs a number above 0, such as dirichlet:0.3"):
        parse_partition(f"dirichlet{value}")


@pytest.mark.parametrize("text", ["", "iid:3", "folders:", "folders", "shards:2"])
def test_wrong_ones_are_refused(text):
    with pytest.raises(UsageError, match="--partition is iid, dirichlet:ALPHA"):
        parse_partition(text)
