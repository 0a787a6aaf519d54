"""fairseq checkpoints of HuBERT, wav2vec 2.0, data2vec-audio and this package's models, also fine-tuned; and files that
keep fairseq's names: Microsoft's WavLM and s3prl's conversions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from skill_fairseq.checkpoints.safe_load import plain
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

_LAYER = r"transformer\.layers\.(\d+)\."

ENCODER_NAMES: Rules = (
    (r"feature_extractor\.layers\.(\d+)\.conv\.", r"feature_extractor.conv_layers.\1.0."),
    (r"feature_extractor\.layers\.(\d+)\.norm\.", r"feature_extractor.conv_layers.\1.2."),
    (r"feature_projection\.norm\.", "layer_norm."),
    (r"feature_projection\.linear\.", "post_extract_proj."),
    (r"transformer\.pos_conv\.layers\.(\d+)\.", r"encoder.pos_conv.\1.0."),
    (r"transformer\.pos_conv\.", "encoder.pos_conv.0."),
    (r"transformer\.relative_position\.", "encoder.layers.0.self_attn.relative_attention_bias."),
    (_LAYER + r"attention_norm\.", r"encoder.layers.\1.self_attn_layer_norm."),
    (_LAYER + r"ffn_norm\.", r"encoder.layers.\1.final_layer_norm."),
    (_LAYER + r"attention\.position_gate\.", r"encoder.layers.\1.self_attn."),
    (_LAYER + r"attention\.", r"encoder.layers.\1.self_attn."),
    (_LAYER + r"ffn\.", r"encoder.layers.\1."),
    (r"transformer\.", "encoder."),
)
"""From our names to those of fairseq and of Microsoft's WavLM."""

LAYER_NORM_EXTRACTOR: Rules = ((r"feature_extractor\.layers\.(\d+)\.norm\.", r"feature_extractor.conv_layers.\1.2.1."),)
"""Applied first if the extractor normalises every layer, where the norm is between two transpositions."""

MASK_EMBEDDING = "mask_emb"

PRETRAINING = (
    MASK_EMBEDDING,  # our students have one even if it was never trained
    r"final_proj\..*",
    r"label_embs_concat",
    r"target_glu\..*",
    r"quantizer\..*",
    r"project_q\..*",
)
"""Prediction heads that only pre-training uses."""

MODELS = ("hubert", "wav2vec2", "data2vec_audio")

FINE_TUNED = "w2v_encoder.w2v_model."
"""Prefix of the pre-trained model in ``hubert_ctc`` and ``wav2vec_ctc``."""

CTC_HEAD = (r"w2v_encoder\.proj\..*",)

OWN = "speech_encoder."
"""Prefix of the encoder in our fairseq models."""

S3PRL_KEYS = ("task_cfg", "model_cfg", "model_weight")
"""Keys of s3prl's conversions; HuBERT's also have ``dictionaries_symbols``."""

SUPPORTED = {
    "layer_type": "transformer",
    "conv_pos_batch_norm": False,
    "quantize_input": False,
    "crop_seq_to_multiple": 1,
}


