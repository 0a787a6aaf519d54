"""An encoder as an ONNX graph, for onnxruntime and whatever else reads ONNX."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Optional

import torch

from skill_fairseq.exporting.traceable import INFO_NAME, describe_graph, record
from skill_fairseq.files import PathLike, write_file
from skill_fairseq.messages import require
from skill_fairseq.modules.encoder import SpeechEncoder

NEEDED = ("onnx", "onnxscript")
"""What it takes to write a graph: torch.onnx asks for onnxscript, too late and at length."""

OPSET = 18
"""Version of ONNX's operators: the one that torch.onnx writes natively; onnxruntime reads it since 1.14."""


def save_onnx(
    encoder: SpeechEncoder, path: PathLike, provenance: Optional[Mapping[str, Any]] = None, padding_mask: bool = False
) -> None:
    """Writes one ONNX file of operator set :data:`OPSET`, weights included.

    Input ``source`` (batch, samples) float32. Outputs ``x`` (batch, frames, D) and ``hidden_state_0`` to
    ``hidden_state_L`` of the same shape. Batch size and length are free, from one frame (400 samples) on. onnxruntime's
    ``quantize_dynamic`` takes the file as it is; its ``quant_pre_process`` wants ``auto_merge=True``, as it cannot tell
    that two formulas for the number of frames are one.

    Args:
        encoder: without gates.
        path: the file to write, ending in ``.onnx``.
        provenance: where the encoder comes from; kept in the file.
        padding_mask: add the input ``padding_mask`` (batch, samples) bool, True = padding, and the output
            ``frame_padding_mask`` (batch, frames) bool.

    Raises:
        ValueError: torch is too old, a package is missing, the encoder has gates or is beyond ONNX's 2 GB.
    """
    program = record(encoder, padding_mask)
    onnx = _import_onnx()
    size = 4 * sum(parameter.numel() for parameter in encoder.parameters())
    if size > 1.9e9:
        raise ValueError(f"the encoder has {size / 1e9:.1f} GB of weights; an ONNX file holds less than 2 GB")
    inputs = ["source", "padding_mask"][: 1 + padding_mask]
    states = [f"hidden_state_{i}" for i in range(encoder.config.encoder_layers + 1)]
    outputs = ["x", *states, "frame_padding_mask"][: len(states) + 1 + padding_mask]
    with _quietly():
        made = torch.onnx.export(
            program, (), input_names=inputs, output_names=outputs, opset_version=OPSET, dynamo=True, verbose=False
        )
    assert made is not None  # it is with dynamo=False alone
    model = made.model_proto
    _name_sizes(model.graph.input, ("batch", "samples"))
    _name_sizes(model.graph.output, ("batch", "frames"))
    model.graph.ClearField("value_info")  # it repeats the old names of these sizes
    _forget_sources(model)
    onnx.helper.set_model_props(
        model,
        {
            INFO_NAME: describe_graph(encoder, provenance or {}),
            "sample_rate": str(encoder.config.sample_rate),
            "normalize": str(encoder.normalize).lower(),
            "downsampling": str(encoder.config.downsampling),
        },
    )
    onnx.checker.check_model(model)
    write_file(path, model.SerializeToString())


def read_onnx_info(path: Path) -> tuple[str, int] | None:
    """What :func:`describe_graph` wrote and the operator set; None if this is no such file.

    Raises:
        ValueError: the package onnx is missing.
    """
    onnx = _import_onnx()
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception:  # protobuf has its own kinds of errors, by version
        return None
    found = {entry.key: entry.value for entry in model.metadata_props}
    versions = [entry.version for entry in model.opset_import if not entry.domain]
    return (found[INFO_NAME], versions[0]) if INFO_NAME in found and versions else None


def _forget_sources(model: Any) -> None:
    """Nodes and functions carry the names of Python's modules and the paths of this machine: they stay here."""
    for graph in (model.graph, *model.functions):
        for part in (graph, *graph.node, *getattr(graph, "initializer", ())):
            part.ClearField("metadata_props")
            part.ClearField("doc_string")


def _name_sizes(values: Any, names: tuple[str, ...]) -> None:
    for value in values:
        for size, name in zip(value.type.tensor_type.shape.dim, names):
            size.dim_param = name


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the line that the exporter logs for every constant, every rule and every package it does not need."""
    loggers = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _import_onnx() -> Any:
    require("ONNX", *NEEDED)
    import onnx

    return onnx
