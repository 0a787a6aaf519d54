"""Costs of an encoder of given widths: parameters and multiply-accumulates, exact or expected.

Counts the convolutional stack, feature projection, positional convolution, Transformer layers and relative position,
but no mask embedding and no heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Dict, Union

from torch import Tensor

from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.units import UNITS, PrunableUnit, units_of

Number = Union[int, float, Tensor]
"""A width: an integer, or its expectation as a scalar tensor."""

Column = Union[Sequence[Number], Tensor]
"""Widths of one kind: numbers, or a 1-D tensor."""

Widths = Mapping[str, Column]
"""Prunable widths by the names of ``model.pruning_units``: integers for an actual encoder, tensors for expectations
under gates. ``conv`` has the output channels of each convolution, ``heads`` and ``ffn`` the heads and FFN units of each
layer, ``attention_layers`` and ``ffn_layers`` whether the sublayer exists: 1 or 0, or the probability; without these
two all sublayers exist. A sublayer without units keeps its output bias, a removed one adds nothing. Other kinds are
defined in :mod:`skill_fairseq.modules.units`."""

RELATIVE_GATE_OUTPUTS = 8
"""Outputs from which WavLM's relative-position gate computes its two factors."""


def widths_of(config: EncoderConfig) -> Dict[str, Column]:
    """The actual widths of an encoder, integers."""
    return {unit.name: [width or 0 for width in unit.left(config)] for unit in units_of(config)}


def flat_widths(widths: Widths) -> list[Number]:
    """(W,), all widths, concatenated by kind."""
    return [width for column in widths.values() for width in column]


def from_flat(flat: Column, like: Widths) -> Dict[str, Column]:
    """The inverse of :func:`flat_widths`; a tensor's columns are views of it."""
    columns, start = {}, 0
    for name, column in like.items():
        columns[name] = flat[start : start + len(column)]
        start += len(column)
    return columns


