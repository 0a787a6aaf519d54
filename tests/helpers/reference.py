"""The encoder in textbook operations, as one function of its weights and gates: the reference for its modules."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from skill_fairseq.modules.encoder import EncoderOutput, SpeechEncoder
from skill_fairseq.modules.gate_bank import Draw

Weights = dict[str, Tensor]
Function = Callable[[Tensor], Tensor]


def encode(
    encoder: SpeechEncoder,
    source: Tensor,
    padding_mask: Tensor | None = None,
    draw: Draw | None = None,
    drop: Function = lambda weights: weights,
) -> EncoderOutput:
    """What ``encoder(source, padding_mask, draw=draw)`` should return, without dropout and masking.

    Args:
        encoder: gives weights and shape; only its code for drawing gates is used.
        source: (B, N) samples.
        padding_mask: (B, N) bool, True = padding, at the end of each row; or None.
        draw: the gates; None: draw them here, like the encoder.
        drop: dropout of the (B, h, T, T) attention weights.
    """
    config, w = encoder.config, encoder.state_dict(keep_vars=True)
    assert config.conv_channels is not None and config.heads is not None and config.ffn_dims is not None
    draw = encoder.draw_gates() if draw is None else draw
    x = source.to(w["feature_extractor.scale"].dtype)
    z: Weights = defaultdict(lambda: x.new_ones(1))
    if draw is not None:
        z.update({name: draw.z[gate.part].to(x.dtype) for name, gate in encoder.named_gates()})

    x = x[:, None]
    for i, (full, _, stride) in enumerate(config.conv_feature_layers):
        p = f"feature_extractor.layers.{i}"
        gates = z[f"{p}.gate"]
        x = F.conv1d(x, w[f"{p}.conv.weight"], w.get(f"{p}.conv.bias"), stride)
        if config.extractor_mode == "layer_norm":
            x = channel_norm(w, f"{p}.norm", x.transpose(1, 2), full, gates).transpose(1, 2)
        elif i == 0:
            x = F.group_norm(x, x.size(1), w[f"{p}.norm.weight"], w[f"{p}.norm.bias"])
        x = F.gelu(x) * gates[:, None]
    x = x.transpose(1, 2) * w["feature_extractor.scale"]
    if config.feature_layer_norm:
        x = channel_norm(w, "feature_projection.norm", x, full, gates)
    if config.feature_linear:
        x = linear(w, "feature_projection.linear", x)
    rate = config.time_reduction
    usable = x.size(1) // rate * rate
    states, hidden = [sum(x[:, r:usable:rate] for r in range(rate)) / rate], None

    if padding_mask is not None:
        padding_mask = frame_padding(encoder, padding_mask, x.size(1))
        x = x.masked_fill(padding_mask[:, :, None], 0.0)
        padding_mask = torch.stack([padding_mask[:, r:usable:rate] for r in range(rate)]).any(0)
        hidden = padding_mask & ~padding_mask.all(1, keepdim=True)  # an utterance without frames masks none
    x = x + positions(w, x, config.conv_pos_groups, config.pos_conv_depth)
    first = config.layer_norm_first
    if not first:
        x = norm(w, "transformer.layer_norm", x)
    if rate > 1:
        p = "transformer.time_reduction"
        x = F.conv1d(x.transpose(1, 2), w[f"{p}.weight"], w[f"{p}.bias"], stride=rate).transpose(1, 2)
    bias = shared = None
    if config.relative_position:
        by_bucket = w["transformer.relative_position.weight"]
        bias = by_bucket[buckets(x.size(1), config.num_buckets, config.max_distance).to(x.device)].permute(2, 0, 1)
    activate = F.gelu if config.activation_fn == "gelu" else F.relu
    for i, (heads, width) in enumerate(zip(config.heads, config.ffn_dims)):
        p = f"transformer.layers.{i}"
        if heads is not None:
            y = norm(w, f"{p}.attention_norm", x) if first else x
            if i + 1 in config.reuse_attention:
                y = linear(w, f"{p}.attention.v_proj", y).unflatten(-1, (len(heads), -1))
                y = torch.einsum("bhij,bjhd->bihd", shared, y).flatten(2)
                y = linear(w, f"{p}.attention.out_proj", y)
            else:
                gates = z[f"{p}.attention.gate"]
                y, shared = attention(w, f"{p}.attention", y, heads, bias, hidden, gates, drop)
            x = x + y * z[f"{p}.attention.output_gate"]
        x = x if first else norm(w, f"{p}.attention_norm", x)
        if width is not None:
            y = norm(w, f"{p}.ffn_norm", x) if first else x
            if width:
                y = linear(w, f"{p}.ffn.fc2", activate(linear(w, f"{p}.ffn.fc1", y)) * z[f"{p}.ffn.gate"])
            else:
                y = w[f"{p}.ffn.fc2.bias"]
            x = x + y * z[f"{p}.ffn.output_gate"]
        x = x if first else norm(w, f"{p}.ffn_norm", x)
        states.append(x)
    return EncoderOutput(norm(w, "transformer.layer_norm", x) if first else x, states, padding_mask)


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])


def channel_norm(w: Weights, name: str, x: Tensor, full: int, gates: Tensor) -> Tensor:
    """LayerNorm of (B, T, C) among the ``full`` channels before pruning; closed and cut ones are zeros in and out."""
    is_open = (gates > 0).to(x.dtype)
    padded = F.pad(x * is_open, (0, full - x.size(2)))
    y = F.layer_norm(padded, (full,))[:, :, : x.size(2)]
    return (y * w[f"{name}.weight"] + w[f"{name}.bias"]) * is_open


def frame_padding(encoder: SpeechEncoder, padding_mask: Tensor, frames: int) -> Tensor:
    """(B, N) of samples to (B, T) of frames: equal chunks of padding only, or frames beyond the audio's own."""
    if encoder.config.padding_rule == "chunks":
        chunk = padding_mask.size(1) // frames
        return torch.stack([padding_mask[:, t * chunk : (t + 1) * chunk].all(1) for t in range(frames)], 1)
    lengths = (~padding_mask).sum(1)
    for _, kernel, stride in encoder.config.conv_feature_layers:
        lengths = (lengths - kernel).div(stride, rounding_mode="floor") + 1
    return torch.arange(frames, device=lengths.device) >= lengths[:, None]


