"""The student: a speech encoder with hard-concrete gates (stage 1) or already shrunk (stage 2)."""

import math
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from fairseq.dataclass import ChoiceEnum
from fairseq.models import BaseFairseqModel, register_model
from fairseq.models.hubert.hubert import HubertModel
from omegaconf import II
from torch import Tensor

from skill_fairseq.models.wavlm import WavLMModel, avoid_wrong_gelu, dropouts, encoder_config, hubert_fields
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.gate_bank import Draw
from skill_fairseq.modules.masking import with_masks
from skill_fairseq.modules.taps import SpanMasking, Tap, deepest
from skill_fairseq.modules.units import UNITS
from skill_fairseq.pruning.expected import expected_widths

FINE_TUNING = (
    *("mask_prob", "mask_length", "mask_selection", "mask_other", "no_mask_overlap"),
    *("mask_min_space", "mask_channel_prob", "mask_channel_length", "mask_channel_selection", "mask_channel_other"),
    *("no_mask_channel_overlap", "mask_channel_min_space"),
)
"""Fields that fine-tuning reads, from its own config. In distillation they do nothing, and a value is refused."""

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
    """Origin, gates, dropout and shape of the student. What is null of the shape is filled in from ``init_from``."""

    init_from: Optional[Any] = field(
        default=None,
        metadata={
            "help": "teacher file (the student starts as its copy; of a list, as task.teacher may be, the first), or "
            "the stage-1 checkpoint, which is shrunk first"
        },
    )
    init_parts: Optional[Any] = field(
        default=None,
        metadata={
            "help": "what of a teacher is copied, out of: conv, projection, pos_conv, layer_norm, layers; the rest is "
            "random, and its shape may be set below; null: all"
        },
    )
    init_layers: Optional[Any] = field(
        default=None,
        metadata={
            "help": "for each layer of the student the teacher's, from 1 on, that it starts as (null: random), e.g. "
            "[2,4,6,8,10,12]; null: all in their order"
        },
    )
    pruning_units: List[str] = field(
        default_factory=list,
        metadata={
            "help": "what gets gates, out of: conv, heads, ffn, attention_layers, ffn_layers, rank (components of the "
            "linear maps); empty: none"
        },
    )
    conv_drop_rate: float = field(default=0.01, metadata={"help": "initial drop rate of conv channel gates"})
    head_drop_rate: float = field(default=0.01, metadata={"help": "initial drop rate of attention head gates"})
    ffn_drop_rate: float = field(
        default=0.01, metadata={"help": "initial drop rate of FFN unit gates (DPHuBERT: 0.5, a damaged start)"}
    )
    layer_drop_rate: float = field(default=0.01, metadata={"help": "initial drop rate of whole-sublayer gates"})
    rank_drop_rate: float = field(default=0.01, metadata={"help": "initial drop rate of the gates of ranks"})
    gate_sampling: ChoiceEnum(["shared", "per_rank"]) = field(  # type: ignore[valid-type]
        default="shared",
        metadata={
            "help": "shared: every rank draws the same gates in an update, and they do not depend on the number of "
            "GPUs; per_rank: each its own, whose noise averages out over ranks"
        },
    )
    layer_grad_scale: bool = field(
        default=False,
        metadata={
            "help": "after layer i of L, from 0, multiply the gradient from above by m = (L - i) / (L - i + 1), that "
            "of the layer's own losses by m (1 - m)"
        },
    )
    seed: int = field(default=II("common.seed"), metadata={"help": "seed of the gate samples and of random weights"})
    extractor_mode: Optional[str] = _shape("default: GroupNorm after the first convolution; layer_norm: after each")
    conv_feature_layers: Optional[str] = _shape("convolutions, as fairseq writes them")
    conv_bias: Optional[bool] = _shape("whether convolutions have a bias")
    feature_layer_norm: Optional[bool] = _shape("LayerNorm after the convolutions")
    feature_linear: Optional[bool] = _shape("linear map after it; false: the last convolution has the model's width")
    encoder_layers: Optional[int] = _shape("Transformer layers")
    encoder_embed_dim: Optional[int] = _shape("width")
    encoder_ffn_embed_dim: Optional[int] = _shape("FFN units of a layer before pruning")
    encoder_attention_heads: Optional[int] = _shape("heads of a layer before pruning")
    activation_fn: Optional[str] = _shape("activation")
    layer_norm_first: Optional[bool] = _shape("LayerNorm before each sublayer, as in Large models, or after it")
    conv_pos: Optional[int] = _shape("frames of the positional convolution")
    conv_pos_groups: Optional[int] = _shape("its groups")
    pos_conv_depth: Optional[int] = _shape("positional convolutions one after another")
    relative_position: Optional[bool] = _shape("WavLM's gated relative position bias")
    num_buckets: Optional[int] = _shape("buckets of the relative position table")
    max_distance: Optional[int] = _shape("distance (frames) from which positions share a bucket")
    time_reduction: Optional[int] = _shape("frames that become one in front of layer 1")
    reuse_attention: Optional[Any] = _shape("layers, from 2 on, that take the attention map of the layer below")
    adapter_dim: Optional[int] = _shape("features of an adapter beside each FFN (OS-KDFT: 64); 0: none")
    adapter_activation: Optional[str] = _shape("their activation, relu or elu")
    adapter_form: Optional[str] = _shape("plain, or residual: x + 0.1 of a network of its LayerNorm (XLSR student)")
    normalize: Optional[bool] = _shape("whether waveforms are normalised")
    padding_rule: Optional[str] = _shape("which frames of a padded utterance count")
    sample_rate: Optional[int] = _shape("Hz of the waveforms")
    conv_channels: Optional[Any] = _shape("conv channels left in each layer; null: all")
    heads: Optional[Any] = _shape("indices of the heads left in each layer; null: all")
    ffn_dims: Optional[Any] = _shape("FFN units left in each layer; null: all")
    unit_widths: Optional[Any] = _shape("what is left of further kinds of units; {rank: 96}: maps of that rank")
    original_parameters: Optional[int] = _shape("parameters before any pruning, which sparsity refers to")


