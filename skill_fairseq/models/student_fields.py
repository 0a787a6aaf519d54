"""The student's part of a training config, and its checks."""

import math
from dataclasses import dataclass, field
from typing import Any, List, Optional

from fairseq.dataclass import ChoiceEnum
from omegaconf import II

from skill_fairseq.models.wavlm import hubert_fields
from skill_fairseq.modules.units import UNITS

FINE_TUNING = (
    *("mask_prob", "mask_length", "mask_selection", "mask_other", "no_mask_overlap"),
    *("mask_min_space", "mask_channel_prob", "mask_channel_length", "mask_channel_selection", "mask_channel_other"),
    *("no_mask_channel_overlap", "mask_channel_min_space"),
)
"""Fields that only fine-tuning reads, from its own config. Distillation does not use them and refuses values."""

_Hubert: Any = hubert_fields(
    {
        *("dropout", "attention_dropout", "activation_dropout", "dropout_input", "encoder_layerdrop"),
        *("checkpoint_activations", "feature_grad_mult"),
        *FINE_TUNING,
    }
)


def _shape(meaning: str) -> Any:
    return field(default=None, metadata={"help": f"{meaning} (null: as in init_from)"})


@dataclass
class SkillStudentConfig(_Hubert):
    """Origin, gates, dropout and shape of the student. Null fields of the shape are filled in from ``init_from``."""

    init_from: Optional[Any] = field(
        default=None,
        metadata={
            "help": "teacher file to copy (the first of a list, such as ${task.teacher}), or stage-1 checkpoint, which "
            "is shrunk first"
        },
    )
    init_parts: Optional[Any] = field(
        default=None,
        metadata={
            "help": "parts of the teacher to copy: conv, projection, pos_conv, layer_norm, layers; the rest is random, "
            "and its shape can be set below; null: all"
        },
    )
    init_layers: Optional[Any] = field(
        default=None,
        metadata={
            "help": "the teacher's layer, from 1, to copy for each layer of the student (null: random), such as "
            "[2,4,6,8,10,12]; null: all in order"
        },
    )
    nested: bool = field(
        default=False,
        metadata={
            "help": "stage 2 of an elastic run: the student is the largest size of init_from, a stage-1 checkpoint "
            "trained with criterion.elastic, and keeps the order in which smaller sizes drop units"
        },
    )
    pruning_units: List[str] = field(
        default_factory=list,
        metadata={
            "help": "units to gate: conv, heads, ffn, attention_layers, ffn_layers, rank (components of linear maps); "
            "empty: none"
        },
    )
    conv_drop_rate: float = field(default=0.01, metadata={"help": "initial drop rate of conv channel gates"})
    head_drop_rate: float = field(default=0.01, metadata={"help": "initial drop rate of attention head gates"})
    ffn_drop_rate: float = field(
        default=0.01, metadata={"help": "initial drop rate of FFN unit gates (DPHuBERT: 0.5, which damages the start)"}
    )
    layer_drop_rate: float = field(default=0.01, metadata={"help": "initial drop rate of whole-sublayer gates"})
    rank_drop_rate: float = field(default=0.01, metadata={"help": "initial drop rate of rank gates"})
    gate_sampling: ChoiceEnum(["shared", "per_rank"]) = field(  # type: ignore[valid-type]
        default="shared",
        metadata={
            "help": "shared: all ranks draw the same gates in an update, independent of the number of GPUs; per_rank: "
            "each rank draws its own, whose noise averages out"
        },
    )
    layer_grad_scale: bool = field(
        default=False,
        metadata={
            "help": "after layer i of L, from 0, multiply the gradient from above by m = (L - i) / (L - i + 1), and "
            "that of the layer's own losses by m (1 - m)"
        },
    )
    seed: int = field(default=II("common.seed"), metadata={"help": "seed of the gate samples and of random weights"})
    extractor_mode: Optional[str] = _shape("default: GroupNorm after the first convolution; layer_norm: after each")
    conv_feature_layers: Optional[str] = _shape("convolutions in fairseq's notation")
    mel_bins: Optional[int] = _shape("log-mel features that they read in place of the waveform; 0: none")
    conv_bias: Optional[bool] = _shape("whether convolutions have a bias")
    feature_layer_norm: Optional[bool] = _shape("LayerNorm after the convolutions")
    feature_linear: Optional[bool] = _shape("linear map after that; false: the last convolution has the model's width")
    encoder_layers: Optional[int] = _shape("Transformer layers")
    encoder_embed_dim: Optional[int] = _shape("width")
    encoder_ffn_embed_dim: Optional[int] = _shape("FFN units per layer before pruning")
    encoder_attention_heads: Optional[int] = _shape("heads per layer before pruning")
    activation_fn: Optional[str] = _shape("activation")
    layer_norm_first: Optional[bool] = _shape("LayerNorm before each sublayer, as in Large models, or after it")
    conv_pos: Optional[int] = _shape("kernel of the positional convolution, frames")
    conv_pos_groups: Optional[int] = _shape("its groups")
    pos_conv_depth: Optional[int] = _shape("number of consecutive positional convolutions")
    relative_position: Optional[bool] = _shape("WavLM's gated relative position bias")
    num_buckets: Optional[int] = _shape("buckets of the relative position table")
    max_distance: Optional[int] = _shape("distance, frames, from which positions share a bucket")
    time_reduction: Optional[int] = _shape("frames merged into one before layer 1")
    reuse_attention: Optional[Any] = _shape("layers, from 2, that reuse the attention map of the layer below")
    adapter_dim: Optional[int] = _shape("width of an adapter beside each FFN (OS-KDFT: 64); 0: none")
    adapter_activation: Optional[str] = _shape("activation of the adapters, relu or elu")
    adapter_form: Optional[str] = _shape("plain, or residual: x + 0.1 of a network of its LayerNorm (XLSR student)")
    quantize: Optional[str] = _shape(
        "int8: linear layers and convolutions are trained with rounded weights and inputs, in stage 2; or none"
    )
    normalize: Optional[bool] = _shape("whether waveforms are normalised")
    padding_rule: Optional[str] = _shape("which frames of a padded utterance count")
    sample_rate: Optional[int] = _shape("sample rate of the waveforms, Hz")
    conv_channels: Optional[Any] = _shape("remaining conv channels per layer; null: all")
    heads: Optional[Any] = _shape("indices of the remaining heads per layer; null: all")
    ffn_dims: Optional[Any] = _shape("remaining FFN units per layer; null: all")
    unit_widths: Optional[Any] = _shape("remaining units of further kinds; {rank: 96}: linear maps of that rank")
    original_parameters: Optional[int] = _shape("parameters before pruning, which sparsity refers to")


