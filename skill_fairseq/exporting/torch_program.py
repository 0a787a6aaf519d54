"""Exports an encoder to a ``torch.export`` program: a graph that runs in any torch, without this package."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from skill_fairseq.checkpoints.plain_files import MAX_JSON
from skill_fairseq.exporting.traceable import INFO_NAME, describe_graph, record
from skill_fairseq.files import PathLike, write_file
from skill_fairseq.modules.encoder import SpeechEncoder


def save_torch_program(
    encoder: SpeechEncoder, path: PathLike, provenance: Optional[Mapping[str, Any]] = None, padding_mask: bool = False
) -> None:
    """Writes a program that ``torch.export.load`` reads.

    ``torch.export.load(path).module()(source)`` gives a dictionary: ``x`` (B, T, D) and ``hidden_states``, L + 1
    tensors (B, T, D). Any batch size works, and any length of at least two frames (720 samples for published models),
    because torch.export fixes dimensions of size 1.

    Args:
        encoder: without gates.
        path: the file to write, ending in ``.pt2``.
        provenance: the encoder's origin; kept in the file.
        padding_mask: add a second input (B, N) bool, True = padding, and the padding of the frames (B, T) as the
            output ``padding_mask``.

    Raises:
        ValueError: torch is too old, or the encoder has gates.
    """
    program = record(encoder, padding_mask)
    content = io.BytesIO()  # torch's own file writer only reports "a file write failed" for a full disk
    torch.export.save(program, content, extra_files={INFO_NAME: describe_graph(encoder, provenance or {})})
    write_file(path, content.getbuffer())


def run_program(path: PathLike) -> Callable[[Tensor], dict[str, Tensor]]:
    """Runs a program of :func:`save_torch_program` without padding, with the names of an ONNX graph's outputs."""
    program = torch.export.load(str(path))
    module, masked = program.module(), len(program.graph_signature.user_inputs) > 1

    def run(source: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            found = module(source, *[torch.zeros_like(source, dtype=torch.bool)] * masked)
        return {"x": found["x"], **{f"hidden_state_{i}": state for i, state in enumerate(found["hidden_states"])}}

    return run


def read_program_info(path: Path) -> str | None:
    """The text of :func:`describe_graph`, without loading the program; None if this is not such a file.

    Raises:
        ValueError: the text is too long.
        Exception: others too, if the file is damaged.
    """
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        found = [member for member in archive.infolist() if member.filename.rpartition("/")[2] == INFO_NAME]
        if not found:
            return None
        if found[0].file_size > MAX_JSON:
            raise ValueError(f"{path}: its {INFO_NAME} has {found[0].file_size:,} bytes; expected at most {MAX_JSON:,}")
        return archive.read(found[0]).decode()