def positions(w: Weights, x: Tensor, groups: int, depth: int) -> Tensor:
    """(B, T, D) of one convolution with weight norm, or of data2vec's several with LayerNorm."""
    p, frames, y = "transformer.pos_conv", x.size(1), x.transpose(1, 2)
    if depth == 1:
        v, g = w[f"{p}.weight_v"], w[f"{p}.weight_g"]
        kernel = v * g / v.norm(dim=(0, 1), keepdim=True)
        y = F.conv1d(y, kernel, w[f"{p}.bias"], padding=kernel.size(2) // 2, groups=groups)
        return F.gelu(y[..., :frames]).transpose(1, 2)
    for i in range(depth):
        kernel = w[f"{p}.layers.{i}.weight"]
        y = F.conv1d(y, kernel, w[f"{p}.layers.{i}.bias"], padding=kernel.size(2) // 2, groups=groups)
        y = F.gelu(F.layer_norm(y[..., :frames].transpose(1, 2), x.shape[2:])).transpose(1, 2)
    return y.transpose(1, 2)


def attention(
    w: Weights,
    p: str,
    x: Tensor,
    heads: list[int],
    bias: Tensor | None,
    hidden: Tensor | None,
    gates: Tensor,
    drop: Function,
) -> tuple[Tensor, Tensor | None]:
    """(B, T, D) to (B, T, D), and the maps before dropout.

    ``heads`` are the remaining heads; ``bias`` (H, T, T) has all original ones.
    """
    if not heads:
        return w[f"{p}.out_proj.bias"].expand_as(x), None
    q, k, v = (linear(w, f"{p}.{n}_proj", x).unflatten(-1, (len(heads), -1)).transpose(1, 2) for n in "qkv")
    scores = q @ k.transpose(2, 3) / math.sqrt(q.size(3))
    if bias is not None:
        by_head = x.unflatten(-1, (bias.size(0), -1))[:, :, heads]
        both = linear(w, f"{p}.position_gate.grep_linear", by_head).unflatten(-1, (2, 4)).sum(-1).sigmoid()
        update, reset = both.transpose(1, 2).unsqueeze(-1).unbind(3)  # (B, h, T, 1) each
        factor = update * (reset * w[f"{p}.position_gate.grep_a"][:, heads] - 1) + 2
        scores = scores + factor * bias[heads]
    if hidden is not None:
        scores = scores.masked_fill(hidden[:, None, None], -math.inf)
    maps = scores.softmax(-1)
    y = drop(maps) @ v * gates[:, None, None]
    return linear(w, f"{p}.out_proj", y.transpose(1, 2).flatten(2)), maps


def buckets(frames: int, number: int, furthest: int) -> Tensor:
    """(T, T) buckets of relative position, as in T5."""
    offset = torch.arange(frames)[None] - torch.arange(frames)[:, None]
    distance, exact = offset.abs(), number // 4
    scaled = (distance.clamp(min=1).float() / exact).log() / math.log(furthest / exact) * (number // 2 - exact)
    far = (exact + scaled.long()).clamp(max=number // 2 - 1)
    return (offset > 0) * (number // 2) + torch.where(distance < exact, distance, far)