def count_parameters(config: EncoderConfig, widths: Widths) -> Number:
    """Number of parameters.

    The count is exact, and an int, for integer widths. Tensor widths give a differentiable scalar, the
    expected count for independent gates (DPHuBERT, arXiv:2305.17651).

    The small gate of relative position (``8 head_dim + 8 + heads before pruning`` parameters per layer) is removed only
    if its attention certainly is, which requires plain numbers; under a gate it counts in full.

    Args:
        config: everything that pruning does not change; for tensor columns also the layers that have heads.

    Raises:
        ValueError: the widths do not match the config.
    """
    _check(config, widths)
    dim, head_dim, conv = config.encoder_embed_dim, config.head_dim, widths["conv"]

    total = _count_conv_stack(config, conv)
    feature_norm = 2 * conv[-1] if config.feature_layer_norm else 0
    total += feature_norm + ((conv[-1] + 1) * dim if config.feature_linear else 0)
    total += config.pos_conv_depth * (dim * (dim // config.conv_pos_groups) * config.pos_conv_kernel + dim)
    if config.pos_conv_depth == 1:  # the weight norm's magnitudes
        total += config.pos_conv_kernel
    total += 2 * dim  # the encoder's LayerNorm
    if config.time_reduction > 1:
        total += config.time_reduction * dim * dim + dim
    adapter = config.adapter_dim
    norm = 2 * dim if config.adapter_form == "residual" else 0
    total += (2 * dim * adapter + adapter + dim + norm if adapter else 0) * config.encoder_layers
    total += 4 * dim * config.encoder_layers  # two LayerNorms per layer
    if config.relative_position:
        total += config.num_buckets * config.encoder_attention_heads

    head_parameters = 3 * (dim + 1) * head_dim + head_dim * dim  # query, key, value with bias; output columns
    total += _total(widths, "heads", "attention_layers", head_parameters, dim)
    total -= 2 * (dim + 1) * head_dim * _reusing_heads(config, widths)  # they have neither query nor key
    if config.relative_position:
        each = head_dim * RELATIVE_GATE_OUTPUTS + RELATIVE_GATE_OUTPUTS + config.encoder_attention_heads
        total += _relative_gates(config, widths) * each
    unit_parameters = (dim + 1) + dim  # input row with bias; output column
    total += _total(widths, "ffn", "ffn_layers", unit_parameters, dim)
    return total + sum(unit.parameters(config, widths) for unit in _others(config))


def count_macs(config: EncoderConfig, widths: Widths, num_samples: int) -> Number:
    """Multiply-accumulates of one forward pass over one utterance; exact or expected, see :func:`count_parameters`.

    With T frames and T_i outputs of convolution i, D the Transformer's dimension, d a head's:

    - log-mel features, T_0 windows of N samples: ``T_0 (N / 2 + 1) (2 N + bins)``, the spectrum counted as the matrix
      product that exported graphs compute; torch takes a Fourier transform, which is faster
    - convolution i: ``T_i in out kernel``
    - feature projection: ``T in D``
    - positional convolution: ``T D (D / groups) kernel``, for each such layer
    - time reduction by r: ``T' D D r``, and everything after has ``T' = T // r`` instead of T
    - attention of h heads: projections ``4 T D h d``, scores and weighted sum ``2 T^2 h d``; half with a reused map
    - relative position, of h heads: gate ``T h d 8``, gated bias ``T^2 h``; none with a reused map
    - feed-forward of f units: ``2 T D f``; the same for an adapter of f features

    Biases, norms, activations, softmax and gate values are not counted.

    Args:
        num_samples: length of the utterance at 16 kHz.

    Raises:
        ValueError: the widths do not match the config, or the utterance is too short for one frame.
    """
    _check(config, widths)
    dim, head_dim = config.encoder_embed_dim, config.head_dim

    macs: Number = 0
    in_channels: Number = config.mel_bins or 1
    length = num_samples
    if config.mel_bins:
        if length < config.mel_window:
            raise ValueError(f"num_samples is {num_samples}, too short for one frame; give more audio")
        length = (length + sum(config.mel_padding) - config.mel_window) // config.mel_hop + 1
        macs += length * (config.mel_window // 2 + 1) * (2 * config.mel_window + config.mel_bins)
    for out_channels, (_, kernel, stride) in zip(widths["conv"], config.conv_feature_layers):
        if length < kernel:
            raise ValueError(f"num_samples is {num_samples}, too short for one frame; give more audio")
        length = (length - kernel) // stride + 1
        macs += length * kernel * in_channels * out_channels
        in_channels = out_channels

    macs += length * in_channels * dim if config.feature_linear else 0
    macs += config.pos_conv_depth * length * dim * (dim // config.conv_pos_groups) * config.pos_conv_kernel
    if config.time_reduction > 1:
        length //= config.time_reduction
        macs += length * dim * dim * config.time_reduction
    value_macs = (2 * length * dim + length**2) * head_dim
    map_macs = value_macs
    if config.relative_position:
        map_macs += length * head_dim * RELATIVE_GATE_OUTPUTS + length**2
    macs += _total(widths, "heads", "attention_layers", value_macs + map_macs)
    macs -= map_macs * _reusing_heads(config, widths)
    macs += _total(widths, "ffn", "ffn_layers", 2 * length * dim)
    macs += 2 * length * dim * config.adapter_dim * config.encoder_layers
    return macs + sum(unit.macs(config, widths, length) for unit in _others(config))


def _others(config: EncoderConfig) -> list[PrunableUnit]:
    """Kinds of units that the formulas do not cover."""
    return [unit for unit in units_of(config) if unit.field is None]


def _count_conv_stack(config: EncoderConfig, channels: Column) -> Number:
    total: Number = 0
    in_channels: Number = config.mel_bins or 1
    for i, (out_channels, (_, kernel, _)) in enumerate(zip(channels, config.conv_feature_layers)):
        total += in_channels * out_channels * kernel
        if config.conv_bias:
            total += out_channels
        if config.extractor_mode == "layer_norm" or (i == 0 and not config.mel_bins):
            total += 2 * out_channels
        in_channels = out_channels
    return total


def _total(widths: Widths, units: str, sublayers: str, per_unit: int, bias: int = 0) -> Number:
    """``present (number per_unit + bias)``, summed over layers."""
    column, present = widths[units], widths.get(sublayers)
    if isinstance(column, Tensor):  # a few operations for all layers
        each = column * per_unit + bias
        return (each if present is None else present * each).sum()  # type: ignore[operator]
    return sum(p * (u * per_unit + bias) for u, p in zip(column, [1] * len(column) if present is None else present))


def _reusing_heads(config: EncoderConfig, widths: Widths) -> Number:
    """Heads of all layers that reuse another's map; they have no gates."""
    return sum(widths["heads"][layer - 1] for layer in config.reuse_attention)


def _relative_gates(config: EncoderConfig, widths: Widths) -> int:
    """Layers whose attention has a relative-position gate; reading expectations would synchronise, so they count."""
    if isinstance(widths["heads"], Tensor):
        widths = widths_of(config)
    present = widths.get("attention_layers", [1] * config.encoder_layers)
    pairs = list(zip(widths["heads"], present))
    own = [pair for layer, pair in enumerate(pairs, start=1) if layer not in config.reuse_attention]
    return sum(all(isinstance(w, Tensor) or w != 0 for w in pair) for pair in own)


def _check(config: EncoderConfig, widths: Widths) -> None:
    for name, column in widths.items():
        wanted = len(UNITS[name].full(config))
        if len(column) != wanted:
            raise ValueError(f"{name} has {len(column)} entries, but must have {wanted}: one per layer")