def check_student_fields(cfg: Any) -> None:
    """Refuses, before training, fields that have no effect or are out of range.

    Args:
        cfg: a run's model config; missing fields are not checked.

    Raises:
        ValueError: a field has no effect, or a number is out of range; names the field.
    """
    if getattr(cfg, "nested", False) and not getattr(cfg, "init_from", None):
        raise ValueError("model.nested: true does nothing without model.init_from; name the stage-1 checkpoint there")
    for name in ("init_parts", "init_layers"):
        if getattr(cfg, name, None) is not None and not getattr(cfg, "init_from", None):
            raise ValueError(
                f"model.{name}: {getattr(cfg, name)} does nothing without model.init_from; name a teacher's file there"
            )
    factor = getattr(cfg, "feature_grad_mult", None)
    if factor is not None and not 0 <= factor < math.inf:
        raise ValueError(f"model.feature_grad_mult: {factor}; expected a number of at least 0; 0 trains no convolution")
    default = SkillStudentConfig()
    for name in FINE_TUNING:
        value = getattr(cfg, name, None)
        if value is not None and value != getattr(default, name):
            raise ValueError(
                f"model.{name}: {value} does nothing in distillation; leave it out, and set it in the config of "
                "fine-tuning"
            )
    for name in dict.fromkeys(unit.drop_rate for unit in UNITS.values()):
        value = getattr(cfg, name, None)
        if value is not None and not 0 < value < 1:
            raise ValueError(f"model.{name}: {value}; expected a number between 0 and 1, such as 0.01")
    for name in ("dropout", "attention_dropout", "activation_dropout", "dropout_input", "encoder_layerdrop"):
        value = getattr(cfg, name, None)
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"model.{name}: {value}; expected a probability, at least 0 and below 1")
