"""HuBERT, wav2vec 2.0 and data2vec as s3prl converts them from fairseq: config and weights as plain values.

s3prl's conversions (``s3prl/upstream/*/convert.py``) write ``{"task_cfg", "model_cfg", "model_weight"}``, for HuBERT
also ``"dictionaries_symbols"``; config fields and weights keep fairseq's names. Its WavLM files are Microsoft's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skill_fairseq.checkpoints.fairseq_import import encoder_source, model_name, model_state
from skill_fairseq.checkpoints.safe_load import plain
from skill_fairseq.checkpoints.source import EncoderSource

KEYS = ("task_cfg", "model_cfg", "model_weight")


def read_s3prl(checkpoint: Mapping[str, Any], path: Path) -> EncoderSource:
    """The encoder in a file of s3prl's conversions.

    Raises:
        ValueError: another model, or a feature that this encoder does not have.
    """
    fields, task = plain(checkpoint["model_cfg"]), plain(checkpoint["task_cfg"])
    name = model_name(fields) or _guess(checkpoint, fields)
    state = model_state(checkpoint["model_weight"], path)
    source = encoder_source(f"s3prl's conversion of {name!r}", {**fields, "_name": name}, task, state, path, {})
    if model_name(fields):
        return source
    guess = f"a model of kind {name!r}: assumed from the file's other parts; its config does not say"
    return source._replace(assumed=(guess, *source.assumed))


def _guess(checkpoint: Mapping[str, Any], fields: Mapping[str, Any]) -> str:
    """The model, where its config does not name it: HuBERT has dictionaries, data2vec several convolutions."""
    if "dictionaries_symbols" in checkpoint:
        return "hubert"
    return "data2vec_audio" if fields.get("pos_conv_depth", 1) > 1 else "wav2vec2"
