"""WavLM, HuBERT and related models as one fairseq model, for pre-training with fairseq's ``hubert_pretraining``."""

import dataclasses
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

import torch
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.models import BaseFairseqModel, register_model
from fairseq.models.hubert.hubert import HubertConfig, HubertModel
from fairseq.modules import GradMultiply
from omegaconf import II
from torch import Tensor, nn

from skill_fairseq.checkpoints.safe_load import plain
from skill_fairseq.modules.config import EncoderConfig, format_conv_layers
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.transformer import Dropouts

NOT_HERE = (
    "layer_type",
    "required_seq_len_multiple",
    "depthwise_conv_kernel_size",
    "attn_type",
    "pos_enc_type",
    "fp16",
    "latent_temp",
)
"""HuBERT's fields for conformers and padding, which this encoder lacks; a config that sets one is refused."""


def hubert_fields(wanted: Container[str]) -> Any:
    """Makes a base class for configs with these fields of fairseq's ``HubertConfig``."""
    chosen = []
    for f in dataclasses.fields(HubertConfig):
        if f.name in wanted:
            chosen.append((f.name, f.type, field(default=f.default, metadata=f.metadata)))
    return dataclasses.make_dataclass("HubertFields", chosen, bases=(FairseqDataclass,))


_Hubert: Any = hubert_fields({f.name for f in dataclasses.fields(HubertConfig)} - set(NOT_HERE))


@dataclass
class WavLMConfig(_Hubert):
    """HuBERT's configuration without :data:`NOT_HERE`, plus WavLM's fields."""

    relative_position: bool = field(
        default=True, metadata={"help": "WavLM's gated relative position bias; false makes it HuBERT"}
    )
    pos_conv_depth: int = field(
        default=1, metadata={"help": "number of consecutive positional convolutions: 5 in data2vec, 1 elsewhere"}
    )
    num_buckets: int = field(default=320, metadata={"help": "buckets of the relative position table"})
    max_distance: int = field(default=800, metadata={"help": "distance, frames, from which positions share a bucket"})
    normalize: bool = field(
        default=II("task.normalize"), metadata={"help": "whether the model expects normalised waveforms"}
    )
    padding_rule: ChoiceEnum(["chunks", "convolution"]) = field(  # type: ignore[valid-type]
        default="chunks",
        metadata={"help": "which frames of a padded utterance count: fairseq's rule (chunks) or transformers'"},
    )


def encoder_config(cfg: Any) -> EncoderConfig:
    """The shape in a fairseq model config (a dataclass, DictConfig or namespace).

    Raises:
        ValueError: a field's value is not usable; names the field.
    """
    names = (f.name for f in dataclasses.fields(EncoderConfig))
    return EncoderConfig.from_fairseq({name: plain(getattr(cfg, name, None)) for name in names})


def fairseq_fields(config: EncoderConfig) -> Dict[str, Any]:
    """The inverse: the fields of a fairseq model config for this shape."""
    fields = config.to_dict()
    fields["conv_feature_layers"] = format_conv_layers(config.conv_feature_layers)
    return fields


def dropouts(cfg: Any) -> Dropouts:
    """Dropout probabilities of a fairseq model config."""
    return Dropouts(
        hidden=cfg.dropout,
        attention=cfg.attention_dropout,
        activation=cfg.activation_dropout,
        input=cfg.dropout_input,
        layerdrop=cfg.encoder_layerdrop,
    )


def avoid_wrong_gelu() -> None:
    """Disables oneDNN for torch < 1.13 on CPUs, whose GELU gives NaN if the gradient is a transposed view."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (1, 13):
        torch.backends.mkldnn.enabled = False  # type: ignore[assignment]


@register_model("wavlm", dataclass=WavLMConfig)
class WavLMModel(HubertModel):
    """:class:`SpeechEncoder` with HuBERT's masked-prediction heads.

    Masking, targets and logits are fairseq's; the encoder is ours.

    Args:
        cfg: model config.
        task_cfg: the task's config; its ``sample_rate`` relates labels to frames.
        dictionaries: label dictionaries; if one is None, there are no prediction heads (fine-tuning).
    """

    def __init__(self, cfg: WavLMConfig, task_cfg: Any, dictionaries: List[Any]) -> None:
        BaseFairseqModel.__init__(self)  # HubertModel's own would build a second encoder
        avoid_wrong_gelu()
        config = encoder_config(cfg).replace(sample_rate=getattr(task_cfg, "sample_rate", 16000))
        self.cfg = cfg
        self.speech_encoder = SpeechEncoder(config, dropouts(cfg))
        self.speech_encoder.transformer.checkpoint_activations = cfg.checkpoint_activations
        self.feat2tar_ratio = cfg.label_rate * config.downsampling / config.sample_rate
        self._init_masking(cfg)

        self.dropout_features = nn.Dropout(cfg.dropout_features)
        self.feature_grad_mult = cfg.feature_grad_mult
        self.logit_temp = cfg.logit_temp
        self.skip_masked = cfg.skip_masked
        self.skip_nomask = cfg.skip_nomask
        self.untie_final_proj = cfg.untie_final_proj
        final_dim = cfg.final_dim if cfg.final_dim > 0 else config.encoder_embed_dim
        self.target_glu = nn.Sequential(nn.Linear(final_dim, final_dim * 2), nn.GLU()) if cfg.target_glu else None
        heads = len(dictionaries) if self.untie_final_proj else 1
        self.final_proj = nn.Linear(config.encoder_embed_dim, final_dim * heads)
        if not any(d is None for d in dictionaries):
            self.num_classes = [len(d) for d in dictionaries]
            self.label_embs_concat = nn.Parameter(torch.empty(sum(self.num_classes), final_dim).uniform_())

    def _init_masking(self, cfg: Any) -> None:
        """Time and channel masking, with the names that HubertModel.apply_mask reads."""
        for name in ("prob", "selection", "other", "length", "min_space"):
            for kind in ("mask_", "mask_channel_"):
                setattr(self, kind + name, getattr(cfg, kind + name))
        self.no_mask_overlap = cfg.no_mask_overlap
        self.no_mask_channel_overlap = cfg.no_mask_channel_overlap
        self.mask_emb = nn.Parameter(torch.empty(self.speech_encoder.config.encoder_embed_dim).uniform_())

    @classmethod
    def build_model(cls, cfg: WavLMConfig, task: Any) -> "WavLMModel":
        """Called by fairseq."""
        return cls(cfg, task.cfg, getattr(task, "dictionaries", [None]))

    # The names that HubertModel.forward uses for the encoder's parts.

    @property
    def layer_norm(self) -> Optional[nn.Module]:
        """LayerNorm over the conv features."""
        return self.speech_encoder.feature_projection.norm

    @property
    def post_extract_proj(self) -> Optional[nn.Module]:
        """Conv features to the model's width."""
        return self.speech_encoder.feature_projection.linear

    @property
    def dropout_input(self) -> nn.Module:
        """Dropout on the projected features."""
        return self.speech_encoder.feature_projection.dropout

    @property
    def encoder(self) -> nn.Module:
        """The transformer."""
        return self.speech_encoder.transformer

    def forward_features(self, source: Tensor) -> Tensor:
        """(B, N) samples to (B, C, T) conv features, with gradients scaled by ``feature_grad_mult``."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.feature_grad_mult > 0):
            features, _ = self.speech_encoder.feature_extractor(source)
        if self.feature_grad_mult not in (0.0, 1.0):
            features = GradMultiply.apply(features, self.feature_grad_mult)
        return features.transpose(1, 2)

    def max_positions(self) -> Optional[int]:
        """No limit."""
        return None
