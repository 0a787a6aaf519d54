"""The student: a speech encoder with hard-concrete gates (stage 1) or already shrunk (stage 2)."""

from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from fairseq.models import BaseFairseqModel, register_model
from fairseq.models.hubert.hubert import HubertModel
from torch import Tensor

from skill_fairseq.models.student_fields import SkillStudentConfig
from skill_fairseq.models.wavlm import WavLMModel, avoid_wrong_gelu, dropouts, encoder_config
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.gate_bank import Draw
from skill_fairseq.modules.masking import with_masks
from skill_fairseq.modules.taps import SpanMasking, Tap, deepest
from skill_fairseq.modules.units import UNITS
from skill_fairseq.pruning.expected import expected_widths


class Features(Tuple[Tensor, Optional[Tensor]]):
    """(B, T, D) features and their (B, T) padding mask or None, in the form of fairseq's two CTC models.

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
    """A :class:`SpeechEncoder` to distil, and to fine-tune like HuBERT afterwards.

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
        # Trained by fine-tuning and by objectives that mask; otherwise it has no gradient.
        self.mask_emb.requires_grad_(False)
        self._scale_conv_gradients(cfg.feature_grad_mult)
        self.generator = torch.Generator()
        self._update = 0
        for _, gate in self.speech_encoder.named_gates():
            gate.drop_rate = getattr(cfg, UNITS[gate.unit].drop_rate)
            gate.reset_parameters()
        if self.speech_encoder.gates is not None:
            self.speech_encoder.gates.generator = self.generator
            self.speech_encoder.gates.log_alpha.requires_grad_(not cfg.nested)  # an order is not learned

    @classmethod
    def build_model(cls, cfg: SkillStudentConfig, task: Any) -> "SkillStudentModel":
        """Called by fairseq; the shape is in ``cfg``, so no file is opened."""
        return cls(cfg)

    def set_num_updates(self, num_updates: int) -> None:
        """Called by fairseq before every batch. Gate samples depend only on seed, update and rank."""
        super().set_num_updates(num_updates)
        self._update = num_updates

    def draw_gates(self, log_alpha: Optional[Tensor] = None) -> Optional[Draw]:
        """Draws the gates of one forward, None without gates; call it before launching other work, see ``forward``.

        All batches of an update get the same gates, like one large batch. All sizes of an update get the same noise, so
        that a smaller size's units are a subset of a larger one's.

        Args:
            log_alpha: (n,) for another size than the gates' own, see :meth:`GateBank.draw`.
        """
        rank = 0
        if self.cfg.gate_sampling != "shared" and torch.distributed.is_initialized():
            rank = torch.distributed.get_rank()
        self.generator.manual_seed((self.cfg.seed * 1_000_003 + self._update) * 4096 + rank)
        return self.speech_encoder.draw_gates(log_alpha)

    def train_for(self, taps: Sequence[Tap]) -> None:
        """Freezes weights that get no loss from these taps: ranks would send zeros for them, or wait for gradients that
        never come. Gates stay trainable, because the size constraint moves them. The mask embedding is trained if taps
        mask."""
        transformer = self.speech_encoder.transformer
        states, last = deepest(tap for tap in taps if tap.kind == "states"), deepest(taps)
        unreached: List[torch.nn.Module] = [*transformer.layers[last:]] if last else [transformer]
        if transformer.layer_norm_first:
            unreached.append(transformer.layer_norm)
            unreached += [layer.attention_norm for layer in transformer.layers if layer.attention is None]
            unreached += [layer.ffn_norm for layer in transformer.layers if not layer.uses_ffn_norm]
        if last > states:  # only the maps of the last layer
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
            draw: the result of :meth:`draw_gates`; None: draw the gates here, which makes the host wait for the device.
            taps: the states to return; None: the output of all layers and of the final LayerNorm, if any.
            masked: (B, T) bool for each masking of the taps, True = masked, or None: see ``with_masks``.

        Returns:
            ``taps``, one tensor each, or ``x`` (B, T, D) and ``hidden_states`` (L + 1 tensors (B, T, D));
            ``padding_mask`` (B, T) or None; and ``expected_widths`` with gradient, or None without gates.
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
        """The interface of HuBERT and wav2vec 2.0 for fine-tuning.

        Args:
            source: (B, N) samples.
            padding_mask: (B, N) bool, True = padding, or None.
            mask: mask spans of time and channels, as in the model config.
            ret_conv: return the projected conv features instead of the output.
            output_layer: layer whose output to return, from 1; None: the last.

        Returns:
            (B, T, D) features and (B, T) padding mask or None, to unpack or to look up by name.
        """
        transform = (lambda x, pad: HubertModel.apply_mask(self, x.clone(), pad, None)[0]) if mask else None
        out = self.speech_encoder(source, padding_mask, transform, output_layer, self.draw_gates())
        return Features(out.hidden_states[0] if ret_conv else out.x, out.padding_mask, out.hidden_states[1:])

    def remove_pretraining_modules(self) -> None:
        """Called before fine-tuning: makes the mask embedding trainable."""
        self.mask_emb.requires_grad_(True)

    def _scale_conv_gradients(self, factor: float) -> None:
        """Scales gradients of the conv stack's weights, not of its gates; 0 freezes them."""
        for parameter in self.speech_encoder.feature_extractor.parameters():
            if factor <= 0:
                parameter.requires_grad_(False)
            elif factor != 1:
                parameter.register_hook(lambda gradient: gradient * factor)
