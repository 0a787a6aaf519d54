"""The shape of an encoder: one dataclass describes teacher, gated student and shrunk student."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor

from skill_fairseq.modules.adapter import ACTIVATIONS, FORMS
from skill_fairseq.modules.fake_quantize import QUANTIZE
from skill_fairseq.modules.rank import Rank  # noqa: F401 - registers the kind
from skill_fairseq.modules.units import UNITS

ConvLayers = List[Tuple[int, int, int]]

_NUMBERS = r"\(\s*{0}\s*,\s*{0}\s*,\s*{0}\s*\)"
_CONV_TUPLE = re.compile(_NUMBERS.format(r"(\d+)"))
_CONV_TERM = re.compile(r"\[\s*({0}(?:\s*,\s*{0})*)\s*,?\s*\](?:\s*\*\s*(\d+))?".format(_NUMBERS.format(r"\d+")))
MAX_CONV_LAYERS = 64
LIMITS = {"encoder_layers": 1000, "encoder_attention_heads": 1024, "pos_conv_depth": 100, "mel_bins": 80}
"""Limits of numbers that cost time and memory before any weight is read; the largest published are 48, 20 and 5. With
more than 80 mel filters the lowest would fall between the bins of a 25 ms spectrum."""
LEAST = {"adapter_dim": 0, "mel_bins": 0}
"""Least values of whole numbers, if not 1."""
UNWRITTEN: Dict[str, Any] = {
    "unit_widths": {},
    "time_reduction": 1,
    "reuse_attention": [],
    "adapter_dim": 0,
    "adapter_activation": "relu",
    "adapter_form": "plain",
    "mel_bins": 0,
    "quantize": "none",
}
"""Fields that earlier versions do not know, with the default at which they are not written."""


def parse_conv_layers(value: Any) -> ConvLayers:
    """Reads fairseq's convolution string, for example ``"[(512,10,5)] + [(512,3,2)] * 4"``, without evaluating it.

    Args:
        value: the string, or a sequence of (channels, kernel, stride) triples.

    Returns:
        one (channels, kernel size, stride) per layer.

    Raises:
        ValueError: the string is not a sum of lists of triples, there are too many, or a number is not positive.
    """
    if isinstance(value, str):
        if len(value) > 10_000:
            raise ValueError(f"conv_feature_layers: a text of {len(value):,} letters; expected a few hundred at most")
        rest = value.strip()
        layers: List[Any] = []
        while rest:
            match = _CONV_TERM.match(rest)
            if match is None:
                raise ValueError(
                    f"conv_feature_layers: cannot read {value!r}; expected a sum of lists of "
                    "(channels, kernel, stride), for example '[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2'"
                )
            triples = [tuple(map(int, t)) for t in _CONV_TUPLE.findall(match.group(1))]
            times = int(match.group(2) or 1)
            if len(layers) + len(triples) * times > MAX_CONV_LAYERS:
                raise ValueError(f"conv_feature_layers: {value!r} has more than {MAX_CONV_LAYERS} layers")
            layers += triples * times
            rest = rest[match.end() :].strip()
            if rest.startswith("+") and rest[1:].strip():
                rest = rest[1:].strip()
            elif rest:
                raise ValueError(f"conv_feature_layers: unexpected {rest!r} in {value!r}; join lists by '+'")
    else:
        if len(value) > MAX_CONV_LAYERS:
            raise ValueError(f"conv_feature_layers: {len(value)} layers; expected at most {MAX_CONV_LAYERS}")
        layers = [tuple(int(n) for n in triple) for triple in value]
    if not layers or any(len(triple) != 3 or min(triple) < 1 for triple in layers):
        raise ValueError(
            f"conv_feature_layers: {value!r} needs at least one (channels, kernel, stride) of positive numbers"
        )
    return layers  # type: ignore[return-value]


def format_conv_layers(layers: Sequence[Sequence[int]]) -> str:
    """The inverse of :func:`parse_conv_layers`: fairseq's string form."""
    return " + ".join(f"[({c},{k},{s})]" for c, k, s in layers)


