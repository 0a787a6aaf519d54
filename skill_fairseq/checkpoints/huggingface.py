"""Hugging Face folders of WavLM, HuBERT, wav2vec 2.0 and data2vec-audio: config and weights, in any layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skill_fairseq.checkpoints.plain_files import look_alike, read_fields
from skill_fairseq.checkpoints.safe_load import load_torch_file
from skill_fairseq.checkpoints.safetensors_file import load_tensors
from skill_fairseq.checkpoints.source import (
    ADDED_HERE,
    EncoderSource,
    Rules,
    State,
    reading_config,
    refuse,
    renaming,
    tensors_of,
    weight_norm_spelling,
)
from skill_fairseq.modules.config import EncoderConfig

MODEL_TYPES = ("wavlm", "hubert", "wav2vec2", "data2vec-audio")

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

_LAYER = r"transformer\.layers\.(\d+)\."

ENCODER_NAMES: Rules = (
    (r"feature_extractor\.layers\.(\d+)\.conv\.", r"feature_extractor.conv_layers.\1.conv."),
    (r"feature_extractor\.layers\.(\d+)\.norm\.", r"feature_extractor.conv_layers.\1.layer_norm."),
    (r"feature_projection\.norm\.", "feature_projection.layer_norm."),
    (r"feature_projection\.linear\.", "feature_projection.projection."),
    (r"transformer\.pos_conv\.layers\.(\d+)\.", r"encoder.pos_conv_embed.layers.\1.conv."),
    (r"transformer\.pos_conv\.", "encoder.pos_conv_embed.conv."),
    (r"transformer\.relative_position\.", "encoder.layers.0.attention.rel_attn_embed."),
    (_LAYER + r"attention_norm\.", r"encoder.layers.\1.layer_norm."),
    (_LAYER + r"ffn_norm\.", r"encoder.layers.\1.final_layer_norm."),
    (_LAYER + r"attention\.position_gate\.grep_a", r"encoder.layers.\1.attention.gru_rel_pos_const"),
    (_LAYER + r"attention\.position_gate\.grep_linear\.", r"encoder.layers.\1.attention.gru_rel_pos_linear."),
    (_LAYER + r"ffn\.fc1\.", r"encoder.layers.\1.feed_forward.intermediate_dense."),
    (_LAYER + r"ffn\.fc2\.", r"encoder.layers.\1.feed_forward.output_dense."),
    (r"transformer\.", "encoder."),
)
"""From our names to transformers'."""

MASK_EMBEDDING = "masked_spec_embed"

TASK_HEADS = (
    r"quantizer\..*",
    r"project_(q|hid)\..*",
    r"(lm_head|projector|classifier|tdnn|objective)\..*",
    r"feature_extractor\.(weight|bias)",  # a linear layer of the speaker-verification head
    r"layer_weights",
)
"""Quantisers, and heads of transformers' fine-tuned models."""

SUPPORTED = {
    "add_adapter": False,
    "adapter_attn_dim": None,
    "conv_pos_batch_norm": False,
    "feat_extract_activation": "gelu",
    "layer_norm_eps": 1e-5,
}


def read_huggingface(folder: Path, trust: bool = False) -> EncoderSource:
    """Reads a folder from ``save_pretrained`` or the Hugging Face hub.

    Raises:
        ValueError: it is another model, needs a feature that this encoder lacks, or has a damaged file.
        FileNotFoundError: a file is missing.
    """
    fields = read_fields(folder / "config.json")
    kind = fields.get("model_type")
    audio = _feature_extractor(folder)
    if kind not in MODEL_TYPES:
        raise ValueError(
            f"{folder}: recognised as a Hugging Face folder, but config.json has model_type = {kind!r}; "
            f"expected one of {list(MODEL_TYPES)}"
        )
    refuse(folder / "config.json", fields, SUPPORTED)
    with reading_config(folder / "config.json"):
        config = config_of_fields(fields, audio)
    state = {_spelling(name, kind): tensor for name, tensor in _read_weights(folder, trust).items()}
    assumed = (
        f"waveforms at {config.sample_rate} Hz, {'normalised' if config.normalize else 'not normalised'}: assumed, as "
        "the folder has no preprocessor_config.json",
    )
    return EncoderSource(
        f"a Hugging Face folder of {kind}",
        config,
        state,
        renaming(ENCODER_NAMES),
        TASK_HEADS,
        ADDED_HERE,
        assumed=assumed if audio is None else (),
        mask_embedding=MASK_EMBEDDING,
    )


