"""Loads an encoder from any supported file, recognised by content, never by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from skill_fairseq.checkpoints.export import read_export
from skill_fairseq.checkpoints.fairseq_import import S3PRL_KEYS, read_fairseq, read_microsoft, read_s3prl
from skill_fairseq.checkpoints.hub import local_copy
from skill_fairseq.checkpoints.huggingface import read_huggingface
from skill_fairseq.checkpoints.own_folders import is_own_folder, is_s3prl_folder, read_own_folder, read_s3prl_folder
from skill_fairseq.checkpoints.plain_files import look_alike, looks_like_safetensors
from skill_fairseq.checkpoints.safe_load import load_torch_file, plain
from skill_fairseq.checkpoints.source import EncoderSource, build_encoder, reading_file
from skill_fairseq.checkpoints.torchaudio_import import is_torchaudio, read_torchaudio
from skill_fairseq.files import PathLike
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.low_precision import lower

EXPECTED = (
    "a Microsoft WavLM file, a fairseq checkpoint of hubert, wav2vec2, data2vec_audio, wavlm or skill_student (also "
    "fine-tuned by hubert_ctc or wav2vec_ctc), a Hugging Face folder of WavLM, HuBERT, wav2vec 2.0 or data2vec-audio, "
    "an s3prl conversion, a TorchAudio state dict, a DPHuBERT model, or a file of skill-export"
)


def load_encoder(
    path: PathLike, device: str | torch.device = "cpu", trust: bool = False, precision: str = "fp32"
) -> SpeechEncoder:
    """Loads an encoder from any supported file.

    For every format, every weight is accounted for, and the encoder computes what the original computes for each batch,
    including the effect of padding. If all of the following hold, a padded utterance has the features of the
    unpadded one, to 1e-4; otherwise batch utterances of equal length
    (:func:`skill_fairseq.audio.batching.length_exact_batches`) to keep features independent of the batch:

    - ``config.extractor_mode`` is "layer_norm" (Large): "default" (Base) normalises over time, padding included;
    - ``config.padding_rule`` is "convolution" (transformers, TorchAudio, wav2vec 2.0, data2vec): "chunks" (Microsoft,
      fairseq's HuBERT) may count one frame more than the unpadded utterance has;
    - ``config.pos_conv_depth`` is 1: in data2vec's stack of convolutions, padding affects the last frames.

    Args:
        path: Microsoft's WavLM ``.pt``; a Hugging Face folder of WavLM, HuBERT, wav2vec 2.0 or data2vec-audio; a
            fairseq checkpoint of HuBERT, wav2vec 2.0, data2vec-audio or this package's models, also fine-tuned by
            ``hubert_ctc`` or ``wav2vec_ctc``; a conversion by s3prl; a TorchAudio state dict; DPHuBERT's
            ``{"state_dict", "config"}``; a file of ``skill-export``; or ``hf://user/repo[@revision]``, see
            :mod:`skill_fairseq.checkpoints.hub`.
        device: the encoder's device.
        trust: also read files with pickled classes that are not known to be harmless; this runs their code.
        precision: precision of linear maps and convolutions on a CPU: "fp32", or for inference only "bf16" or "int8";
            all else stays float32. Warns if the processor gains no speed from it.

    Returns:
        the encoder in float32 and eval mode, with trainable parameters.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: the file is truncated, unknown or unsupported; says what was recognised and expected. Or the
            precision is not available: on a GPU, with gates, or in this torch.
    """
    path = local_copy(path)
    source = read_source(path, trust)
    return lower(build_encoder(source, Path(path)).to(device).eval(), precision)


def read_source(path: PathLike, trust: bool = False) -> EncoderSource:
    """Recognises a file or folder and reads shape and weights, without building the encoder.

    Raises:
        see :func:`load_encoder`.
    """
    path = local_copy(path)
    with reading_file(path):
        source = _read_source(path, trust)
        _check_provenance(source.provenance)
    return source


def _read_source(path: Path, trust: bool) -> EncoderSource:
    if path.is_dir():
        if is_own_folder(path):
            return read_own_folder(path)
        if is_s3prl_folder(path):
            return read_s3prl_folder(path)
        if (path / "config.json").exists():
            return read_huggingface(path, trust)
        found = sorted(entry.name for entry in path.iterdir())[:10]
        raise ValueError(
            f"{path}: is a folder without config.json (it holds {found}); a folder must be a Hugging Face "
            "model, otherwise name the file itself"
        )
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; expected {EXPECTED}, on this machine")
    look_alike(path, EXPECTED)
    with open(path, "rb") as file:
        head = file.read(64)
    if looks_like_safetensors(head):
        return read_export(path)
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return _read_checkpoint(load_torch_file(path, trust), path)
    raise ValueError(f"{path}: is not a checkpoint (it begins with {head[:8]!r}); expected {EXPECTED}")


def _check_provenance(provenance: Any) -> None:
    """Raises an error unless every file format can hold the provenance."""
    if not isinstance(provenance, Mapping):
        raise ValueError(f"its provenance is {type(provenance).__name__}; expected named fields")
    json.dumps(dict(provenance), allow_nan=False)


def _read_checkpoint(checkpoint: Any, path: Path) -> EncoderSource:
    """Distinguishes kinds of torch files by their keys."""
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: holds an object of type {type(checkpoint).__name__}; expected {EXPECTED}")
    if "model" in checkpoint:
        cfg = plain(checkpoint.get("cfg"))
        if isinstance(cfg, dict) and cfg.get("model") is not None or checkpoint.get("args") is not None:
            return read_fairseq(checkpoint, path)
        if isinstance(cfg, dict) and "encoder_layers" in cfg:
            return read_microsoft(checkpoint, path)
    if all(key in checkpoint for key in S3PRL_KEYS):
        return read_s3prl(checkpoint, path)
    if is_torchaudio(checkpoint):
        return read_torchaudio(checkpoint, path)
    raise ValueError(
        f"{path}: recognised as a torch file with the keys {list(checkpoint)[:5]}{_hint(checkpoint)}; "
        f"expected {EXPECTED}"
    )


def _hint(checkpoint: Any) -> str:
    """A guess at what an unknown dictionary is."""
    if checkpoint and all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        return ", a bare state dict without a config (for a Hugging Face model give its folder)"
    return ""
