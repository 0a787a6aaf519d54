"""Our own encoder format: one self-describing safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from skill_fairseq.checkpoints.plain_files import parse_fields
from skill_fairseq.checkpoints.safetensors_file import load_metadata, load_tensors
from skill_fairseq.checkpoints.source import EncoderSource, State, reading_config
from skill_fairseq.files import PathLike, write_file
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.fake_quantize import (
    BOUNDS,
    check_ranges,
    dequantize_weight,
    quantize_weight,
    quantized_modules,
    whole_weight,
)

FORMAT = "skill_fairseq.encoder"
FORMAT_VERSION = "1"
MASK_EMBEDDING = "mask_embedding"
INT8 = "int8"
"""A dtype of encoders that were trained in int8: what training rounds is stored in steps, a byte a weight."""
SCALE = "_scale"
"""Ending of the name of the steps' sizes, beside that of the weight."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def save_encoder(
    encoder: SpeechEncoder, path: PathLike, provenance: Mapping[str, Any] | None = None, dtype: str = "float32"
) -> None:
    """Writes the encoder's weights, shape and provenance atomically.

    Args:
        encoder: may have gates; they stay float32, so that any dtype keeps the same units.
        path: the file to write.
        provenance: the encoder's origin; anything that JSON can hold.
        dtype: type of the weights in the file, "float32", "float16", "bfloat16", or "int8" for an encoder trained in
            int8; they load back as float32.

    Raises:
        ValueError: the dtype is unknown or not that of the training, or a weight is out of its range.
    """
    if dtype == INT8 and encoder.config.quantize != INT8:
        raise ValueError(
            "dtype: 'int8'; the encoder was not trained in int8 (model.quantize): expected one of "
            f"{', '.join(DTYPES)}. An ONNX file may be int8 without: skill-export --to onnx --precision int8"
        )
    state = finite_state(encoder, "float32") if dtype == INT8 else finite_state(encoder, dtype)
    if encoder.mask_embedding is not None:
        state[MASK_EMBEDDING] = encoder.mask_embedding.detach().cpu().to(DTYPES.get(dtype, torch.float32))
    if dtype == INT8:
        check_ranges(encoder)
        _put_in_steps(encoder, state)
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": json.dumps(encoder.config.to_dict()),
        "provenance": json.dumps(dict(provenance or {})),
    }
    write_file(path, save(state, metadata))  # save_file would make it readable by its owner only


def finite_state(encoder: SpeechEncoder, dtype: str = "float32") -> State:
    """Copies of the encoder's weights for a file: on the CPU, in ``dtype`` except for gates and ranges.

    Raises:
        ValueError: the dtype is unknown, or a weight is out of its range.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r}; expected one of {list(DTYPES)}")
    state: State = {}
    for name, tensor in encoder.state_dict().items():
        stored = tensor if name.startswith("gates.") or name.endswith(BOUNDS) else tensor.to(DTYPES[dtype])
        if not torch.isfinite(stored).all():
            whole = bool(torch.isfinite(tensor).all())
            reason = f"values too large for {dtype}; use bfloat16" if whole else "infinite or NaN values"
            raise ValueError(f"the encoder's {name} has {reason}")
        state[name] = stored.detach().cpu().contiguous().clone()
    return state


def _put_in_steps(encoder: SpeechEncoder, state: State) -> None:
    """Changes a state dict to int8 steps and their sizes where the encoder computes in them."""
    for name, module in quantized_modules(encoder):
        own = next(f"{name}.{end}" for end in ("conv.weight", "weight_v", "weight") if f"{name}.{end}" in state)
        state.pop(f"{name}.weight_g", None)  # follows from the kernel
        state[own], state[own + SCALE] = (part.cpu().contiguous() for part in quantize_weight(whole_weight(module)))


def _from_steps(state: State) -> State:
    """The inverse, in float32."""
    found = {}
    for name, tensor in state.items():
        scale = state.get(name + SCALE)
        if tensor.dtype == torch.int8:
            if scale is None or scale.shape != tensor.shape[:1]:
                raise ValueError(f"{name} is in int8 steps; expected {name + SCALE} of shape {tuple(tensor.shape[:1])}")
            found[name] = dequantize_weight(tensor, scale)
            if name.endswith("weight_v"):
                norm = found[name].norm(dim=(0, 1), keepdim=True)
                found[name[:-1] + "g"] = norm
                found[name] = torch.where(norm > 0, found[name], torch.ones_like(found[name]))  # 0 / 0 would be NaN
        elif not (name.endswith(SCALE) and name[: -len(SCALE)] in state):
            found[name] = tensor
    return found


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
        fields = parse_fields(metadata["config"], path, "its config")
        provenance = parse_fields(metadata.get("provenance", "{}"), path, "its provenance")
        config = EncoderConfig.from_dict(fields)
    tensors = load_tensors(path)
    if config.quantize == INT8:  # elsewhere a tensor may be int8 for reasons of its own
        tensors = _from_steps(tensors)
    kind = "an exported encoder"
    return EncoderSource(kind, config, tensors, lambda name: name, provenance=provenance, mask_embedding=MASK_EMBEDDING)
