"""Configuration of a pruned speech encoder for transformers."""

from __future__ import annotations

from typing import Any, Dict, Optional

from transformers import PretrainedConfig


class SkillConfig(PretrainedConfig):
    """Shape of a :class:`SkillModel`.

    Args:
        encoder_shape: fields of :class:`EncoderConfig`; None: WavLM Base without relative positions, unpruned.
        kwargs: arguments of ``PretrainedConfig``.
    """

    model_type = "skill_student"

    def __init__(self, encoder_shape: Optional[Dict[str, Any]] = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.encoder_shape = dict(encoder_shape or {})
        # Names that transformers' heads and pipelines read.
        self.hidden_size = self.encoder_shape.get("encoder_embed_dim", 768)
        self.num_hidden_layers = self.encoder_shape.get("encoder_layers", 12)
