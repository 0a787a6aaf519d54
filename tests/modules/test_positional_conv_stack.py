"""data2vec's stacked positional convolutions: arithmetic, shape in the config, parameters and MACs."""

from __future__ import annotations

import contextlib

import pytest
import torch
from messages import says
from torch import nn

from skill_fairseq.modules.config import EncoderConfig, data2vec_base
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.positional_conv import PositionalConv
from skill_fairseq.modules.positional_conv_stack import PositionalConvStack
from skill_fairseq.modules.size import count_macs, count_parameters, widths_of

TINY = {
    "conv_feature_layers": "[(8,10,5)] + [(8,8,4)]",
    "encoder_layers": 2,
    "encoder_embed_dim": 24,
    "encoder_ffn_embed_dim": 16,
    "encoder_attention_heads": 4,
    "conv_pos_groups": 3,
}


@pytest.mark.parametrize("kernel_size", [3, 4])
def test_equals_modules_of_torch(kernel_size):
    torch.manual_seed(0)
    stack = PositionalConvStack(24, kernel_size, groups=3, depth=2)
    x = torch.randn(2, 11, 24)
    y = x.transpose(1, 2)
    for layer in stack.layers:
        nn.init.normal_(layer.bias)
        conv = nn.Conv1d(24, 24, kernel_size, padding=kernel_size // 2, groups=3)
        conv.weight, conv.bias = layer.weight, layer.bias
        y = nn.LayerNorm(24, elementwise_affine=False)(conv(y)[..., :11].transpose(1, 2))
        y = nn.GELU()(y).transpose(1, 2)
    assert (stack(x) - y.transpose(1, 2)).abs().max() < 1e-6


@pytest.mark.parametrize(("conv_pos", "depth", "kernel"), [(95, 5, 19), (128, 1, 128), (8, 3, 3), (9, 2, 4), (2, 1, 2)])
def test_kernel_follows_fairseqs_rule(conv_pos, depth, kernel):
    config = EncoderConfig(**TINY, conv_pos=conv_pos, pos_conv_depth=depth)
    assert config.pos_conv_kernel == kernel
    pos_conv = SpeechEncoder(config).transformer.pos_conv
    assert isinstance(pos_conv, PositionalConv if depth == 1 else PositionalConvStack)
    weights = [pos_conv.weight_v] if depth == 1 else [layer.weight for layer in pos_conv.layers]
    assert [tuple(weight.shape) for weight in weights] == [(24, 8, kernel)] * depth
    assert EncoderConfig.from_dict(config.to_dict()) == config
    assert EncoderConfig.from_fairseq(config.to_dict()).pos_conv_depth == depth


@pytest.mark.parametrize("depth", [0, -1, 2.0, "5", True])
def test_bad_depths_are_named(depth):
    with pytest.raises(ValueError, match=says("model.pos_conv_depth", repr(depth))):
        EncoderConfig(**TINY, pos_conv_depth=depth)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_parameters_and_macs(depth):
    config = EncoderConfig(**TINY, conv_pos=20, pos_conv_depth=depth)
    encoder = SpeechEncoder(config)
    widths = widths_of(config)
    assert count_parameters(config, widths) == sum(p.numel() for p in encoder.parameters())
    narrow = config.replace(conv_pos_groups=24)  # one channel per group, not 8
    frames = config.num_frames(3200)
    kernel = config.pos_conv_kernel
    assert count_macs(config, widths, 3200) - count_macs(narrow, widths, 3200) == depth * frames * 24 * 7 * kernel


def test_published_size():
    meta = torch.device("meta") if hasattr(torch.device, "__enter__") else contextlib.nullcontext()
    with meta:
        encoder = SpeechEncoder(data2vec_base())
    # transformers' Data2VecAudioModel of the default config has 93,164,288, mask embedding (768) included.
    assert encoder.num_parameters() == 93_163_520
