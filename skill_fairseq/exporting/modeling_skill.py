"""A pruned speech encoder as a transformers model. It needs only torch, numpy and transformers."""

from __future__ import annotations

from typing import Any, Optional, Tuple, Union

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from skill_fairseq.exporting.configuration_skill import SkillConfig
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.padding import padding_of_attention_mask


class SkillModel(PreTrainedModel):
    """The encoder with transformers' interface.

    Args:
        config: holds the shape.
    """

    config_class = SkillConfig
    base_model_prefix = "skill"
    main_input_name = "input_values"
    _keys_to_ignore_on_load_unexpected = [r"encoder\.mask_embedding"]  # for training with masks

    def __init__(self, config: SkillConfig) -> None:
        super().__init__(config)
        self.encoder = SpeechEncoder(EncoderConfig.from_dict(config.encoder_shape))
        # from_pretrained only fills what a state dict holds; other buffers would stay empty.
        for module in self.encoder.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                module.register_buffer(name, buffer, persistent=True)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Does nothing: the encoder initialises itself."""

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Optional[Tensor] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
        **kwargs: Any,
    ) -> Union[BaseModelOutput, Tuple[Any, ...]]:
        """Encodes a batch.

        Args:
            input_values: (B, N) samples at 16 kHz, from the folder's feature extractor.
            attention_mask: (B, N), 1 = audio, 0 = padding, at the end of each row; or None.
            output_hidden_states: also return the hidden states.
            return_dict: False returns a tuple.

        Returns:
            ``last_hidden_state`` (B, T, D), after the final LayerNorm if there is one; ``hidden_states``,
            L + 1 tensors (B, T, D): [0] before the positional convolution, [i] after layer i.

        Raises:
            ValueError: the attention mask has a wrong shape or wrong values, or padding before audio.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        padding = None if attention_mask is None else padding_of_attention_mask(attention_mask, input_values)
        out = self.encoder(input_values, padding)
        found = BaseModelOutput(
            last_hidden_state=out.x, hidden_states=tuple(out.hidden_states) if output_hidden_states else None
        )
        return found if return_dict else found.to_tuple()
