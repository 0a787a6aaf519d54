"""TorchAudio's models, and the pruned models of DPHuBERT and its followers, which keep TorchAudio's layout.

Three kinds of files share the layout: a bare state dict of ``torchaudio.models.Wav2Vec2Model`` or
``HuBERTPretrainModel``; DPHuBERT's published ``{"state_dict", "config"}``, whose config holds the keyword arguments of
its ``wav2vec2_model`` (one number per layer if layers differ); and a TorchAudio state dict saved like that by hand.

A bare state dict is incomplete. The rest follows TorchAudio's own factory functions (``hubert_base`` ...
``wavlm_large``, ``wav2vec2_xlsr_2b``), which agree on it:

- layers are pre-LayerNorm and waveforms are normalised if every convolution has a LayerNorm;
- the strides are 5,2,2,2,2,2,2 if the kernels are 10,3,3,3,3,2,2;
- WavLM's relative positions share a bucket from 800 frames on;
- widths of 768, 1024, 1280 and 1920 have 12, 16, 16 and 16 heads (WavLM's weights give the number themselves).

Anything else needs the config.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skill_fairseq.checkpoints.huggingface import ENCODER_NAMES
from skill_fairseq.checkpoints.safe_load import plain
from skill_fairseq.checkpoints.source import (
    ADDED_HERE,
    EncoderSource,
    State,
    reading_config,
    refuse,
    renaming,
    tensors_of,
    weight_norm_spelling,
)
from skill_fairseq.modules.config import EncoderConfig

_MARK = re.compile(r"(.*?)encoder\.transformer\.pos_conv_embed\.conv\.bias")
_LAYER = "encoder.transformer.layers."

STRIDES = {(10, 3, 3, 3, 3, 2, 2): (5, 2, 2, 2, 2, 2, 2)}
HEADS = {768: 12, 1024: 16, 1280: 16, 1920: 16}
MAX_DISTANCE = 800

HEADS_AND_MASKING = (r"aux\.(weight|bias)", r"(.*\.)?(mask_generator|logit_generator)\..*")
RELATIVE_GATES = r"encoder\.transformer\.layers\.\d+\.attention\.gru_rel_pos_.*"

SUPPORTED = dict.fromkeys(
    (
        "extractor_prune_conv_channels",
        "encoder_prune_attention_heads",
        "encoder_prune_attention_layer",
        "encoder_prune_feed_forward_intermediate",
        "encoder_prune_feed_forward_layer",
    ),
    False,
)
"""DPHuBERT's gates, which its ``prune.py`` removes."""

_transformers_name = renaming(ENCODER_NAMES)
_from_transformers = renaming(
    (
        (r"feature_extractor\.scale", "feature_extractor.dummy_weight"),  # DPHuBERT's name
        (r"feature_projection\.", "encoder.feature_projection."),
        (r"encoder\.", "encoder.transformer."),
    )
)


