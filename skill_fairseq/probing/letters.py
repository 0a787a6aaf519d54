"""Letters from frozen features: a weighted sum of layers and one linear map over a few frames, trained with CTC."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Optional

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from skill_fairseq.probing.intervals import MIN_SPEAKERS, student_t, why_none

EPOCHS = 15
BATCH = 8
RATE = 0.01
KERNEL = 9
"""Input frames of the linear map: 0.18 s."""
BLANK = 0


@dataclasses.dataclass(frozen=True)
class LetterResult:
    """Outcome of one letter task.

    Attributes:
        rate: edits divided by letters of the test set, including spaces; lower is better, above 1 is possible.
        interval: its 95 % interval over speakers, or None.
        letters: number of letters in the test set.
        symbols: letters in all splits; the probe never outputs those that training lacks.
        epoch: the epoch chosen on the valid set, from 1.
        layer_weights: softmax weight of each layer; sums to 1.
        errors, lengths: edits and letters of each test recording.
        speakers: sorted by name.
        by_speaker: a value per speaker; their mean is the rate, see :func:`by_speaker`.
        no_interval: why there is no interval.
    """

    rate: float
    interval: Optional[tuple[float, float]]
    letters: int
    symbols: int
    epoch: int
    layer_weights: list[float]
    errors: list[int]
    lengths: list[int]
    speakers: list[str]
    by_speaker: list[float]
    no_interval: Optional[str]


def edits(found: Sequence[object], wanted: Sequence[object]) -> int:
    """Levenshtein distance: the least number of insertions, deletions and substitutions between two sequences."""
    row = list(range(len(wanted) + 1))
    for i, symbol in enumerate(found, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(wanted, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (symbol != other))
    return row[-1]


def greedy(logits: Tensor) -> list[int]:
    """(T, symbols) to the best symbol of each frame, without repeats and blanks."""
    best = logits.argmax(-1)
    return [int(symbol) for symbol in torch.unique_consecutive(best) if symbol != BLANK]


def by_speaker(errors: Sequence[int], lengths: Sequence[int], speakers: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """A value per speaker, whose mean is the error rate and whose spread is that of speakers.

    The linearised ratio estimator: with rate r, a speaker with E edits in n letters gets r + (E - r n) / mean(n). The
    differences between two models' values give the spread of the difference of their rates.
    """
    names, index = np.unique(np.asarray(speakers, dtype=str), return_inverse=True)
    edited, length = (np.bincount(index, np.asarray(values, dtype=float)) for values in (errors, lengths))
    rate = edited.sum() / length.sum()
    return names.tolist(), rate + (edited - rate * length) / length.mean()


def probe_letters(
    features: Mapping[str, Sequence[Tensor]],
    transcripts: Mapping[str, Sequence[str]],
    speakers: Sequence[str],
    seed: int = 0,
) -> LetterResult:
    """Trains a probe on frozen features and tests it.

    Each dimension of each layer is standardised over the frames of the training set. Adam learns the layers' softmax
    weights, which start equal, and the linear map, which starts at zero, over :data:`EPOCHS` epochs of seeded batches,
    with a learning rate that falls to zero. The epoch with the lowest valid error rate is used. Decoding takes the best
    symbol of every frame, without a language model. The test set is used once, at the end.

    Args:
        features: (layers, T, D) for each recording of the splits `train`, `valid` and `test`.
        transcripts: one for each recording; a space is a letter too.
        speakers: speaker of each test recording.
        seed: seed of the order of batches.

    Returns:
        see `LetterResult`.
    """
    symbols = sorted({letter for split in features for text in transcripts[split] for letter in text})
    targets = {
        split: [torch.tensor([1 + symbols.index(letter) for letter in text]) for text in transcripts[split]]
        for split in features
    }
    mean, spread = _moments(features["train"])
    states = {split: [((x.float() - mean) / spread).half() for x in features[split]] for split in features}
    num_layers, width = mean.size(0), mean.size(2)
    weights = torch.zeros(num_layers, requires_grad=True)
    head = torch.zeros(len(symbols) + 1, width, KERNEL, requires_grad=True)
    bias = torch.zeros(len(symbols) + 1, requires_grad=True)
    parameters = [weights, head, bias]

    def logits(chosen: Sequence[Tensor]) -> Tensor:
        """(layers, T, D) each to (longest T, B, symbols)."""
        mixed = torch.einsum("ltd,l->td", torch.cat(list(chosen), dim=1).float(), weights.softmax(0))
        rows = torch.nn.utils.rnn.pad_sequence(list(mixed.split([state.size(1) for state in chosen])), batch_first=True)
        return F.conv1d(rows.transpose(1, 2), head, bias, padding=KERNEL // 2).permute(2, 0, 1)

    def errors(split: str) -> list[int]:
        with torch.no_grad():
            return [edits(greedy(logits([x])[:, 0]), y.tolist()) for x, y in zip(states[split], targets[split])]

    optimizer = torch.optim.Adam(parameters, lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    best: tuple[int, int, list[Tensor]] | None = None
    steps = EPOCHS * -(-len(targets["train"]) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for epoch in range(1, EPOCHS + 1):
        for batch in torch.randperm(len(targets["train"]), generator=generator).split(BATCH):
            chosen = [states["train"][i] for i in batch.tolist()]
            wanted = [targets["train"][i] for i in batch.tolist()]
            loss = F.ctc_loss(
                logits(chosen).log_softmax(-1),
                torch.cat(wanted),
                torch.tensor([x.size(1) for x in chosen]),
                torch.tensor([len(y) for y in wanted]),
                blank=BLANK,
                zero_infinity=True,
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        wrong = sum(errors("valid"))
        if best is None or wrong < best[0]:
            best = (wrong, epoch, [p.detach().clone() for p in parameters])
    assert best is not None
    with torch.no_grad():
        for parameter, value in zip(parameters, best[2]):
            parameter.copy_(value)
    wrong_by_recording, lengths = errors("test"), [len(y) for y in targets["test"]]
    names, values = by_speaker(wrong_by_recording, lengths, speakers)
    rate, interval = sum(wrong_by_recording) / sum(lengths), None
    if len(names) >= MIN_SPEAKERS:
        reach = student_t(len(names) - 1) * float(values.std(ddof=1)) / math.sqrt(len(names))
        interval = (max(rate - reach, 0.0), rate + reach)
    return LetterResult(
        rate=rate,
        interval=interval,
        letters=sum(lengths),
        symbols=len(symbols),
        epoch=best[1],
        layer_weights=weights.detach().softmax(0).tolist(),
        errors=wrong_by_recording,
        lengths=lengths,
        speakers=names,
        by_speaker=values.tolist(),
        no_interval=None if interval else why_none(len(names)),
    )


def _moments(states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(layers, 1, D) mean and standard deviation over all frames; at least 1e-6."""
    frames = sum(state.size(1) for state in states)
    mean = torch.stack([state.double().sum(1, keepdim=True) for state in states]).sum(0) / frames
    square = torch.stack([state.double().square().sum(1, keepdim=True) for state in states]).sum(0)
    return mean.float(), (square / frames - mean.square()).clamp(min=1e-12).sqrt().float()