def config_of_fields(fields: Mapping[str, Any], audio: Mapping[str, Any] | None = None) -> EncoderConfig:
    """The shape; absent fields have transformers' defaults, those of the Base models."""
    conv = [fields.get(name, default) for name, default in _CONV_DEFAULTS.items()]
    if len({len(numbers) for numbers in conv}) != 1:
        raise ValueError(f"{', '.join(_CONV_DEFAULTS)} must have the same length; found {conv}")
    data2vec = fields["model_type"] == "data2vec-audio"  # its code normalises all convolutions, whatever the config has
    norm = "layer" if data2vec else fields.get("feat_extract_norm", "group")
    depth = fields.get("num_conv_pos_embeddings", 5) if data2vec else 1
    kernel = fields.get("conv_pos_kernel_size", 19) if data2vec else fields.get("num_conv_pos_embeddings", 128)
    if data2vec and (depth < 2 or kernel < 3):
        raise ValueError(
            f"num_conv_pos_embeddings = {depth} and conv_pos_kernel_size = {kernel} are not supported; expected at "
            "least 2 and 3"
        )
    return EncoderConfig(
        extractor_mode={"group": "default", "layer": "layer_norm"}.get(norm, norm),
        conv_feature_layers=list(zip(*conv)),
        conv_bias=fields.get("conv_bias", False),
        feature_layer_norm=fields["model_type"] != "hubert" or fields.get("feat_proj_layer_norm", True),
        encoder_layers=fields.get("num_hidden_layers", 12),
        encoder_embed_dim=fields.get("hidden_size", 768),
        encoder_ffn_embed_dim=fields.get("intermediate_size", 3072),
        encoder_attention_heads=fields.get("num_attention_heads", 12),
        activation_fn=fields.get("hidden_act", "gelu"),
        layer_norm_first=fields.get("do_stable_layer_norm", False) and not data2vec,
        conv_pos=kernel * depth,
        conv_pos_groups=fields.get("num_conv_pos_embedding_groups", 16),
        pos_conv_depth=depth,
        relative_position=fields["model_type"] == "wavlm",
        num_buckets=fields.get("num_buckets", 320),
        max_distance=fields.get("max_bucket_distance", 800),
        normalize=norm == "layer" if audio is None else audio.get("do_normalize", True),
        sample_rate=(audio or {}).get("sampling_rate", 16000),
        padding_rule="convolution",
    )


def _feature_extractor(folder: Path) -> Mapping[str, Any] | None:
    """The folder's audio settings (transformers 5 writes them into the processor's file); None if there are none."""
    processor, extractor = folder / "processor_config.json", folder / "preprocessor_config.json"
    if processor.exists():
        found = read_fields(processor).get("feature_extractor")
        if found is not None and not isinstance(found, dict):
            raise ValueError(f"{processor}: feature_extractor is {_short(found)}; expected an object")
        if found:
            return found
    return read_fields(extractor) if extractor.exists() else None


_CONV_DEFAULTS = {"conv_dim": [512] * 7, "conv_kernel": [10, 3, 3, 3, 3, 2, 2], "conv_stride": [5, 2, 2, 2, 2, 2, 2]}


def _spelling(name: str, kind: str) -> str:
    """Removes the prefix of the encoder in a model with a head."""
    prefix = kind.replace("-", "_") + "."
    return weight_norm_spelling(name[len(prefix) :] if name.startswith(prefix) else name)


def _read_weights(folder: Path, trust: bool) -> State:
    for name in WEIGHT_FILES:
        if not (folder / name).exists():
            continue
        if not name.endswith(".index.json"):
            return _read_shard(folder / name, trust)
        state: State = {}
        shards = read_fields(folder / name).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise ValueError(f"{folder / name}: weight_map is {_short(shards)}; expected a file name for each weight")
        for shard in sorted(set(shards.values())):
            if Path(shard).name != shard:
                raise ValueError(f"{folder / name}: names the shard {_short(shard)}; expected one in this folder")
            state.update(_read_shard(folder / shard, trust))
        return state
    raise FileNotFoundError(
        f"{folder}: has config.json but no weights; expected one of {list(WEIGHT_FILES)}, found "
        f"{sorted(entry.name for entry in folder.iterdir())[:10]}"
    )


def _read_shard(path: Path, trust: bool) -> State:
    if not path.exists():
        raise FileNotFoundError(f"{path}: this shard of the weights is missing; download the folder again")
    look_alike(path, "weights")
    if path.suffix == ".safetensors":
        return load_tensors(path)
    return tensors_of(load_torch_file(path, trust), path)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."
