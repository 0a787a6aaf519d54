"""Small models of transformers with random weights, and audio for them."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

CONV = {
    "base": [(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16, 2, 2)] * 2,
    "large": [(24, 10, 5)] + [(24, 3, 2)] * 4 + [(24, 2, 2)] * 1 + [(32, 2, 2)],
}
SHAPE: dict[str, dict[str, Any]] = {
    "base": {"layers": 3, "dim": 48, "ffn": 80, "heads": 4, "conv_pos": 16, "groups": 4},
    "large": {"layers": 4, "dim": 64, "ffn": 96, "heads": 8, "conv_pos": 15, "groups": 8},
}
SAMPLES = (16000, 15900, 9150, 5841)
POS_CONV = {"base": (4, 20), "large": (5, 15)}  # data2vec's convolutions and their total length


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Sets every parameter to a random value that matters: no bias is 0, no scale is 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() == 1:
                p.copy_(noise * 0.1 if name.endswith("bias") else 1 + 0.2 * noise)
            elif p.shape[0] == 1:  # scale of the weight norm, and of the position gate
                p.copy_(1 + 0.2 * noise)
            elif "rel_attn_embed" in name or "relative_position" in name:
                p.copy_(noise)
            else:
                p.copy_(noise / p[0].numel() ** 0.5)
    return module.eval()


def padded_batch(samples: tuple[int, ...] = SAMPLES, seed: int = 1) -> tuple[Tensor, Tensor]:
    """(B, N) noise, zero in the padding, and its padding mask."""
    generator = torch.Generator().manual_seed(seed)
    padding = torch.arange(max(samples)) >= torch.tensor(samples)[:, None]
    return torch.randn(padding.shape, generator=generator).masked_fill(padding, 0.0), padding


def huggingface(kind: str, style: str, head: str = "Model", **changes: Any) -> nn.Module:
    """A random transformers WavLMModel, HubertModel, Wav2Vec2Model or Data2VecAudioModel, or one with a head."""
    # PyPI's torchaudio cannot be imported with a CPU torch, and transformers tries.
    sys.modules.setdefault("torchaudio", None)  # type: ignore[arg-type]
    import transformers

    name = {"wavlm": "WavLM", "hubert": "Hubert", "wav2vec2": "Wav2Vec2", "data2vec-audio": "Data2VecAudio"}[kind]
    shape, large = SHAPE[style], style == "large"
    fields = {
        "hidden_size": shape["dim"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "intermediate_size": shape["ffn"],
        "conv_dim": [c for c, _, _ in CONV[style]],
        "conv_kernel": [k for _, k, _ in CONV[style]],
        "conv_stride": [s for _, _, s in CONV[style]],
        "conv_bias": large,
        "num_conv_pos_embedding_groups": shape["groups"],
    }
    if kind == "data2vec-audio":
        depth, length = POS_CONV[style]
        fields.update(num_conv_pos_embeddings=depth, conv_pos_kernel_size=length // depth)
    else:
        fields.update(
            feat_extract_norm="layer" if large else "group",
            do_stable_layer_norm=large,
            num_conv_pos_embeddings=shape["conv_pos"],
        )
    if kind == "wavlm":
        fields.update(num_buckets=16, max_bucket_distance=24)
    config = getattr(transformers, name + "Config")(**{**fields, **changes})
    return randomise(getattr(transformers, name + head)(config))
