"""Two processes on one machine are one training: what each of them found, against a single process and by hand."""

import json

import numpy as np
import pytest
import torch

from potstill.distributed import group
from potstill.errors import UsageError

from ..forked import forked_ranks
from . import two_processes as two


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both found, by rank."""
    folder = tmp_path_factory.mktemp("two")
    (ranks,) = forked_ranks([two.__file__, folder])
    for each in ranks:
        assert each.returncode == 0, each.errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return two.alone(tmp_path_factory.mktemp("alone"))


def test_each_knows_its_place(found):
    assert [each["place"] for each in found] == [[0, 2, 0, 2], [1, 2, 1, 2]]


def test_what_they_tell_each_other(found):
    for each in found:
        assert each["share"] == {"rank": 0}
        assert each["gather"] == ["rank 0", "rank 1"]
        assert each["highest"] == [1, 5]
        assert each["add"] == [2, 1]
        assert each["shared tensors"] == [[[0.0, 0.0], [0.0, 0.0]], [0, 7]]


def test_figures_are_those_of_all_images(found):
    """Up to 4,096 images and beyond, where AUC is counted in bins."""
    for count, figures in found[0]["metrics"].items():
        metrics = two.StreamingMetrics(4)
        metrics.update(*two.logits(int(count)))
        single = metrics.compute()
        assert figures == pytest.approx(single, rel=1e-12, abs=1e-12), count
        assert found[1]["metrics"][count] == figures


def test_loss_terms_are_means_over_all_images(found):
    sizes = np.arange(5) + 10
    mean = float((sizes * np.arange(5)).sum() / sizes.sum())
    for each in found:
        assert each["terms"] == pytest.approx({"ce": mean, "kd": 2 * mean}, rel=1e-6)


def test_a_term_has_one_factor_in_all_processes(found):
    """Gradients of 2 and 8 against 1 and 1: the factor is 2/10."""
    assert [each["scaled"] for each in found] == pytest.approx([0.2 * 2, 0.2 * 8])


def test_training_is_that_of_one_process(found, alone):
    """Without BatchNorm nothing depends on who sees which image, also in a last batch that is shared 3 to 2."""
    first, second = (each["training"] for each in found)
    assert first["weights"] == second["weights"]
    for ours, single in zip(first["weights"], alone["weights"], strict=True):
        np.testing.assert_allclose(ours, single, atol=2e-6)
    for ours, single in zip(first["records"], alone["records"], strict=True):
        assert ours["best"] == single["best"]
        for split in ("train", "val"):
            terms, alone_terms = ours[split].pop("terms"), single[split].pop("terms")
            assert terms == pytest.approx(alone_terms, rel=1e-4)
            assert ours[split] == pytest.approx(single[split], rel=1e-4)


def test_evaluation_counts_each_image_once(found, alone):
    """45 images in batches of 8: three batches for the one, three for the other."""
    _, labels, index = found[0]["training"]["predicted"]
    assert index == list(range(two.IMAGES))
    assert labels == alone["predicted"][1]


def test_predictions_are_gathered_to_the_first_process_alone(found):
    """By rows and in bins; what is wrong with them is raised in both, in the same words."""
    assert found[1]["training"]["predicted"] is None
    by_rows, in_bins = found[0]["evaluation"]["predicted"]
    assert by_rows[0] == in_bins[0]
    assert by_rows[1] == pytest.approx(in_bins[1], abs=1e-3)
    assert found[1]["evaluation"]["predicted"] == [None, None]
    assert [each["evaluation"]["first"] for each in found] == [0, None]
    assert found[0]["evaluation"]["errors"] == found[1]["evaluation"]["errors"]
    (kind, text, code), (_, other, _) = found[0]["evaluation"]["errors"]
    assert (kind, code) == ("NonFiniteError", 6)
    assert text == "a logit of x, 08, is NaN or infinite (21 of 45 images)"
    assert "image 8 is NaN" in other  # the second batch of 8, the first of the second process


def test_a_step_reduces_gradients_and_nothing_else(found):
    """As many all-reduces as torch's DDP of the student alone; factors of terms are measured in the first steps of an
    epoch, a small all-reduce for those on logits and one for those on hidden layers."""
    for each in found:
        counts = each["reductions"]
        for static in (True, False):
            assert counts[f"distiller {static}"] == counts[f"plain {static}"]
            assert min(counts[f"plain {static}"]) >= 1
        more = np.subtract(counts["scaling auto"], counts["scaling None"]).tolist()
        assert more == [2] * two.MEASURED_STEPS + [0] * 3


def test_only_the_first_writes(found):
    assert found[0]["training"]["wrote"] != []
    assert found[1]["training"]["wrote"] == []


def test_gradients_are_exchanged_once_per_update(found):
    before, after = zip(*(each["held back"] for each in found), strict=True)
    assert before[0] != before[1]
    assert after[0] == after[1]


def test_a_store_is_filled_by_both_and_read_by_both(found):
    """Each asks for its share of the 6 batches once; nothing is asked again."""
    for each in found:
        assert each["store"]["asked"] == [6, 6, 6]
        assert each["store"]["coverage"] == [two.IMAGES]
    assert sum(each["store"]["counts"]["computed"] for each in found) == two.IMAGES
    assert sum(each["store"]["counts"]["read"] for each in found) == 2 * two.IMAGES


@pytest.mark.parametrize(
    ("there", "local_rank", "local_count", "chosen"),
    [(8, 3, 8, 3), (8, 1, 2, 1), (1, 0, 1, 0), (1, 3, 4, 0)],  # the last: SLURM shows each process a GPU of its own
)
def test_each_process_has_a_gpu_of_its_own(monkeypatch, there, local_rank, local_count, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setattr(torch.cuda, "set_device", (found := []).append)
    group._choose_gpu(local_rank, local_count)
    assert found == [chosen]


def test_too_few_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="4 processes on a machine with 2 GPUs"):
        group._choose_gpu(0, 4)
    group.check_distinct_gpus(["node1 GPU-a", "node1 GPU-b", "node2 GPU-a"])
    with pytest.raises(UsageError, match="processes 0 and 2 of 3 see the same GPU"):
        group.check_distinct_gpus(["node1 GPU-a", "node1 GPU-b", "node1 GPU-a"])