def split_config(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's and the task's config of a fairseq checkpoint, old or new style.

    Returns:
        plain dictionaries; the same one twice if the checkpoint has ``args`` (fairseq before 0.10).
    """
    cfg = plain(checkpoint.get("cfg")) or {}
    if cfg.get("model") is not None:
        return cfg["model"], cfg.get("task") or {}
    args = plain(checkpoint["args"])
    return args, args


def model_name(fields: Mapping[str, Any]) -> str:
    """The model's registered name in fairseq, or "" if the config does not give it."""
    return str(fields.get("_name") or fields.get("arch") or "")


def read_fairseq(checkpoint: Mapping[str, Any], path: Path) -> EncoderSource:
    """Reads a fairseq checkpoint, pre-trained or fine-tuned by ``hubert_ctc`` or ``wav2vec_ctc``.

    Raises:
        ValueError: it is another model, or needs a feature that this encoder lacks.
    """
    fields, task = split_config(checkpoint)
    state = model_state(checkpoint["model"], path)
    format = f"a fairseq checkpoint of model {model_name(fields)!r}"
    if any(name.startswith(FINE_TUNED) for name in state):
        outer, outer_task = fields, task
        fields, task = _pretraining_config(outer, path)
        task = {**task, "normalize": _flag(task.get("normalize"), outer_task.get("normalize"))}
        state = {name[len(FINE_TUNED) :] if name.startswith(FINE_TUNED) else name: w for name, w in state.items()}
        format = f"a fairseq checkpoint of model {model_name(outer)!r}, fine-tuned from {model_name(fields)!r}"
    source = encoder_source(format, fields, task, state, path, _progress(checkpoint))
    trained = model_name(fields) != "skill_student" or _has_masked(checkpoint)
    return source if trained else source._replace(mask_embedding="")


def _has_masked(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a student's mask embedding was trained, by an objective that masks or in fine-tuning."""
    cfg = plain(checkpoint.get("cfg")) or {}
    model = cfg.get("model") or {}
    runs = [cfg, model.get("w2v_args") or {}]
    objectives = [o for run in runs for o in ((run.get("criterion") or {}).get("objectives") or {}).values()]
    return bool(model.get("apply_mask")) or any(objective.get("mask_prob") for objective in objectives)


def _pretraining_config(fields: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's and the task's config of the model that was fine-tuned."""
    inner = fields.get("w2v_args")
    if not inner:
        raise ValueError(
            f"{path}: recognised as a fairseq checkpoint of model {model_name(fields)!r}, but its cfg.model.w2v_args, "
            "which should hold the pre-trained model's config, is empty; fine-tune with task._name=audio_finetuning, "
            f"which stores it, or give the file it was fine-tuned from ({fields.get('w2v_path')})"
        )
    return split_config({"cfg": inner} if inner.get("model") is not None else {"args": inner})


def model_state(state: Any, path: Path) -> State:
    """A fairseq model's weights, without data2vec's moving average of itself (``_ema``).

    Raises:
        ValueError: it is not a state dict.
    """
    if isinstance(state, Mapping):
        state = {name: tensor for name, tensor in state.items() if name != "_ema"}
    return {weight_norm_spelling(name): tensor for name, tensor in tensors_of(state, path).items()}


def encoder_source(
    format: str,
    fields: Mapping[str, Any],
    task: Mapping[str, Any],
    state: State,
    path: Path,
    provenance: Mapping[str, Any],
) -> EncoderSource:
    """The encoder of a pre-trained model of fairseq or this package.

    Args:
        format: the file's kind, in words.
        fields: the model's config, plain values.
        task: the task's config.
        state: the model's weights.
        path: the file, for errors.
        provenance: see :class:`EncoderSource`.

    Raises:
        ValueError: it is another model, or needs a feature that this encoder lacks.
    """
    name = model_name(fields)
    said = [value for value in (fields.get("normalize"), task.get("normalize")) if isinstance(value, bool)]
    rate = fields.get("sample_rate") or task.get("sample_rate")
    unsaid = {"waveforms not normalised": not said, "waveforms at 16000 Hz": not rate}
    assumed = tuple(f"{what}: assumed; the file's config does not say" for what, is_so in unsaid.items() if is_so)
    fields = {**fields, "normalize": _flag(*said), "sample_rate": rate}
    if any(key.startswith(OWN) for key in state):
        with reading_config(path):
            config = EncoderConfig.from_fairseq(fields)
        return EncoderSource(
            f"{format} (this package's)",
            config,
            state,
            lambda own: OWN + own,
            PRETRAINING + CTC_HEAD,
            provenance=provenance,
            assumed=assumed,
            mask_embedding=MASK_EMBEDDING,
        )
    if name not in MODELS:
        raise ValueError(
            f"{path}: recognised as {format}, which is not supported; expected one of {list(MODELS)} or 'wavlm' or "
            "'skill_student' of this package, pre-trained or fine-tuned by hubert_ctc or wav2vec_ctc; its weights "
            f"begin with {list(state)[:3]}"
        )
    refuse(path, fields, SUPPORTED)
    # fairseq's HuBERT cuts the samples into chunks; the others count frames like the convolutions.
    fields["padding_rule"] = "chunks" if name == "hubert" else "convolution"
    with reading_config(path):
        config = EncoderConfig.from_fairseq(fields)
    return EncoderSource(
        format,
        config,
        with_projection(state, config),
        encoder_names(config),
        PRETRAINING + CTC_HEAD,
        ADDED_HERE,
        provenance,
        assumed,
        MASK_EMBEDDING,
    )


def read_microsoft(checkpoint: Mapping[str, Any], path: Path) -> EncoderSource:
    """Reads Microsoft's WavLM files, such as ``WavLM-Base+.pt``.

    Raises:
        ValueError: it needs a feature that this encoder lacks.
    """
    fields = plain(checkpoint["cfg"])
    relative = bool(fields.get("relative_position_embedding", False))
    refuse(path, fields, {"gru_rel_pos": relative})  # their bias is gated, or absent
    # 1280 is their default for files without the field; published files have 800.
    assumed = ("relative positions up to 1280 frames: assumed, as in Microsoft's code; not in the file",)
    known = not relative or "max_distance" in fields
    fields = {"max_distance": 1280, **fields, "relative_position": relative, "padding_rule": "chunks"}
    with reading_config(path):
        config = EncoderConfig.from_fairseq(fields)
    return EncoderSource(
        "Microsoft's WavLM",
        config,
        with_projection(tensors_of(checkpoint["model"], path), config),
        encoder_names(config),
        PRETRAINING,
        ADDED_HERE,
        assumed=() if known else assumed,
        mask_embedding=MASK_EMBEDDING,
    )


def read_s3prl(checkpoint: Mapping[str, Any], path: Path) -> EncoderSource:
    """Reads s3prl's conversions (``s3prl/upstream/*/convert.py``) of HuBERT, wav2vec 2.0 or data2vec.

    Config fields and weights keep fairseq's names. Its WavLM files are Microsoft's own.

    Raises:
        ValueError: it is another model, or needs a feature that this encoder lacks.
    """
    fields, task = plain(checkpoint["model_cfg"]), plain(checkpoint["task_cfg"])
    name = model_name(fields) or _guess(checkpoint, fields)
    state = model_state(checkpoint["model_weight"], path)
    source = encoder_source(f"s3prl's conversion of {name!r}", {**fields, "_name": name}, task, state, path, {})
    if model_name(fields):
        return source
    guess = f"a model of kind {name!r}: assumed from the file's other parts; not in its config"
    return source._replace(assumed=(guess, *source.assumed))


def _guess(checkpoint: Mapping[str, Any], fields: Mapping[str, Any]) -> str:
    """Guesses a model that the config does not name: HuBERT has dictionaries, data2vec several convolutions."""
    if "dictionaries_symbols" in checkpoint:
        return "hubert"
    return "data2vec_audio" if fields.get("pos_conv_depth", 1) > 1 else "wav2vec2"


def encoder_names(config: EncoderConfig) -> Callable[[str], str]:
    """A function from our names to fairseq's, for an encoder of this shape."""
    return renaming((LAYER_NORM_EXTRACTOR if config.extractor_mode == "layer_norm" else ()) + ENCODER_NAMES)


def with_projection(state: State, config: EncoderConfig) -> State:
    """Adds an identity projection, which fairseq omits if the conv features have the model's width."""
    width = config.conv_feature_layers[-1][0]
    absent = width == config.encoder_embed_dim and not any(key.startswith("post_extract_proj.") for key in state)
    if absent and width**2 < sum(tensor.numel() for tensor in state.values()):  # otherwise much more is missing
        state["post_extract_proj.weight"] = torch.eye(width)
        state["post_extract_proj.bias"] = torch.zeros(width)
    return state


def _flag(*candidates: Any) -> bool:
    """The first value that is a bool; others are unset or unresolved interpolations."""
    return next((value for value in candidates if isinstance(value, bool)), False)


def _without_folders(value: Any) -> Any:
    """Settings, with file names instead of paths."""
    if isinstance(value, Mapping):
        return {name: _without_folders(part) for name, part in value.items()}
    return Path(value).name if isinstance(value, str) else value


def _progress(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The state of training, and a distilled student's target."""
    history = checkpoint.get("optimizer_history")
    last = history[-1] if isinstance(history, (list, tuple)) and history else {}
    updates = last.get("num_updates") if isinstance(last, Mapping) else None
    found = {"num_updates": updates} if isinstance(updates, int) else {}
    cfg = plain(checkpoint.get("cfg")) or {}
    criterion, task = cfg.get("criterion") or {}, cfg.get("task") or {}
    kept = {name: criterion.get(name) for name in ("groups", "target_sparsity", "target", "elastic")}
    kept["objectives"] = _without_folders(criterion.get("objectives"))
    if criterion.get("cost") != "parameters" and not kept["target"]:
        kept.update({name: value for name, value in criterion.items() if name == "cost" or name.startswith("cost_")})
    # Without folders: they are private, and valid on one machine only.
    for name in ("teacher", "data"):
        paths = task.get(name) or []
        files = [Path(str(path)).name for path in (paths if isinstance(paths, list) else [paths])]
        if files:
            kept[name] = files[0] if len(files) == 1 else files
    return {**found, **{name: value for name, value in kept.items() if value is not None}}
