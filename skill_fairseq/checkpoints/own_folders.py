"""Folders that skill-export writes: for transformers, with code, and for s3prl."""

from __future__ import annotations

from pathlib import Path

from skill_fairseq.checkpoints.export import MASK_EMBEDDING, read_export
from skill_fairseq.checkpoints.plain_files import look_alike, read_fields
from skill_fairseq.checkpoints.safetensors_file import load_tensors
from skill_fairseq.checkpoints.source import EncoderSource, reading_config
from skill_fairseq.modules.config import EncoderConfig

OWN_TYPE = "skill_student"
OWN_PREFIX = "encoder."
PROVENANCE_FIELD = "skill_fairseq_provenance"
UPSTREAM = "skill_student"
"""Name of the s3prl upstream, and of the folder with its code."""


def is_own_folder(folder: Path) -> bool:
    """Whether skill-export wrote this Hugging Face folder."""
    config = folder / "config.json"
    return config.is_file() and read_fields(config).get("model_type") == OWN_TYPE


def is_s3prl_folder(folder: Path) -> bool:
    """Whether skill-export wrote this s3prl upstream."""
    return (folder / UPSTREAM).is_dir() and (folder / "model.safetensors").is_file()


def read_s3prl_folder(folder: Path) -> EncoderSource:
    """Reads an s3prl upstream of skill-export.

    Raises:
        ValueError: a file is damaged.
    """
    look_alike(folder / "model.safetensors", "weights")
    return read_export(folder / "model.safetensors")._replace(format="an s3prl upstream of skill-export")


def read_own_folder(folder: Path) -> EncoderSource:
    """Reads a Hugging Face folder of skill-export.

    Raises:
        ValueError: it is another folder, or a file is damaged.
        FileNotFoundError: a file is missing.
    """
    fields = read_fields(folder / "config.json")
    if fields.get("model_type") != OWN_TYPE:
        raise ValueError(f"{folder}: config.json has model_type {fields.get('model_type')!r}; expected {OWN_TYPE!r}")
    with reading_config(folder / "config.json"):
        config = EncoderConfig.from_dict(fields["encoder_shape"])
    look_alike(folder / "model.safetensors", "weights")
    return EncoderSource(
        "a Hugging Face folder of skill-export",
        config,
        load_tensors(folder / "model.safetensors"),
        lambda name: OWN_PREFIX + name,
        ignorable=(r"encoder\..*\.heads", r"encoder\.gates\.(fixed_widths|positions)"),  # buffers that follow the shape
        provenance=fields.get(PROVENANCE_FIELD, {}),
        mask_embedding=OWN_PREFIX + MASK_EMBEDDING,
    )
