"""Weighted sum of layers and logistic regression."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from skill_fairseq.probing.classify import STRENGTHS, ProbeResult, learn_layer_weights
from skill_fairseq.probing.classify import probe as probe_of_speakers
from skill_fairseq.probing.intervals import accuracy_interval

CLASSES = ["one", "two", "three", "four"]


def made_up(seed: int = 0, signal: float = 2.0) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Four layers of ten dimensions, of which only layer 2 encodes the class; scales differ widely."""
    generator = np.random.default_rng(seed)
    centres = signal * generator.normal(size=(len(CLASSES), 10))
    features, labels = {}, {}
    for split, count in {"train": 120, "valid": 40, "test": 200}.items():
        targets = generator.integers(len(CLASSES), size=count)
        x = generator.normal(size=(count, 4, 10))
        x[:, 2] += centres[targets]
        features[split] = (x * np.array([100.0, 1.0, 0.01, 10.0])[:, None] + 5).astype(np.float32)
        labels[split] = [CLASSES[target] for target in targets]
    return features, labels


def probe(features: dict[str, np.ndarray], labels: dict[str, list[str]], speakers: int = 8) -> ProbeResult:
    """Test recordings of this many speakers, in turn."""
    return probe_of_speakers(features, labels, [str(i % speakers) for i in range(len(labels["test"]))])


def standardised(x: np.ndarray) -> np.ndarray:
    return ((x - x.mean(0)) / x.std(0)).astype(np.float32)


def test_the_layer_that_knows_gets_the_weight() -> None:
    features, labels = made_up()
    result = probe(features, labels)
    assert np.argmax(result.layer_weights) == 2 and result.layer_weights[2] > 0.9
    assert sum(result.layer_weights) == pytest.approx(1, abs=1e-5)
    assert result.accuracy > 0.97 and (result.total, result.classes) == (200, 4)
    assert result.accuracy == result.correct / result.total
    assert result.interval == accuracy_interval(result.right, [str(i % 8) for i in range(200)])
    assert probe(features, labels, speakers=2).interval is None and result.strength in STRENGTHS


def test_it_says_which_recordings_were_right() -> None:
    features, labels = made_up()
    right = probe(features, labels).right
    labels["test"][7] = next(name for name in CLASSES if name != labels["test"][7])
    changed = probe(features, labels)
    assert len(right) == changed.total == 200 and sum(changed.right) == changed.correct
    assert right[7] and [i for i, (a, b) in enumerate(zip(right, changed.right)) if a != b] == [7]


def test_weights_minimise_the_stated_objective() -> None:
    features, labels = made_up(signal=0.7)
    x, y = standardised(features["train"]), np.array([CLASSES.index(label) for label in labels["train"]])

    def best_objective(weights: np.ndarray) -> float:
        """Gradient descent on the head only, with fixed layer weights."""
        mixed = torch.from_numpy(np.tensordot(x, weights.astype(np.float32), axes=([1], [0])))
        head, bias = torch.zeros(10, 4, requires_grad=True), torch.zeros(4, requires_grad=True)
        optimizer = torch.optim.Adam([head, bias], lr=0.1)
        for _ in range(400):
            optimizer.zero_grad()
            loss = F.cross_entropy(mixed @ head + bias, torch.from_numpy(y)) + 0.005 * head.square().sum()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    found = learn_layer_weights(x, y)
    value = best_objective(found)
    for other in np.eye(4) * 0.3 + 0.7 * found:  # towards each layer: no direction is better
        assert value <= best_objective(other) + 1e-3
    assert value < best_objective(np.full(4, 0.25)) - 0.01


def test_one_layer_needs_no_weights_and_nothing_is_random() -> None:
    features, labels = made_up()
    only = {split: x[:, 2:3] for split, x in features.items()}
    assert probe(only, labels).layer_weights == [1.0]
    assert probe(features, labels) == probe(features, labels)


def test_scale_of_a_dimension_does_not_matter() -> None:
    features, labels = made_up(signal=0.5)
    scaled = {split: x * 1000 for split, x in features.items()}
    assert probe(scaled, labels).correct == pytest.approx(probe(features, labels).correct, abs=1)


def test_no_knowledge_gives_chance() -> None:
    features, labels = made_up(signal=0.0)
    result = probe(features, labels)
    assert result.interval and result.interval[0] < 0.25 < result.interval[1]


def test_test_labels_are_used_for_counting_only() -> None:
    features, labels = made_up(signal=0.5)
    result = probe(features, labels)
    turned = {**labels, "test": [CLASSES[(CLASSES.index(label) + 1) % 4] for label in labels["test"]]}
    other = probe(features, turned)
    assert (other.strength, other.layer_weights) == (result.strength, result.layer_weights)
    assert other.correct < result.correct


def test_the_valid_set_chooses_the_regularisation() -> None:
    """If valid labels follow the training noise, weak regularisation wins, otherwise strong."""
    generator = np.random.default_rng(3)
    x = generator.normal(size=(60, 1, 80)).astype(np.float32)
    truth = np.where(x[:, 0, 0] > 0, "a", "b")
    noisy = np.where(generator.random(60) < 0.35, np.where(truth == "a", "b", "a"), truth)
    fresh = generator.normal(size=(400, 1, 80)).astype(np.float32)
    honest = np.where(fresh[:, 0, 0] > 0, "a", "b")

    def strength(valid: np.ndarray, valid_labels: np.ndarray) -> float:
        features = {"train": x, "valid": valid, "test": fresh}
        return probe(features, {"train": list(noisy), "valid": list(valid_labels), "test": list(honest)}).strength

    assert strength(x, noisy) > strength(fresh, honest)
