"""What an encoder of given widths costs: parameters, exact or expected, and multiply-accumulates.

Counted is the encoder that is distilled: convolutional stack, feature projection, positional convolution,
Transformer layers and relative position; no mask embedding and no heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar, Union

from torch import Tensor

from skill_fairseq.modules.config import EncoderConfig

Number = Union[int, float, Tensor]
"""A width: an integer, or its expectation as a scalar tensor."""

Column = Union[Sequence[Number], Tensor]
"""Widths of one kind: numbers, or a 1-D tensor."""

_N = TypeVar("_N", float, Tensor)

RELATIVE_GATE_OUTPUTS = 8
"""Features from which WavLM's relative-position gate computes its two factors."""


@dataclass(frozen=True)
class StaticShape:
    """What pruning never changes. Names follow fairseq's HuBERT and Microsoft's WavLM where they have one.

    Attributes:
        conv_kernels: kernel size of each convolution, in its input's frames.
        conv_strides: stride of each convolution.
        conv_bias: whether the convolutions have biases.
        extractor_mode: "default" (one GroupNorm after the first convolution) or "layer_norm" (one LayerNorm
            after every convolution).
        embed_dim: dimension D of the Transformer.
        head_dim: dimension of one attention head.
        conv_pos: kernel size of the positional convolution, or of each of data2vec's.
        conv_pos_groups: its groups.
        relative_position: whether attention has WavLM's gated relative-position bias.
        num_buckets: rows of its table.
        full_heads: heads before any pruning; the table and the gates' constants keep that many.
        pos_conv_depth: number of positional convolutions; above 1 they have no weight norm.
    """

    conv_kernels: tuple[int, ...]
    conv_strides: tuple[int, ...]
    conv_bias: bool
    extractor_mode: str
    embed_dim: int
    head_dim: int
    conv_pos: int
    conv_pos_groups: int
    relative_position: bool
    num_buckets: int
    full_heads: int
    pos_conv_depth: int = 1


@dataclass(frozen=True)
class Widths:
    """What pruning changes; integers for an encoder that exists, tensors for expectations under gates.

    A sublayer that lost all units but is present keeps its output bias, and nothing else. One that is not
    present adds nothing.

    Attributes:
        conv: output channels of each convolution.
        heads: attention heads of each layer.
        ffn: feed-forward units of each layer.
        attention_present: 1 or 0 for each layer, or the probability of presence; None: all present.
        ffn_present: the same for the feed-forward sublayers.
        relative_gates: layers that have a gate of relative position; None: those whose attention has heads.
    """

    conv: Column
    heads: Column
    ffn: Column
    attention_present: Column | None = None
    ffn_present: Column | None = None
    relative_gates: int | None = None

    @classmethod
    def from_flat(cls, flat: Column, num_convs: int, num_layers: int, relative_gates: int | None = None) -> Widths:
        """The inverse of :meth:`flat`; a tensor's columns are views of it."""
        starts = range(num_convs, num_convs + 4 * num_layers, num_layers)
        heads, ffn, attention_present, ffn_present = (flat[start : start + num_layers] for start in starts)
        return cls(flat[:num_convs], heads, ffn, attention_present, ffn_present, relative_gates)

    def flat(self) -> list[Number]:
        """All widths one after another: conv, heads, ffn, attention_present, ffn_present."""
        present = *_or_ones(self.attention_present, self.heads), *_or_ones(self.ffn_present, self.ffn)
        return [*self.conv, *self.heads, *self.ffn, *present]

    def attention(self) -> list[tuple[Number, Number]]:
        """(heads, presence) of each layer."""
        return list(zip(self.heads, _or_ones(self.attention_present, self.heads)))

    def feed_forward(self) -> list[tuple[Number, Number]]:
        """(units, presence) of each layer."""
        return list(zip(self.ffn, _or_ones(self.ffn_present, self.ffn)))


def gate_names(num_convs: int, num_layers: int) -> list[str]:
    """Path of the gate that decides each of the widths of :meth:`Widths.flat` in an encoder that has all of them."""
    layers = range(num_layers)
    columns = ("attention.gate", "ffn.gate", "attention.output_gate", "ffn.output_gate")
    names = [f"feature_extractor.layers.{i}.gate" for i in range(num_convs)]
    return names + [f"transformer.layers.{i}.{column}" for column in columns for i in layers]


def _or_ones(column: Column | None, like: Column) -> Column:
    return [1] * len(like) if column is None else column


def static_shape(config: EncoderConfig) -> StaticShape:
    """The part of an encoder's shape that pruning never changes."""
    return StaticShape(
        conv_kernels=tuple(kernel for _, kernel, _ in config.conv_feature_layers),
        conv_strides=tuple(stride for _, _, stride in config.conv_feature_layers),
        conv_bias=config.conv_bias,
        extractor_mode=config.extractor_mode,
        embed_dim=config.encoder_embed_dim,
        head_dim=config.head_dim,
        conv_pos=config.pos_conv_kernel,
        conv_pos_groups=config.conv_pos_groups,
        relative_position=config.relative_position,
        num_buckets=config.num_buckets,
        full_heads=config.encoder_attention_heads,
        pos_conv_depth=config.pos_conv_depth,
    )


def widths_of(config: EncoderConfig) -> Widths:
    """The widths of an encoder as it is, integers."""
    assert config.conv_channels is not None and config.heads is not None and config.ffn_dims is not None
    return Widths(
        conv=config.conv_channels,
        heads=[len(heads or ()) for heads in config.heads],
        ffn=[units or 0 for units in config.ffn_dims],
        attention_present=[int(heads is not None) for heads in config.heads],
        ffn_present=[int(units is not None) for units in config.ffn_dims],
    )


