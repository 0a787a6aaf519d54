"""Exports an encoder to a folder for transformers: a stock model if unpruned, else one with its own code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from safetensors.torch import save

from skill_fairseq.checkpoints import huggingface
from skill_fairseq.checkpoints.export import DTYPES, MASK_EMBEDDING, finite_state
from skill_fairseq.checkpoints.huggingface import ENCODER_NAMES
from skill_fairseq.checkpoints.own_folders import OWN_PREFIX, OWN_TYPE, PROVENANCE_FIELD
from skill_fairseq.checkpoints.source import ADDED_HERE, renaming
from skill_fairseq.exporting.bundle import bundle
from skill_fairseq.exporting.folder import atomic_folder
from skill_fairseq.exporting.model_card import model_card
from skill_fairseq.files import PathLike, write_json
from skill_fairseq.modules.encoder import SpeechEncoder

CLASSES = {
    "wavlm": "WavLMModel",
    "hubert": "HubertModel",
    "wav2vec2": "Wav2Vec2Model",
    "data2vec-audio": "Data2VecAudioModel",
}
"""transformers' stock models by model type."""

OWN_CODE = ("skill_fairseq.exporting.configuration_skill", "skill_fairseq.exporting.modeling_skill")
OWN_MODEL = "modeling_skill.py"

USAGE = """
import torch
from transformers import AutoFeatureExtractor, AutoModel

extractor = AutoFeatureExtractor.from_pretrained("FOLDER")
model = AutoModel.from_pretrained("FOLDER"{trust}).float().eval()
inputs = extractor([wave], sampling_rate={rate}, return_tensors="pt", padding=True)  # wave: (N,) floats
with torch.no_grad():
    features = model(**inputs, output_hidden_states=True)
"""


def save_huggingface(
    encoder: SpeechEncoder,
    folder: PathLike,
    provenance: Optional[Mapping[str, Any]] = None,
    dtype: str = "float32",
    notes: str = "",
) -> str:
    """Writes config, weights, feature extractor and model card, and for a pruned encoder also its code.

    A pruned encoder's folder loads with ``AutoModel.from_pretrained(folder, trust_remote_code=True)``. transformers'
    stock models derive padding from the convolutions' arithmetic, which in padded batches may give one frame less than
    other rules (see ``EncoderConfig.padding_rule``); a folder with its own code keeps the encoder's rule. To normalise
    waves, transformers' feature extractor adds 1e-7 to the variance, fairseq 1e-5: hidden states of quiet audio differ
    by about 1e-3, unless both get the same normalised wave.

    Args:
        encoder: an encoder; gates are exported too.
        folder: the folder to create.
        provenance: the encoder's origin, for the model card and config.json.
        dtype: dtype of the weights in the file, "float32", "float16" or "bfloat16".
        notes: Markdown for the end of the model card.

    Returns:
        name of the model's class.

    Raises:
        ValueError: the dtype is unknown, or a weight is out of its range.
        FileExistsError: the folder exists.
    """
    provenance = dict(provenance or {})
    state = finite_state(encoder, dtype)
    kind = stock_type(encoder, provenance)
    if kind is None:
        complete = {**dict(encoder.named_buffers()), **state}  # also non-persistent buffers, see SkillModel
        if encoder.mask_embedding is not None:
            complete[MASK_EMBEDDING] = encoder.mask_embedding.to(DTYPES[dtype])
        weights = {OWN_PREFIX + name: tensor for name, tensor in complete.items()}
        config = _own_config(encoder)
        code = _own_code()
    else:
        rename = renaming(ENCODER_NAMES)
        weights = {rename(name): tensor for name, tensor in state.items() if name not in ADDED_HERE}
        if encoder.mask_embedding is not None:
            weights[huggingface.MASK_EMBEDDING] = encoder.mask_embedding.to(DTYPES[dtype])
        config = _stock_config(encoder, kind)
        code = {}
    config.update(torch_dtype=dtype, **{PROVENANCE_FIELD: provenance})
    usage = USAGE.format(rate=encoder.config.sample_rate, trust=", trust_remote_code=True" if kind is None else "")
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    with atomic_folder(folder) as temporary:
        write_json(temporary / "config.json", config)
        write_json(temporary / "preprocessor_config.json", _feature_extractor(encoder))
        (temporary / "model.safetensors").write_bytes(save(weights, {"format": "pt"}))
        card = model_card(encoder, provenance, usage, "transformers", () if kind is None else (kind,), notes)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        for name, text in code.items():
            (temporary / name).write_text(text, encoding="utf-8")
    return "SkillModel" if kind is None else CLASSES[kind]