def is_torchaudio(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has TorchAudio's layout, with or without a config."""
    state = checkpoint.get("state_dict", checkpoint)
    return isinstance(state, Mapping) and any(_MARK.fullmatch(str(name)) for name in state)


def read_torchaudio(checkpoint: Mapping[str, Any], path: Path) -> EncoderSource:
    """Reads one of the files that the module describes.

    DPHuBERT's pruned models normalise over the remaining channels only, so these count as the original channels here,
    and the encoder computes what theirs does.

    Raises:
        ValueError: it holds several models, a model that still has gates, or an incomplete shape.
    """
    fields = plain(checkpoint.get("config")) or {}
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: its config is {type(fields).__name__}; expected keyword arguments by name")
    refuse(path, fields, SUPPORTED)
    state = _own_names(tensors_of(checkpoint.get("state_dict", checkpoint), path), path)
    assumed: list[str] = []
    with reading_config(path):
        config = _config(state, fields, assumed)
    format = "TorchAudio's state dict" + (" with its config" if fields else "")
    if "encoder_use_attention" in fields:
        format = "DPHuBERT's model"
    # Without attention in layer 0 their model has no position bias, but keeps the bias's gates in other layers.
    unused = () if config.relative_position else (RELATIVE_GATES,)
    return EncoderSource(
        format,
        config,
        state,
        lambda name: _from_transformers(_transformers_name(name)),
        HEADS_AND_MASKING + unused,
        ADDED_HERE,
        mask_embedding="mask_generator.mask_embedding",
        assumed=tuple(f"{what}: assumed, as in TorchAudio's own models; not in the file" for what in assumed),
    )


def _own_names(state: State, path: Path) -> State:
    """Names as in a bare Wav2Vec2Model, with query, key and value separate."""
    prefixes = sorted({match.group(1) for match in map(_MARK.fullmatch, state) if match})
    if len(prefixes) > 1:
        raise ValueError(
            f"{path}: holds several models in TorchAudio's layout, named {prefixes}; expected one: for a DPHuBERT "
            "training checkpoint, use the file that its prune.py or save_final_ckpt.py writes"
        )
    found: State = {}
    for name, tensor in state.items():
        name = weight_norm_spelling(name[len(prefixes[0]) :] if name.startswith(prefixes[0]) else name)
        if ".attention.attention." not in name:
            found[name] = tensor
            continue
        name = name.replace(".attention.attention.", ".attention.")  # WavLM's, a wrapper of torch.nn.MultiheadAttention
        whole, _, kind = name.partition("in_proj_")
        parts = zip("qkv", tensor.chunk(3)) if kind else ()
        found.update({f"{whole}{part}_proj.{kind}": rows for part, rows in parts} or {name: tensor})
    return found


def _config(state: State, fields: Mapping[str, Any], assumed: list[str]) -> EncoderConfig:
    """The shape: from the config, else from the tensors, else by the module's rules.

    Adds values from the rules to ``assumed``, in words.
    """

    def given(name: str, otherwise: Any) -> Any:
        return otherwise if fields.get(name) is None else fields[name]

    def rows(name: str) -> int:
        if name not in state:
            raise ValueError(f"the weights lack {name}")
        return state[name].size(0)

    found = {int(name[len(_LAYER) :].split(".")[0]) for name in state if name.startswith(_LAYER)}
    count = given("encoder_num_layers", len(found))
    ffn = [f"{_LAYER}{i}.feed_forward.intermediate_dense.weight" for i in range(count)]
    use_ffn = given("encoder_use_feed_forward", [name in state for name in ffn])
    widths = _each(given("encoder_ff_interm_features", [rows(n) if n in state else 0 for n in ffn]), count)
    widths = [width if used else None for width, used in zip(widths, use_ffn)]
    dim = given("encoder_embed_dim", rows("encoder.feature_projection.projection.weight"))
    full_heads, heads = _heads(state, fields, dim, count, assumed)
    several_norms = "feature_extractor.conv_layers.1.layer_norm.weight" in state
    mode = given("extractor_mode", "layer_norm" if several_norms else "group_norm")
    kernel = state.get("encoder.transformer.pos_conv_embed.conv.weight_v")
    if kernel is None:
        raise ValueError("the weights lack encoder.transformer.pos_conv_embed.conv.weight_v")
    table = state.get(f"{_LAYER}0.attention.rel_attn_embed.weight")
    large = mode == "layer_norm"
    conv = given("extractor_conv_layer_config", None) or _conv_layers(state)
    for name, what in (
        ("extractor_conv_layer_config", f"convolution strides {','.join(str(stride) for _, _, stride in conv)}"),
        ("encoder_layer_norm_first", f"LayerNorm {'before' if large else 'after'} each sublayer"),
        ("normalize_waveform", f"waveforms {'normalised' if large else 'not normalised'}"),
        ("encoder_max_distance", f"relative positions up to {MAX_DISTANCE} frames" if table is not None else None),
    ):
        if what and fields.get(name) is None:
            assumed.append(what)
    return EncoderConfig(
        extractor_mode={"group_norm": "default"}.get(mode, mode),
        conv_feature_layers=conv,
        conv_bias=given("extractor_conv_bias", "feature_extractor.conv_layers.0.conv.bias" in state),
        encoder_layers=count,
        encoder_embed_dim=dim,
        encoder_ffn_embed_dim=max((width for width in widths if width), default=1),
        encoder_attention_heads=full_heads,
        layer_norm_first=given("encoder_layer_norm_first", large),
        conv_pos=given("encoder_pos_conv_kernel", kernel.size(2)),
        conv_pos_groups=given("encoder_pos_conv_groups", dim // kernel.size(1)),
        relative_position=table is not None,
        num_buckets=given("encoder_num_buckets", 320 if table is None else table.size(0)),
        max_distance=given("encoder_max_distance", MAX_DISTANCE),
        normalize=given("normalize_waveform", large),
        padding_rule="convolution",
        heads=heads,
        ffn_dims=widths,
    )


def _heads(
    state: State, fields: Mapping[str, Any], dim: int, count: int, assumed: list[str]
) -> tuple[int, list[list[int] | None]]:
    """Number of heads before pruning, and the heads left in each layer."""
    queries = [state.get(f"{_LAYER}{i}.attention.q_proj.weight") for i in range(count)]
    gates = [state.get(f"{_LAYER}{i}.attention.gru_rel_pos_const") for i in range(count)]
    used = fields.get("encoder_use_attention") or [query is not None for query in queries]
    left = fields.get("encoder_remaining_heads")
    numbers = fields.get("encoder_num_heads")
    if left is not None:
        totals = _each(fields.get("encoder_total_num_heads"), count)
        if len(set(totals)) != 1 or totals[0] is None:
            raise ValueError(f"encoder_total_num_heads: {totals}; expected the same number for every layer")
        full = totals[0]
    elif numbers is not None:
        numbers = _each(numbers, count)
        widths = (query.size(0) // n for query, n in zip(queries, numbers) if query is not None and n)
        full = dim // (fields.get("encoder_head_dim") or next(widths, dim))
        left = [list(range(number)) for number in numbers]
    else:
        gate = next((gate for gate in gates if gate is not None), None)
        full = HEADS.get(dim) if gate is None else gate.size(1)
        if full is None:
            raise ValueError(
                f"a bare state dict of width {dim} does not determine the number of attention heads; save "
                "{'state_dict': model.state_dict(), 'config': {'encoder_num_heads': ...}} instead, config holding "
                "keyword arguments of torchaudio.models.wav2vec2_model"
            )
        left = [list(range(full))] * count
        if gate is None:
            assumed.append(f"{full} attention heads, from the width {dim}")
    return full, [heads if attention else None for heads, attention in zip(_each(left, count), used)]


def _conv_layers(state: State) -> list[tuple[int, int, int]]:
    """Channels and kernels from the weights, and the strides that belong to the kernels."""
    name = "feature_extractor.conv_layers.{}.conv.weight"
    count = sum(bool(re.fullmatch(name.format(r"\d+"), key)) for key in state)
    weights = [state[name.format(i)] for i in range(count)]
    kernels = tuple(weight.size(2) for weight in weights)
    if kernels not in STRIDES:
        raise ValueError(
            f"a bare state dict with convolution kernels {kernels} does not determine their strides; save "
            "{'state_dict': model.state_dict(), 'config': {'extractor_conv_layer_config': [(channels, kernel, stride), "
            "...]}} instead"
        )
    return [(weight.size(0), kernel, stride) for weight, kernel, stride in zip(weights, kernels, STRIDES[kernels])]


def _each(value: Any, count: int) -> list[Any]:
    """A value for every layer; a single value applies to all."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise ValueError(f"{values} has {len(values)} entries; expected {count}, one per layer")
    return values
