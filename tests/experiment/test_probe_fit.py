"""Logistic regression on embeddings, beside scikit-learn's, and its folds."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedShuffleSplit

from potstill.errors import UsageError
from potstill.experiment import probe as probe_module
from potstill.experiment.probe import check_probe_labels, fit_probe, stratified_folds


@pytest.fixture(scope="module")
def points():
    """120 points of three classes that overlap, in 6 dimensions of very different spread."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 3
    centres = torch.randn(3, 6, generator=random)
    spread = torch.tensor([1.0, 3.0, 10.0, 0.1, 1.0, 100.0])
    return (centres[labels] + torch.randn(120, 6, generator=random)) * spread + 5.0, labels


@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_the_heads_are_scikit_learns(points, strength):
    embeddings, labels = points
    probe = fit_probe(embeddings, labels, 3, seed=1, strengths=[strength])
    standard = ((embeddings - embeddings.mean(0)) / embeddings.std(0, correction=0)).double().numpy()
    assert {probe.C} == {strength}
    right, losses = [], []
    for head in range(probe.folds + 1):
        fitted, left_out = (probe.fold != head).numpy(), (probe.fold == head).numpy()
        peer = LogisticRegression(C=strength, max_iter=1000, tol=1e-8).fit(standard[fitted], labels.numpy()[fitted])
        ours = (embeddings @ probe.weight[head].T + probe.bias[head]).softmax(dim=1)
        np.testing.assert_allclose(ours, peer.predict_proba(standard), atol=2e-3)
        if head < probe.folds:
            said = peer.predict_proba(standard[left_out])
            right += (said.argmax(1) == labels.numpy()[left_out]).tolist()
            losses += (-np.log(said[np.arange(len(said)), labels.numpy()[left_out]])).tolist()
    assert probe.top1 == pytest.approx(np.mean(right), abs=1 / 120)
    assert probe.nll == pytest.approx(np.mean(losses), abs=2e-3)


def test_class_weights_are_scikit_learns(points):
    embeddings, labels = points
    kept = torch.cat(
        [torch.nonzero(labels == 0)[:10, 0], torch.nonzero(labels == 1)[:, 0], torch.nonzero(labels == 2)[:, 0]]
    )
    embeddings, labels = embeddings[kept], labels[kept]
    weights = len(labels) / (3 * labels.bincount())
    probe = fit_probe(embeddings, labels, 3, seed=0, class_weights=weights, strengths=[0.1])
    standard = ((embeddings - embeddings.mean(0)) / embeddings.std(0, correction=0)).double().numpy()
    peer = LogisticRegression(C=0.1, max_iter=1000, tol=1e-8, class_weight="balanced").fit(standard, labels.numpy())
    np.testing.assert_allclose(probe.logits(embeddings).softmax(1), peer.predict_proba(standard), atol=2e-3)


def test_the_strength_is_that_of_the_best_cross_entropy_on_images_left_out(points):
    embeddings, labels = points
    alone = {c: fit_probe(embeddings, labels, 3, seed=0, strengths=[c]).nll for c in (1e-4, 1e-2, 1.0)}
    chosen = fit_probe(embeddings, labels, 3, seed=0, strengths=list(alone))
    best = min(alone, key=alone.get)
    assert {chosen.C} == {best}
    assert chosen.nll == pytest.approx(min(alone.values()), abs=2e-3)


