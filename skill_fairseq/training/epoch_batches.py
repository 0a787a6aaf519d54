"""Resumes in the middle of an epoch only if its batches are the same as when the checkpoint was written."""

from __future__ import annotations

import hashlib
import logging
from typing import Any, Dict

import numpy as np

logger = logging.getLogger(__name__)

KEY = "train_batches"
"""Key of the fingerprint in ``extra_state``."""


def fingerprint(iterator: Any) -> str:
    """Hexadecimal SHA-256 of an epoch's batches of all ranks, and of everything that their order depends on.

    Args:
        iterator: fairseq's ``EpochBatchIterator``; other kinds, which have no fixed batches, give "".
    """
    if not hasattr(iterator, "frozen_batches"):
        return ""
    digest = hashlib.sha256(f"{iterator.seed} {iterator.num_shards}".encode())
    for batch in iterator.frozen_batches:
        indices = np.asarray(batch, dtype=np.int64)
        digest.update(np.int64(len(indices)).tobytes() + indices.tobytes())
    return digest.hexdigest()


def skips_to_next_epoch(extra_state: Dict[str, Any], iterator: Any) -> bool:
    """Whether a run cannot resume inside its epoch; if so, sets the position in ``extra_state`` to the next epoch.

    fairseq would continue with different batches, or fail with "Cannot resume training due to dataloader mismatch,
    please report this to the fairseq developers".

    Args:
        extra_state: the checkpoint's, before fairseq passes its "train_iterator" to the iterator.
        iterator: the current run's iterator for the checkpoint's epoch.
    """
    place = extra_state["train_iterator"]
    done, epoch = place.get("iterations_in_epoch", 0), place["epoch"]
    mine, saved = fingerprint(iterator), extra_state.get(KEY)
    if not done or not mine or (saved == mine if saved else done < len(iterator)):
        return False
    logger.warning(
        f"epoch {epoch} has other batches than when the checkpoint was written, after {done} of them: another "
        "manifest, dataset.max_tokens or seed, or another number of processes. Its rest is skipped, and the run "
        f"resumes with epoch {epoch + 1}"
    )
    place.update(epoch=epoch + 1, iterations_in_epoch=0)
    return True
