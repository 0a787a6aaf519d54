"""Batches of utterances of one length, for features that do not depend on the batch."""

from __future__ import annotations

from collections.abc import Sequence


def length_exact_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Batches that need no padding: only utterances of equal length share one.

    Padding changes the features of some encoders (:func:`skill_fairseq.load_encoder` says which). Utterances differ
    in length by single samples, so most batches hold one of them unless audio was cut to few lengths.

    Args:
        lengths: samples of each utterance.
        max_tokens: most samples of a batch; a longer utterance has a batch of its own.

    Returns:
        indices into ``lengths``, each once; batches in the order of their first utterance, and within a batch the
        order is kept.

    Raises:
        ValueError: a length or ``max_tokens`` is not positive.

    Example::

        for batch in length_exact_batches([len(wave) for wave in waves], max_tokens=16000 * 60):
            out = encoder(torch.stack([waves[i] for i in batch]))
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens: {max_tokens}; expected a positive number of samples")
    batches: list[list[int]] = []
    open_batch: dict[int, list[int]] = {}  # the one of each length that may still grow
    for i, length in enumerate(lengths):
        if length < 1:
            raise ValueError(f"lengths: {length} samples at index {i}; expected a positive number")
        batch = open_batch.get(length)
        if batch is None or (len(batch) + 1) * length > max_tokens:
            batch = open_batch[length] = []
            batches.append(batch)
        batch.append(i)
    return batches
