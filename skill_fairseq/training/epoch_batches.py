"""Going on in the middle of an epoch: only where its batches are those that the checkpoint was written among."""

from __future__ import annotations

import hashlib
import logging
from typing import Any, Dict

import numpy as np

logger = logging.getLogger(__name__)

KEY = "train_batches"
"""Where ``extra_state`` holds the fingerprint."""


def fingerprint(iterator: Any) -> str:
    """Hexadecimal SHA-256 of an epoch's batches, of all ranks, and of what their order depends on.

    Args:
        iterator: fairseq's ``EpochBatchIterator``; "" for other kinds, which have no batches to look at.
    """
    if not hasattr(iterator, "frozen_batches"):
        return ""
    digest = hashlib.sha256(f"{iterator.seed} {iterator.num_shards}".encode())
    for batch in iterator.frozen_batches:
        indices = np.asarray(batch, dtype=np.int64)
        digest.update(np.int64(len(indices)).tobytes() + indices.tobytes())
    return digest.hexdigest()


def skips_to_next_epoch(extra_state: Dict[str, Any], iterator: Any) -> bool:
    """Whether a run cannot go on inside its epoch; then the place in ``extra_state`` becomes the next epoch's begin.

    fairseq would go on among batches that are others, or end with "Cannot resume training due to dataloader mismatch,
    please report this to the fairseq developers".

    Args:
        extra_state: of the checkpoint, before fairseq gives its "train_iterator" to the iterator.
        iterator: of the checkpoint's epoch, as the present run makes it.
    """
    place = extra_state["train_iterator"]
    done, epoch = place.get("iterations_in_epoch", 0), place["epoch"]
    mine, saved = fingerprint(iterator), extra_state.get(KEY)
    if not done or not mine or (saved == mine if saved else done < len(iterator)):
        return False
    logger.warning(
        f"epoch {epoch} has other batches than when the checkpoint was written, after {done} of them: another "
        "manifest, dataset.max_tokens or seed, or another number of processes. The rest of it is skipped, the run goes "
        f"on with epoch {epoch + 1}"
    )
    place.update(epoch=epoch + 1, iterations_in_epoch=0)
    return True
