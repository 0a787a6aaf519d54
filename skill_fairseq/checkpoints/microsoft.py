"""Microsoft's WavLM files: ``{"cfg": flat dictionary, "model": state dict}``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skill_fairseq.checkpoints.fairseq_import import PRETRAINING, encoder_names, with_projection
from skill_fairseq.checkpoints.safe_load import plain
from skill_fairseq.checkpoints.source import ADDED_HERE, EncoderSource, reading_config, refuse, tensors_of
from skill_fairseq.modules.config import EncoderConfig


def read_microsoft(checkpoint: Mapping[str, Any], path: Path) -> EncoderSource:
    """The encoder in a file such as ``WavLM-Base+.pt``.

    Raises:
        ValueError: a feature that this encoder does not have.
    """
    fields = plain(checkpoint["cfg"])
    relative = bool(fields.get("relative_position_embedding", False))
    refuse(path, fields, {"gru_rel_pos": relative})  # their bias comes gated, or not at all
    # 1280 is their default for files that do not say; those published say 800.
    assumed = ("relative positions up to 1280 frames: assumed, as in Microsoft's code; the file does not say",)
    known = not relative or "max_distance" in fields
    fields = {"max_distance": 1280, **fields, "relative_position": relative, "padding_rule": "chunks"}
    with reading_config(path):
        config = EncoderConfig.from_fairseq(fields)
    return EncoderSource(
        "Microsoft's WavLM",
        config,
        with_projection(tensors_of(checkpoint["model"], path), config),
        encoder_names(config),
        PRETRAINING,
        ADDED_HERE,
        assumed=() if known else assumed,
    )