def stock_type(encoder: SpeechEncoder, provenance: Mapping[str, Any]) -> str | None:
    """transformers' model type that computes the same, or None for pruned or gated encoders."""
    config = encoder.config
    if not config.is_full() or config.pruning_units or bool((encoder.feature_extractor.scale != 1).any()):
        return None
    rare = config.time_reduction > 1 or config.reuse_attention or config.adapter_dim or config.mel_bins
    if rare or config.quantize != "none":
        return None
    if not config.feature_linear or not config.feature_layer_norm:
        plain = config.feature_linear and config.pos_conv_depth == 1 and not config.relative_position
        return "hubert" if plain else None
    if config.pos_conv_depth > 1:
        as_there = config.extractor_mode == "layer_norm" and not config.layer_norm_first and config.pos_conv_kernel % 2
        return "data2vec-audio" if as_there and not config.relative_position else None
    if config.relative_position:
        return "wavlm"
    return "wav2vec2" if "wav2vec2" in str(provenance.get("source_format")) else "hubert"


def _own_code() -> dict[str, str]:
    code = bundle(*OWN_CODE)
    # transformers 4.30 copies only files that the model's own file imports, not their imports in turn.
    others = [Path(file).stem for file in code if file != OWN_MODEL]
    code[OWN_MODEL] += "\n" + "".join(f"from .{name} import __doc__ as _  # copied too\n" for name in others)
    return code


def _own_config(encoder: SpeechEncoder) -> dict[str, Any]:
    classes = {"AutoConfig": "configuration_skill.SkillConfig", "AutoModel": "modeling_skill.SkillModel"}
    return {
        "model_type": OWN_TYPE,
        "architectures": ["SkillModel"],
        "auto_map": classes,
        "encoder_shape": encoder.config.to_dict(),
    }


def _stock_config(encoder: SpeechEncoder, kind: str) -> dict[str, Any]:
    """The inverse of :func:`skill_fairseq.checkpoints.huggingface.read_huggingface`'s reading of config.json."""
    config = encoder.config
    conv = config.conv_feature_layers
    fields = {
        "model_type": kind,
        "architectures": [CLASSES[kind]],
        "conv_dim": [channels for channels, _, _ in conv],
        "conv_kernel": [kernel for _, kernel, _ in conv],
        "conv_stride": [stride for _, _, stride in conv],
        "num_feat_extract_layers": len(conv),
        "conv_bias": config.conv_bias,
        "feat_extract_norm": {"default": "group", "layer_norm": "layer"}[config.extractor_mode],
        "num_hidden_layers": config.encoder_layers,
        "hidden_size": config.encoder_embed_dim,
        "intermediate_size": config.encoder_ffn_embed_dim,
        "num_attention_heads": config.encoder_attention_heads,
        "hidden_act": config.activation_fn,
        "do_stable_layer_norm": config.layer_norm_first,
        "num_conv_pos_embeddings": config.conv_pos,
        "num_conv_pos_embedding_groups": config.conv_pos_groups,
        "mask_time_prob": 0.0,
        "mask_feature_prob": 0.0,
    }
    if encoder.mask_embedding is not None:
        # Their models have one only if the masking probability is above 0; masking itself stays off.
        fields.update(mask_time_prob=0.05, apply_spec_augment=False)
    if kind == "hubert":
        fields.update(feat_proj_layer_norm=config.feature_layer_norm)
    if kind == "wavlm":
        fields.update(num_buckets=config.num_buckets, max_bucket_distance=config.max_distance)
    if kind == "data2vec-audio":
        fields.update(num_conv_pos_embeddings=config.pos_conv_depth, conv_pos_kernel_size=config.pos_conv_kernel)
    return fields


def _feature_extractor(encoder: SpeechEncoder) -> dict[str, Any]:
    return {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": encoder.config.sample_rate,
        "do_normalize": encoder.normalize,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
    }
