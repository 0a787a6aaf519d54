"""Classification of frozen features: a weighted sum of layers, then logistic regression."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Optional

import numpy as np
import torch
from torch.nn import functional as F

from skill_fairseq.probing.intervals import accuracy_interval

STRENGTHS = tuple(10.0**exponent for exponent in range(-5, 3))
"""Values of C (inverse regularisation) to choose from on the valid set."""


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """Outcome of one probe.

    Attributes:
        accuracy: share of test recordings classified correctly.
        interval: its 95 % interval over speakers; None with fewer than three.
        correct, total: numbers of test recordings.
        classes: number of classes.
        strength: C chosen on the valid set.
        layer_weights: softmax weight of each layer; sums to 1.
        right: whether each test recording was classified correctly; two models' values can be paired.
    """

    accuracy: float
    interval: Optional[tuple[float, float]]
    correct: int
    total: int
    classes: int
    strength: float
    layer_weights: list[float]
    right: list[bool]


def learn_layer_weights(
    features: np.ndarray, targets: np.ndarray, penalty: float = 0.01, steps: int = 100
) -> np.ndarray:
    """Weights of a sum over layers, learned together with a linear classifier.

    The weighted sum is SUPERB's (arXiv 2105.01051, section 3). Minimises mean cross-entropy + penalty / 2 *
    |W|^2 by L-BFGS over softmax weights, which start equal, and a linear head, which starts at zero. Nothing is
    random.

    Args:
        features: (N, layers, F) float32, each dimension of each layer standardised.
        targets: (N,) class indices.
        penalty: factor of the head's squared weights.
        steps: maximum number of L-BFGS iterations.

    Returns:
        (layers,) positive, sum 1.
    """
    num_layers, width = features.shape[1:]
    if num_layers == 1:
        return np.ones(1, dtype=np.float32)
    x, y = torch.from_numpy(np.ascontiguousarray(features, dtype=np.float32)), torch.from_numpy(targets)
    logits = torch.zeros(num_layers, requires_grad=True)
    head = torch.zeros(width, int(targets.max()) + 1, requires_grad=True)
    bias = torch.zeros(head.size(1), requires_grad=True)
    optimizer = torch.optim.LBFGS([logits, head, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        mixed = torch.einsum("nlf,l->nf", x, logits.softmax(0))
        loss = F.cross_entropy(mixed @ head + bias, y) + penalty / 2 * head.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call,arg-type]
    return logits.detach().softmax(0).numpy()


def probe(
    features: Mapping[str, np.ndarray], labels: Mapping[str, Sequence[str]], speakers: Sequence[str]
) -> ProbeResult:
    """Trains a probe on frozen features and tests it.

    Layer weights are learned on the training set. The weighted sum, standardised on the training set, goes to
    scikit-learn's LogisticRegression; C is the value with the best valid accuracy, or in a tie the lowest valid
    cross-entropy. The test set is used once, at the end.

    Args:
        features: (N, layers, F) for each of the splits `train`, `valid` and `test`.
        labels: N labels for each split; every label must occur in `train`.
        speakers: speaker of each test recording.

    Returns:
        see `ProbeResult`.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.preprocessing import LabelEncoder, StandardScaler

    encoder = LabelEncoder().fit(labels["train"])
    targets = {split: encoder.transform(labels[split]) for split in features}
    shape = features["train"].shape[1:]
    per_layer = StandardScaler().fit(features["train"].reshape(len(features["train"]), -1))
    scaled = {s: per_layer.transform(x.reshape(len(x), -1)).reshape(-1, *shape) for s, x in features.items()}
    weights = learn_layer_weights(scaled["train"], targets["train"])
    mixed = {split: np.einsum("nlf,l->nf", x, weights) for split, x in scaled.items()}
    scaler = StandardScaler().fit(mixed["train"])
    mixed = {split: scaler.transform(x) for split, x in mixed.items()}

    classes = np.arange(len(encoder.classes_))
    candidates = []
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=5000).fit(mixed["train"], targets["train"])
        accuracy = model.score(mixed["valid"], targets["valid"])
        loss = log_loss(targets["valid"], model.predict_proba(mixed["valid"]), labels=classes)
        candidates.append((-accuracy, loss, strength, model))
    _, _, strength, model = min(candidates, key=lambda candidate: candidate[:2])
    right = model.predict(mixed["test"]) == targets["test"]
    correct, total = int(right.sum()), len(right)
    return ProbeResult(
        accuracy=correct / total,
        interval=accuracy_interval(right.tolist(), speakers),
        correct=correct,
        total=total,
        classes=len(classes),
        strength=strength,
        layer_weights=[float(weight) for weight in weights],
        right=right.tolist(),
    )
