"""Our own encoder format: one self-describing safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from skill_fairseq.checkpoints.plain_files import parse_json
from skill_fairseq.checkpoints.safetensors_file import load_metadata, load_tensors
from skill_fairseq.checkpoints.source import EncoderSource, State, reading_config
from skill_fairseq.files import PathLike, write_file
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.encoder import SpeechEncoder

FORMAT = "skill_fairseq.encoder"
FORMAT_VERSION = "1"
MASK_EMBEDDING = "mask_embedding"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def save_encoder(
    encoder: SpeechEncoder, path: PathLike, provenance: Mapping[str, Any] | None = None, dtype: str = "float32"
) -> None:
    """Writes the encoder's weights, shape and provenance atomically.

    Args:
        encoder: may have gates; they stay float32, so that any dtype keeps the same units.
        path: the file to write.
        provenance: the encoder's origin; anything that JSON can hold.
        dtype: type of the weights in the file, "float32", "float16" or "bfloat16"; they load back as float32.

    Raises:
        ValueError: the dtype is unknown, or a weight is out of its range.
    """
    state = finite_state(encoder, dtype)
    if encoder.mask_embedding is not None:
        state[MASK_EMBEDDING] = encoder.mask_embedding.detach().cpu().to(DTYPES[dtype])
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": json.dumps(encoder.config.to_dict()),
        "provenance": json.dumps(dict(provenance or {})),
    }
    write_file(path, save(state, metadata))  # save_file would make it readable by its owner only


def finite_state(encoder: SpeechEncoder, dtype: str = "float32") -> State:
    """Copies of the encoder's weights for a file: on the CPU, in ``dtype`` except for the gates.

    Raises:
        ValueError: the dtype is unknown, or a weight is out of its range.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r}; expected one of {list(DTYPES)}")
    state: State = {}
    for name, tensor in encoder.state_dict().items():
        stored = tensor if name.startswith("gates.") else tensor.to(DTYPES[dtype])
        if not torch.isfinite(stored).all():
            whole = bool(torch.isfinite(tensor).all())
            reason = f"values too large for {dtype}; use bfloat16" if whole else "infinite or NaN values"
            raise ValueError(f"the encoder's {name} has {reason}")
        state[name] = stored.detach().cpu().contiguous().clone()
    return state


def read_export(path: Path) -> EncoderSource:
    """Reads an encoder from a file of :func:`save_encoder`.

    Raises:
        ValueError: it is another safetensors file, or of a later version.
    """
    metadata = load_metadata(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path}: recognised as a safetensors file, but its metadata {dict(list(metadata.items())[:3])} "
            f"is not that of an exported encoder (format = {FORMAT!r}); for a Hugging Face model give its "
            "folder, which also holds config.json"
        )
    if metadata.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: has format_version {metadata.get('format_version')!r}; this version of skill_fairseq "
            f"reads {FORMAT_VERSION!r}: upgrade skill_fairseq"
        )
    with reading_config(path):
        fields = parse_json(metadata["config"], path, "its config")
        provenance = parse_json(metadata.get("provenance", "{}"), path, "its provenance")
        config = EncoderConfig.from_dict(fields)
    tensors = load_tensors(path)
    kind = "an exported encoder"
    return EncoderSource(kind, config, tensors, lambda name: name, provenance=provenance, mask_embedding=MASK_EMBEDDING)