def count_parameters(static: StaticShape, widths: Widths) -> Number:
    """Number of parameters.

    The count is exact, and an int, for integer widths. Tensor widths give a differentiable scalar, the
    expected count, gates being independent of each other (DPHuBERT, arXiv:2305.17651).

    The small gate of relative position (``8 head_dim + 8 + full_heads`` parameters a layer) goes when its
    attention is gone for certain, which only plain numbers tell; under a gate it counts in full.

    Raises:
        ValueError: if the widths do not fit the static shape.
    """
    _check(static, widths)
    dim, head_dim = static.embed_dim, static.head_dim

    total = _count_conv_stack(static, widths.conv)
    total += 2 * widths.conv[-1] + (widths.conv[-1] + 1) * dim  # LayerNorm, then the projection to D
    total += static.pos_conv_depth * (dim * (dim // static.conv_pos_groups) * static.conv_pos + dim)
    if static.pos_conv_depth == 1:  # the weight norm's magnitudes
        total += static.conv_pos
    total += 2 * dim  # the encoder's LayerNorm
    total += 4 * dim * len(widths.heads)  # two LayerNorms a layer
    if static.relative_position:
        total += static.num_buckets * static.full_heads

    head_parameters = 3 * (dim + 1) * head_dim + head_dim * dim  # query, key, value with bias; output columns
    total += _count_sublayers(widths.heads, widths.attention_present, head_parameters, dim)
    if static.relative_position:
        gates = widths.relative_gates
        if gates is None:
            gates = sum(not (_is_none(heads) or _is_none(present)) for heads, present in widths.attention())
        total += gates * (head_dim * RELATIVE_GATE_OUTPUTS + RELATIVE_GATE_OUTPUTS + static.full_heads)
    unit_parameters = (dim + 1) + dim  # input row with bias; output column
    total += _count_sublayers(widths.ffn, widths.ffn_present, unit_parameters, dim)
    return total


def _count_sublayers(units: Column, present: Column | None, per_unit: int, bias: int) -> Number:
    if isinstance(units, Tensor):  # a few operations for all layers
        each = units * per_unit + bias
        return (each if present is None else present * each).sum()  # type: ignore[operator]
    return sum(p * (u * per_unit + bias) for u, p in zip(units, _or_ones(present, units)))


def sparsity(expected: _N, full: int) -> _N:
    """Fraction of ``full`` parameters that is gone; differentiable for a tensor."""
    return 1 - expected / full


def count_macs(static: StaticShape, widths: Widths, num_samples: int) -> int:
    """Multiply-accumulates of one forward pass over one utterance, for integer widths.

    With T frames and T_i outputs of convolution i, D the Transformer's dimension, d a head's:

    - convolution i: ``T_i in out kernel``
    - feature projection: ``T in D``
    - positional convolution: ``T D (D / groups) kernel``, as often as there are such layers
    - attention of h heads: projections ``4 T D h d``, scores and weighted sum ``2 T^2 h d``
    - relative position, of h heads: gate ``T h d 8``, gated bias ``T^2 h``
    - feed-forward of f units: ``2 T D f``

    Biases, norms, activations, softmax and gate values are not counted.

    Args:
        num_samples: length of the utterance at 16 kHz.

    Raises:
        ValueError: if the widths do not fit the static shape, or the utterance is too short for one frame.
    """
    _check(static, widths)
    dim, head_dim = static.embed_dim, static.head_dim

    macs, length, in_channels = 0, num_samples, 1
    for out_channels, kernel, stride in zip(map(int, widths.conv), static.conv_kernels, static.conv_strides):
        if length < kernel:
            raise ValueError(f"num_samples is {num_samples}, too short for one frame; give more audio")
        length = (length - kernel) // stride + 1
        macs += length * in_channels * out_channels * kernel
        in_channels = out_channels

    macs += length * in_channels * dim
    macs += static.pos_conv_depth * length * dim * (dim // static.conv_pos_groups) * static.conv_pos
    for heads, present in widths.attention():
        inner = int(present) * int(heads) * head_dim
        macs += 4 * length * dim * inner + 2 * length**2 * inner
        if static.relative_position:
            macs += length * inner * RELATIVE_GATE_OUTPUTS + length**2 * (inner // head_dim)
    for units, present in widths.feed_forward():
        macs += 2 * length * dim * int(present) * int(units)
    return macs


def _count_conv_stack(static: StaticShape, channels: Column) -> Number:
    total: Number = 0
    in_channels: Number = 1
    for i, (out_channels, kernel) in enumerate(zip(channels, static.conv_kernels)):
        total += in_channels * out_channels * kernel
        if static.conv_bias:
            total += out_channels
        if i == 0 or static.extractor_mode == "layer_norm":
            total += 2 * out_channels
        in_channels = out_channels
    return total


def _is_none(width: Number) -> bool:
    """Whether nothing is left for certain. Not asked of expectations: it would synchronise a GPU."""
    return not isinstance(width, Tensor) and width == 0


def _check(static: StaticShape, widths: Widths) -> None:
    if static.extractor_mode not in ("default", "layer_norm"):
        raise ValueError(f"extractor_mode is {static.extractor_mode!r}; give 'default' or 'layer_norm'")
    layers = len(widths.heads)
    expected = {
        "conv_strides": (len(static.conv_strides), len(static.conv_kernels)),
        "conv": (len(widths.conv), len(static.conv_kernels)),
        "ffn": (len(widths.ffn), layers),
        "attention_present": (len(_or_ones(widths.attention_present, widths.heads)), layers),
        "ffn_present": (len(_or_ones(widths.ffn_present, widths.heads)), layers),
    }
    for name, (found, wanted) in expected.items():
        if found != wanted:
            raise ValueError(f"{name} has {found} entries, but must have {wanted}: one a layer")