def check_student_fields(cfg: Any) -> None:
    """Refuses, before training, what would do nothing or is out of range.

    Args:
        cfg: model config of a run; fields that are left out are not looked at.

    Raises:
        ValueError: a field does nothing, or a number is out of range; names the field.
    """
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


class Features(Tuple[Tensor, Optional[Tensor]]):
    """(B, T, D) features and their (B, T) padding mask or None, as either of fairseq's CTC models asks for them.

    ``hubert_ctc`` unpacks the pair, ``wav2vec_ctc`` looks up "x", "padding_mask" and "layer_results".
    """

    layer_results: List[Tensor]  # (B, T, D) of every layer that ran

    def __new__(cls, x: Tensor, padding_mask: Optional[Tensor], layer_results: List[Tensor]) -> "Features":
        pair = super().__new__(cls, (x, padding_mask))
        pair.layer_results = layer_results
        return pair

    def __getitem__(self, key: Any) -> Any:
        if key == "layer_results":
            return self.layer_results
        return super().__getitem__({"x": 0, "padding_mask": 1}[key] if isinstance(key, str) else key)


@register_model("skill_student", dataclass=SkillStudentConfig)
class SkillStudentModel(WavLMModel):
    """A :class:`SpeechEncoder` to be distilled, and afterwards fine-tuned like HuBERT.

    Args:
        cfg: model config with the shape filled in.
    """

    def __init__(self, cfg: SkillStudentConfig) -> None:
        BaseFairseqModel.__init__(self)
        avoid_wrong_gelu()
        self.cfg = cfg
        self.speech_encoder = SpeechEncoder(encoder_config(cfg), dropouts(cfg))
        self.speech_encoder.transformer.checkpoint_activations = cfg.checkpoint_activations
        self.speech_encoder.transformer.layer_grad_scale = cfg.layer_grad_scale
        self._init_masking(cfg)
        # Used by fine-tuning, and by objectives that mask: elsewhere it would be a parameter without gradient.
        self.mask_emb.requires_grad_(False)
        self._scale_conv_gradients(cfg.feature_grad_mult)
        self.generator = torch.Generator()
        self._update = 0
        for _, gate in self.speech_encoder.named_gates():
            gate.drop_rate = getattr(cfg, UNITS[gate.unit].drop_rate)
            gate.reset_parameters()
        if self.speech_encoder.gates is not None:
            self.speech_encoder.gates.generator = self.generator

    @classmethod
    def build_model(cls, cfg: SkillStudentConfig, task: Any) -> "SkillStudentModel":
        """Called by fairseq; the shape stands in ``cfg``, no file is opened."""
        return cls(cfg)

    def set_num_updates(self, num_updates: int) -> None:
        """Called by fairseq before every batch: the gate samples depend on seed, update and rank alone."""
        super().set_num_updates(num_updates)
        self._update = num_updates

    def draw_gates(self) -> Optional[Draw]:
        """The gates of one forward, None without gates; call it before other work is launched, see ``forward``.

        The batches that one update accumulates get the gates of one large batch.
        """
        rank = 0
        if self.cfg.gate_sampling != "shared" and torch.distributed.is_initialized():
            rank = torch.distributed.get_rank()
        self.generator.manual_seed((self.cfg.seed * 1_000_003 + self._update) * 4096 + rank)
        return self.speech_encoder.draw_gates()

    def train_for(self, taps: Sequence[Tap]) -> None:
        """Takes weights out of the training that a loss on these taps cannot reach: ranks would send zeros for them, or
        wait for gradients that never come. Gates stay: the size constraint moves them. The mask embedding is learned
        where taps mask."""
        transformer = self.speech_encoder.transformer
        states, last = deepest(tap for tap in taps if tap.kind == "states"), deepest(taps)
        unreached: List[torch.nn.Module] = [*transformer.layers[last:]] if last else [transformer]
        if transformer.layer_norm_first:
            unreached.append(transformer.layer_norm)
            unreached += [layer.attention_norm for layer in transformer.layers if layer.attention is None]
            unreached += [layer.ffn_norm for layer in transformer.layers if not layer.uses_ffn_norm]
        if last > states:  # of the last layer, the maps alone
            layer = transformer.layers[last - 1]
            assert layer.attention is not None
            unreached += [layer.attention.v_proj, layer.attention.out_proj, layer.ffn_norm]
            unreached += [] if layer.ffn is None else [layer.ffn]
            unreached += [] if transformer.layer_norm_first else [layer.attention_norm]
        adapted = [tap for tap in taps if tap.adapters]
        reach = max(deepest(tap for tap in adapted if tap.kind == "states"), deepest(adapted) - 1)
        unreached += [layer.adapter for layer in transformer.layers[max(reach, 0) :] if layer.adapter is not None]
        for module in unreached:
            module.requires_grad_(False)
        self.mask_emb.requires_grad_(any(tap.masking is not None for tap in taps))

    def forward(
        self,
        source: Tensor,
        padding_mask: Optional[Tensor] = None,
        draw: Optional[Draw] = None,
        taps: Optional[Sequence[Tap]] = None,
        masked: Optional[Mapping[SpanMasking, Tensor]] = None,
        **kwargs: Any,
    ) -> Dict[str, Any]:
        """One forward for distillation.

        Args:
            source: (B, N) samples.
            padding_mask: (B, N) bool, True = padding, or None.
            draw: what :meth:`draw_gates` gave; None: the gates are drawn here, and the host waits for all that the
                device has still to do.
            taps: what is asked for; None: the output of all layers and of the final LayerNorm where there is one.
            masked: (B, T) bool for each masking of the taps, True = hidden, or None for none: see ``with_masks``.

        Returns:
            ``taps``, a tensor for each, or ``x`` (B, T, D) and ``hidden_states`` (L + 1 tensors (B, T, D));
            ``padding_mask`` (B, T) or None; and ``expected_widths``, with gradient, None without gates.
        """
        encoder = self.speech_encoder
        draw = draw or self.draw_gates()
        if taps is None:
            out = encoder(source, padding_mask, draw=draw)._asdict()
        else:
            taps = with_masks(taps, masked or {}, self.mask_emb)
            out = dict(zip(("taps", "padding_mask"), encoder.tap(source, padding_mask, taps, draw)))
        return {**out, "expected_widths": None if encoder.gates is None else expected_widths(encoder)}

    def extract_features(
        self,
        source: Tensor,
        padding_mask: Optional[Tensor] = None,
        mask: bool = False,
        ret_conv: bool = False,
        output_layer: Optional[int] = None,
    ) -> Features:
        """HuBERT's and wav2vec 2.0's interface for fine-tuning.

        Args:
            source: (B, N) samples.
            padding_mask: (B, N) bool, True = padding, or None.
            mask: mask spans of time and channels, as the model config says.
            ret_conv: return the projected conv features instead of the output.
            output_layer: 1-based layer whose output is wanted; None: the last.

        Returns:
            (B, T, D) features and (B, T) padding mask or None, to be unpacked or looked up by name.
        """
        transform = (lambda x, pad: HubertModel.apply_mask(self, x.clone(), pad, None)[0]) if mask else None
        out = self.speech_encoder(source, padding_mask, transform, output_layer, self.draw_gates())
        return Features(out.hidden_states[0] if ret_conv else out.x, out.padding_mask, out.hidden_states[1:])

    def remove_pretraining_modules(self) -> None:
        """Called before fine-tuning: the mask embedding is learned."""
        self.mask_emb.requires_grad_(True)

    def _scale_conv_gradients(self, factor: float) -> None:
        """Gradients of the conv stack's weights (not of its gates) times this factor; with 0 they stay as they are."""
        for parameter in self.speech_encoder.feature_extractor.parameters():
            if factor <= 0:
                parameter.requires_grad_(False)
            elif factor != 1:
                parameter.register_hook(lambda gradient: gradient * factor)
