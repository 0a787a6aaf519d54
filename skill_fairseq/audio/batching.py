"""Batches of equal-length utterances, and even division of batches over ranks."""

from __future__ import annotations

from collections.abc import Sequence


def length_exact_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Makes batches that need no padding, because only utterances of equal length share one.

    Padding changes the features of some encoders (:func:`skill_fairseq.load_encoder` says which). Lengths differ by
    single samples, so most batches hold one utterance unless the audio was cut to a few lengths.

    Args:
        lengths: samples of each utterance.
        max_tokens: samples per batch at most; a longer utterance gets its own batch.

    Returns:
        indices into ``lengths``, each once; batches are in the order of their first utterance, utterances in a batch
        keep their order.

    Raises:
        ValueError: a length or ``max_tokens`` is not positive.

    Example::

        for batch in length_exact_batches([len(wave) for wave in waves], max_tokens=16000 * 60):
            out = encoder(torch.stack([waves[i] for i in batch]))
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens: {max_tokens}; expected a positive number of samples")
    batches: list[list[int]] = []
    open_batch: dict[int, list[int]] = {}  # by length, the batch that can still grow
    for i, length in enumerate(lengths):
        if length < 1:
            raise ValueError(f"lengths: {length} samples at index {i}; expected a positive number")
        batch = open_batch.get(length)
        if batch is None or (len(batch) + 1) * length > max_tokens:
            batch = open_batch[length] = []
            batches.append(batch)
        batch.append(i)
    return batches


def split_batches(batches: Sequence[Sequence[int]], multiple: int) -> list[list[int]]:
    """Halves the largest batches until their number is a multiple, so that every rank gets equally many.

    Args:
        batches: batches of utterances; not modified.
        multiple: number of ranks.

    Returns:
        batches with the same utterances in the same order, after at most ``multiple - 1`` halvings. Of batches with
        equally many utterances the first is halved first, and the first half is never the smaller one.

    Raises:
        ValueError: there are fewer utterances than batches needed.
    """
    if multiple < 1:
        raise ValueError(f"multiple: {multiple}; expected a positive number of ranks")
    utterances = sum(len(batch) for batch in batches)
    wanted = -(-len(batches) // multiple) * multiple
    if utterances < wanted:
        raise ValueError(
            f"{utterances} utterances in {len(batches)} batches cannot be divided over {multiple} processes: all need "
            f"equally many batches, {wanted} in all. Use fewer processes (distributed_training.distributed_world_size) "
            "or more audio, or put more utterances into a batch (dataset.max_tokens, dataset.batch_size)"
        )
    result = [list(batch) for batch in batches]
    while len(result) < wanted:
        largest = max(range(len(result)), key=lambda i: len(result[i]))  # the first of equals
        batch = result[largest]
        middle = (len(batch) + 1) // 2
        result[largest : largest + 1] = [batch[:middle], batch[middle:]]
    return result