def test_the_learning_curve_has_the_accuracy_of_heads_fitted_on_fewer_images():
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    embeddings = torch.randn(4, 40, generator=random)[labels] * 0.35 + torch.randn(400, 40, generator=random)
    probe = fit_probe(embeddings, labels, 4, seed=3, strengths=[0.01])
    assert list(probe.learning_curve) == [100, 200, 400]
    assert probe.learning_curve[400] == probe.top1 > probe.learning_curve[100]
    standard = ((embeddings - embeddings.mean(0)) / embeddings.std(0, correction=0)).numpy()
    labels = labels.numpy()
    for images, found in probe.learning_curve.items():
        # Scikit-learn on other images, as many of each class as a head without a fold is fitted on.
        splits = StratifiedShuffleSplit(10, train_size=images * 4 // 5, random_state=0)
        peers = []
        for fitted, rest in splits.split(standard, labels):
            peer = LogisticRegression(C=0.01).fit(standard[fitted], labels[fitted])
            peers.append(peer.score(standard[rest], labels[rest]))
        assert found == pytest.approx(np.mean(peers), abs=0.03), images


def test_a_learning_curve_over_all_images_is_the_cross_validation(points, monkeypatch):
    embeddings, labels = points
    monkeypatch.setattr(probe_module, "CURVE_SHARES", (1.0,))
    heads = []
    monkeypatch.setattr(probe_module._Solver, "evaluate", _recording(heads, probe_module._Solver.evaluate))
    probe = fit_probe(embeddings, labels, 3, seed=1, strengths=[0.1])
    cross_validated, curve = heads
    torch.testing.assert_close(curve, cross_validated[: probe.folds], atol=2e-3, rtol=0)
    assert probe.learning_curve == {120: probe.top1}


def _recording(heads, evaluate):
    def record(solver, *images):
        heads.append(solver.weight.detach().clone())
        return evaluate(solver, *images)

    return record


def test_a_share_that_lacks_a_class_is_no_point_of_the_learning_curve():
    labels = torch.tensor([0] * 40 + [1] * 3)
    embeddings = torch.randn(43, 4, generator=torch.Generator().manual_seed(0)) + labels[:, None]
    assert list(fit_probe(embeddings, labels, 2, seed=0, strengths=[0.1]).learning_curve) == [43]


def test_noise_labels_are_learned_by_heart_and_left_out_ones_are_guessed():
    random = torch.Generator().manual_seed(0)
    embeddings, labels = torch.randn(60, 200, generator=random), torch.arange(60) % 2
    probe = fit_probe(embeddings, labels, 2, seed=0, strengths=[1.0])
    assert (probe.logits(embeddings).argmax(1) == labels).all()
    own = torch.einsum("nd,nkd->nk", embeddings, probe.weight[probe.fold]) + probe.bias[probe.fold]
    assert 0.2 < float((own.argmax(1) == labels).float().mean()) < 0.8


def test_images_without_a_label_change_nothing_and_get_the_last_head(points):
    embeddings, labels = points
    more = torch.cat([embeddings, 1e3 * torch.ones(5, 6)])
    probe = fit_probe(more, torch.cat([labels, torch.full((5,), -100)]), 3, seed=0, strengths=[0.1])
    plain = fit_probe(embeddings, labels, 3, seed=0, strengths=[0.1])
    assert torch.equal(probe.weight, plain.weight)
    assert probe.fold[120:].tolist() == [probe.folds] * 5


def test_every_class_is_in_the_complement_of_every_fold():
    labels = torch.tensor([0] * 40 + [1] * 2 + [2] * 3)
    for seed in range(20):
        fold = stratified_folds(labels, 5, seed)
        for each in range(5):
            assert set(labels[fold != each].tolist()) == {0, 1, 2}
        assert fold[labels == 0].bincount().tolist() == [8] * 5
    assert not torch.equal(stratified_folds(labels, 5, 0), stratified_folds(labels, 5, 1))


@pytest.mark.parametrize(("counts", "word"), [([3, 0, 3], "no image of 'b'"), ([3, 3, 1], "one image of 'c'")])
def test_classes_of_too_few_images_are_refused(counts, word):
    labels = np.repeat(np.arange(3), counts).astype(np.int64)
    with pytest.raises(UsageError, match=word):
        check_probe_labels(labels, ("a", "b", "c"))
    check_probe_labels(np.repeat(np.arange(3), [2, 2, 2]), ("a", "b", "c"))