@dataclasses.dataclass
class EncoderConfig:
    """Shape of a speech encoder; field names are fairseq's where fairseq has the field.

    The full widths (``conv_feature_layers``, ``encoder_attention_heads``, ``encoder_ffn_embed_dim``) always stay those
    of the original model, because normalisation statistics and relative positions refer to them. ``conv_channels``,
    ``heads`` and ``ffn_dims`` hold what remains after pruning; ``None`` means everything.

    ``pos_conv_depth`` 1 is wav2vec 2.0's single positional convolution, with weight norm and a kernel of ``conv_pos``
    frames; above 1 it is data2vec's stack of this many, each with a kernel of ``conv_pos // pos_conv_depth`` frames.

    A LayerNorm (except with ``feature_layer_norm`` false: DistilHuBERT) and a linear map (except with
    ``feature_linear`` false: the last convolution has the model's width, and is not pruned) follow the convolutions.

    With ``mel_bins`` above 0 the convolutions read that many log-mel features, of 25 ms windows every 10 ms, in place
    of the waveform (:class:`skill_fairseq.modules.log_mel.LogMel`). Zeros are added around the audio, so that there are
    as many frames as the published conv stack makes.

    With ``time_reduction`` above 1 a convolution before layer 1 merges this many frames into one (FitHuBERT). Layers in
    ``reuse_attention``, counted from 1, have no query and key, and use the attention map of the nearest lower layer
    that computes one (ARMHuBERT).

    With ``quantize`` "int8" linear layers and all convolutions but the first compute with rounded weights, those behind
    the extractor with rounded inputs too, see :mod:`skill_fairseq.modules.fake_quantize`.
    """

    extractor_mode: str = "default"
    conv_feature_layers: Any = "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"
    conv_bias: bool = False
    feature_layer_norm: bool = True
    feature_linear: bool = True
    encoder_layers: int = 12
    encoder_embed_dim: int = 768
    encoder_ffn_embed_dim: int = 3072
    encoder_attention_heads: int = 12
    activation_fn: str = "gelu"
    layer_norm_first: bool = False
    conv_pos: int = 128
    conv_pos_groups: int = 16
    pos_conv_depth: int = 1
    relative_position: bool = False
    num_buckets: int = 320
    max_distance: int = 800
    time_reduction: int = 1
    reuse_attention: List[int] = dataclasses.field(default_factory=list)
    adapter_dim: int = 0
    adapter_activation: str = "relu"
    adapter_form: str = "plain"
    mel_bins: int = 0
    quantize: str = "none"
    normalize: bool = False
    padding_rule: str = "chunks"
    sample_rate: int = 16000

    # What remains after pruning: conv channels, list of head indices, and FFN units per layer. An empty list or 0
    # leaves only the sublayer's output bias, None removes the sublayer.
    conv_channels: Optional[List[int]] = None
    heads: Optional[List[Optional[List[int]]]] = None
    ffn_dims: Optional[List[Optional[int]]] = None

    # The same for further kinds of pruned units, by name: a list, or one number for all places. ``rank`` has six per
    # layer, the ranks of its linear maps.
    unit_widths: Dict[str, List[int]] = dataclasses.field(default_factory=dict)

    # Hard-concrete gates on these units (stage 1 only).
    pruning_units: List[str] = dataclasses.field(default_factory=list)

    # Parameters of the encoder before any pruning; None: those of this full shape.
    original_parameters: Optional[int] = None

    def __post_init__(self) -> None:
        self.conv_feature_layers = parse_conv_layers(self.conv_feature_layers)
        self.pruning_units = list(self.pruning_units)
        self.reuse_attention = list(self.reuse_attention)
        self._check_types()
        n = self.encoder_layers
        if self.conv_channels is None:
            self.conv_channels = [c for c, _, _ in self.conv_feature_layers]
        if self.heads is None:
            self.heads = [list(range(self.encoder_attention_heads)) for _ in range(n)]
        if self.ffn_dims is None:
            self.ffn_dims = [self.encoder_ffn_embed_dim] * n
        self.conv_channels = [int(c) for c in self.conv_channels]
        self.heads = [None if h is None else sorted(int(i) for i in h) for h in self.heads]
        self.ffn_dims = [None if f is None else int(f) for f in self.ffn_dims]
        self.unit_widths = {name: self._column(name, column) for name, column in self.unit_widths.items()}
        self._validate()

    def _column(self, name: str, column: Any) -> List[int]:
        if isinstance(column, int):
            return [column] * (len(UNITS[name].full(self)) if name in UNITS else 1)
        return [int(width) for width in column]

    def _check_types(self) -> None:
        expected = {"int": "a positive whole number", "bool": "true or false", "str": "a word"}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.type in expected and (
                type(value).__name__ != f.type or (f.type == "int" and value < LEAST.get(f.name, 1))
            ):
                raise ValueError(f"model.{f.name}: {value!r} is not usable; expected {expected[f.type]}")
        for name, most in LIMITS.items():
            if getattr(self, name) > most:
                raise ValueError(f"model.{name}: {getattr(self, name)} is not usable; expected at most {most}")

    def _validate(self) -> None:
        def require(ok: bool, field: str, expected: str) -> None:
            if not ok:
                raise ValueError(f"model.{field}: {getattr(self, field)!r} is not usable; expected {expected}")

        n, full_heads = self.encoder_layers, self.encoder_attention_heads
        require(self.extractor_mode in ("default", "layer_norm"), "extractor_mode", "'default' or 'layer_norm'")
        require(self.padding_rule in ("chunks", "convolution"), "padding_rule", "'chunks' or 'convolution'")
        require(self.activation_fn in ("gelu", "relu"), "activation_fn", "'gelu' or 'relu'")
        require(self.adapter_activation in ACTIVATIONS, "adapter_activation", "'relu' or 'elu'")
        require(self.adapter_dim > 0 or self.adapter_activation == "relu", "adapter_activation", "adapter_dim above 0")
        require(self.adapter_form in FORMS, "adapter_form", "'plain' or 'residual'")
        require(self.adapter_dim > 0 or self.adapter_form == "plain", "adapter_form", "adapter_dim above 0")
        residual = self.adapter_form == "residual"
        require(not residual or self.adapter_activation == "relu", "adapter_activation", "'relu' in a residual adapter")
        require(
            self.mel_bins == 0 or self.conv_downsampling == 2,
            "conv_feature_layers",
            "strides whose product is 2, because log-mel features (model.mel_bins) come every 10 ms and frames every "
            "20 ms, for example '[(512,3,1), (512,3,2)]'",
        )
        require(self.quantize in QUANTIZE, "quantize", "'none' or 'int8'")
        require(
            self.quantize == "none" or not self.pruning_units,
            "quantize",
            "'none' beside gates (model.pruning_units): a student is quantised when it has been shrunk, in stage 2",
        )
        require(n > 0, "encoder_layers", "a positive number")
        require(
            self.encoder_embed_dim % full_heads == 0,
            "encoder_attention_heads",
            f"a divisor of encoder_embed_dim={self.encoder_embed_dim}",
        )
        require(
            self.encoder_embed_dim % self.conv_pos_groups == 0,
            "conv_pos_groups",
            f"a divisor of encoder_embed_dim={self.encoder_embed_dim}",
        )
        full = [c for c, _, _ in self.conv_feature_layers]
        assert self.conv_channels is not None and self.heads is not None and self.ffn_dims is not None
        require(
            len(self.conv_channels) == len(full) and all(1 <= c <= f for c, f in zip(self.conv_channels, full)),
            "conv_channels",
            f"{len(full)} numbers from 1 to {full}",
        )
        require(
            self.feature_linear or self.conv_channels[-1] == self.encoder_embed_dim,
            "feature_linear",
            f"true, or {self.encoder_embed_dim} channels (encoder_embed_dim) in the last of conv_feature_layers",
        )
        require(
            len(self.heads) == n
            and all(h is None or (len(set(h)) == len(h) and set(h) <= set(range(full_heads))) for h in self.heads),
            "heads",
            f"{n} lists of head indices from 0 to {full_heads - 1} (null: sublayer removed)",
        )
        require(
            len(self.ffn_dims) == n and all(f is None or 0 <= f <= self.encoder_ffn_embed_dim for f in self.ffn_dims),
            "ffn_dims",
            f"{n} numbers from 0 to encoder_ffn_embed_dim={self.encoder_ffn_embed_dim} (null: sublayer removed)",
        )
        require(set(self.pruning_units) <= set(UNITS), "pruning_units", f"a list out of {list(UNITS)}")
        reusing = self.reuse_attention
        require(
            all(type(layer) is int and 2 <= layer <= n for layer in reusing) and reusing == sorted(set(reusing)),
            "reuse_attention",
            f"layers from 2 to {n}, ascending, such as [2, 4]",
        )
        for layer, source in self.attention_sources().items():
            require(
                bool(self.heads[layer - 1]) and self.heads[layer - 1] == self.heads[source - 1],
                "heads",
                f"the same heads, and at least one, in the layers {source} and {layer}, which share a map "
                f"(model.reuse_attention)",
            )
        for field in ("pruning_units", "unit_widths"):
            require(
                not reusing or not {"heads", "attention_layers", "rank"} & set(getattr(self, field)),
                field,
                "none of heads, attention_layers and rank: layers that share an attention map (model.reuse_attention) "
                "keep the same heads and whole linear maps",
            )
        for name, column in self.unit_widths.items():
            known = name in UNITS and UNITS[name].field is None
            require(known, "unit_widths", f"units that are registered; import the file that registers {name!r}")
            full_widths = UNITS[name].full(self)
            require(
                len(column) == len(full_widths) and all(0 <= w <= f for w, f in zip(column, full_widths)),
                "unit_widths",
                f"{len(full_widths)} numbers from 0 to {full_widths} for {name}",
            )

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        return self.encoder_embed_dim // self.encoder_attention_heads

    @property
    def pos_conv_kernel(self) -> int:
        """Kernel of each positional convolution, frames; in a stack at least 3, as in fairseq."""
        return self.conv_pos if self.pos_conv_depth == 1 else max(3, self.conv_pos // self.pos_conv_depth)

    @property
    def conv_downsampling(self) -> int:
        """Inputs of the convolutions per frame: samples, or log-mel windows."""
        return math.prod(stride for _, _, stride in self.conv_feature_layers)

    @property
    def conv_receptive_field(self) -> int:
        """Inputs of the convolutions that one of their frames covers."""
        field = 1
        for _, kernel, stride in reversed(self.conv_feature_layers):
            field = (field - 1) * stride + kernel
        return field

    @property
    def mel_window(self) -> int:
        """Samples per log-mel window (25 ms)."""
        return round(0.025 * self.sample_rate)

    @property
    def mel_hop(self) -> int:
        """Samples from one log-mel window to the next (10 ms)."""
        return round(0.010 * self.sample_rate)

    @property
    def mel_padding(self) -> Tuple[int, int]:
        """Zeros added before and after the audio, so that each 25 ms window every 20 ms gives a frame."""
        around = self.conv_receptive_field - 1
        return around // 2 * self.mel_hop, (around - around // 2) * self.mel_hop

    @property
    def feature_downsampling(self) -> int:
        """Audio samples per frame of the convolutions (320 for every published model)."""
        return self.conv_downsampling * (self.mel_hop if self.mel_bins else 1)

    @property
    def downsampling(self) -> int:
        """Audio samples per frame of the output: :attr:`feature_downsampling` times ``time_reduction``."""
        return self.feature_downsampling * self.time_reduction

    @property
    def feature_receptive_field(self) -> int:
        """Audio samples needed for the first frame of the convolutions (400 for every published model).

        It covers just these. With ``mel_bins`` it also covers the zeros before them and some audio after them, see
        ``mel_padding``.
        """
        return self.mel_window if self.mel_bins else self.conv_receptive_field

    @property
    def receptive_field(self) -> int:
        """Audio samples of the output's first frame: the shortest usable input."""
        return self.feature_receptive_field + (self.time_reduction - 1) * self.feature_downsampling

    def num_frames(self, num_samples: Any) -> Any:
        """Frames of the conv stack for ``num_samples`` samples (an int or an integer tensor)."""
        if self.mel_bins:
            return _floor_div(num_samples - self.mel_window, self.feature_downsampling) + 1
        for _, kernel, stride in self.conv_feature_layers:
            num_samples = _floor_div(num_samples - kernel, stride) + 1
        return num_samples

    def num_output_frames(self, num_samples: Any) -> Any:
        """Frames of the output, ``time_reduction`` times fewer; the remainder is dropped."""
        return _floor_div(self.num_frames(num_samples), self.time_reduction)

    def attention_sources(self) -> Dict[int, int]:
        """For each layer of ``reuse_attention`` the layer whose map it uses, both from 1."""
        sources: Dict[int, int] = {}
        for layer in self.reuse_attention:
            sources[layer] = sources.get(layer - 1, layer - 1)
        return sources

    def full(self) -> EncoderConfig:
        """The shape before any pruning."""
        return self.replace(conv_channels=None, heads=None, ffn_dims=None, unit_widths={})

    def is_full(self) -> bool:
        """Whether nothing has been pruned from the original shape."""
        return self == self.full()

    def replace(self, **changes: Any) -> EncoderConfig:
        """A copy with some fields changed; unpruned widths follow a changed full width."""
        for kept, full in (
            ("conv_channels", [c for c, _, _ in self.conv_feature_layers]),
            ("heads", [list(range(self.encoder_attention_heads))] * self.encoder_layers),
            ("ffn_dims", [self.encoder_ffn_embed_dim] * self.encoder_layers),
        ):
            if getattr(self, kept) == full:
                changes.setdefault(kept, None)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> Dict[str, Any]:
        """Plain types, for JSON and checkpoints."""
        fields = dataclasses.asdict(self)
        fields["conv_feature_layers"] = format_conv_layers(self.conv_feature_layers)
        for name, usual in UNWRITTEN.items():
            if fields[name] == usual:
                del fields[name]
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> EncoderConfig:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: a field is unknown or its value unusable.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(f"encoder config: unknown fields {unknown}; this version knows {sorted(known)}")
        return cls(**fields)

    @classmethod
    def from_fairseq(cls, fields: Mapping[str, Any]) -> EncoderConfig:
        """The shape in a fairseq model config of plain values; other fields are ignored, None means unset.

        Raises:
            ValueError: a field's value is not usable; names the field.
        """
        known = (f.name for f in dataclasses.fields(cls))
        return cls(**{name: fields[name] for name in known if fields.get(name) is not None})


def _floor_div(number: Any, divisor: int) -> Any:
    """Floor division of an int or an integer tensor; torch 1.12's ``//`` rounds towards zero."""
    return torch.div(number, divisor, rounding_mode="floor") if isinstance(number, Tensor) else number // divisor


def wavlm_base(**changes: Any) -> EncoderConfig:
    """WavLM Base and Base+ (94,381,168 parameters)."""
    return EncoderConfig(relative_position=True).replace(**changes)


def hubert_base(**changes: Any) -> EncoderConfig:
    """HuBERT Base (94,370,944 parameters); wav2vec 2.0 Base has the same shape."""
    return EncoderConfig().replace(**changes)


def data2vec_base(**changes: Any) -> EncoderConfig:
    """data2vec-audio Base (93,163,520 parameters)."""
    return EncoderConfig(
        extractor_mode="layer_norm", conv_pos=95, pos_conv_depth=5, normalize=True, padding_rule="convolution"
    ).replace(**changes)


def hubert_large(**changes: Any) -> EncoderConfig:
    """HuBERT Large (315,434,112 parameters)."""
    return EncoderConfig(
        extractor_mode="layer_norm",
        encoder_layers=24,
        encoder_embed_dim=1024,
        encoder_ffn_embed_dim=4096,
        encoder_attention_heads=16,
        layer_norm_first=True,
        normalize=True,
    ).replace(**changes)


def wavlm_large(**changes: Any) -> EncoderConfig:
    """WavLM Large (315,452,096 parameters)."""
    return hubert_large(relative_position=True).replace(**changes)
