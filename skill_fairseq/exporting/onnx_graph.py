"""Exports an encoder to an ONNX graph, for onnxruntime and other ONNX runtimes."""

from __future__ import annotations

import ast
import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import torch

from skill_fairseq.exporting.traceable import INFO_NAME, describe_graph, record
from skill_fairseq.files import PathLike, write_file
from skill_fairseq.messages import require
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.fake_quantize import without_quantization

NEEDED = ("onnx", "onnxscript")
"""Packages needed to write a graph; torch.onnx would only complain about a missing onnxscript late and at length."""

OPSET = 18
"""ONNX operator set: torch.onnx writes it natively, and onnxruntime reads it since 1.14."""


def make_onnx(
    encoder: SpeechEncoder,
    padding_mask: bool = False,
    layers: Optional[Sequence[int]] = None,
    samples: Optional[int] = None,
) -> Any:
    """Builds a float32 ONNX model of operator set :data:`OPSET`, in which onnxruntime can fuse GELU, LayerNorm and
    matrix products, and whose weights are constants, as its quantisers need.

    Input ``source`` (batch, samples) float32, normalised if the encoder expects it. Outputs ``x`` (batch, frames, D)
    and ``hidden_state_0`` to ``hidden_state_L`` of the same shape. Batch size and length are free, from one frame (400
    samples). onnxruntime's ``quant_pre_process`` needs ``auto_merge=True``, as it cannot tell that two formulas for the
    number of frames are equal. Nodes are named after the encoder's modules.

    Args:
        encoder: without gates. Of a quantised one the graph rounds nothing, see
            :func:`skill_fairseq.exporting.onnx_trained.to_trained_int8`.
        padding_mask: add the input ``padding_mask`` (batch, samples) bool, True = padding, and the output
            ``frame_padding_mask`` (batch, frames) bool.
        layers: return only the ``hidden_state`` of these layers, and compute nothing beyond them; empty: only ``x``;
            None: all and ``x``.
        samples: fix the input to (1, samples); None: batch size and length stay free.

    Returns:
        an ``onnx.ModelProto``.

    Raises:
        ValueError: torch is too old, a package is missing, the encoder has gates or exceeds ONNX's 2 GB, or there are
            too few samples for a frame.
    """
    program = record(without_quantization(encoder), padding_mask, layers, samples)
    onnx = import_onnx()
    size = 4 * sum(parameter.numel() for parameter in encoder.parameters())
    if size > 1.9e9:
        raise ValueError(f"the encoder has {size / 1e9:.1f} GB of weights; an ONNX file can hold less than 2 GB")
    inputs = ["source", "padding_mask"][: 1 + padding_mask]
    outputs = output_names(encoder.config.encoder_layers, layers) + ["frame_padding_mask"] * padding_mask
    with _quietly():
        made = torch.onnx.export(
            program, (), input_names=inputs, output_names=outputs, opset_version=OPSET, dynamo=True, verbose=False
        )
    assert made is not None  # it is None only with dynamo=False
    model = made.model_proto
    if samples is None:
        _name_sizes(model.graph.input, ("batch", "samples"))
        _name_sizes(model.graph.output, ("batch", "frames"))
    model.graph.ClearField("value_info")  # it holds old names of these sizes
    _name_nodes(model)
    _forget_sources(model)
    arrange_gelu(model)
    onnx.checker.check_model(model)
    return model


def output_names(depth: int, layers: Optional[Sequence[int]] = None) -> list[str]:
    """Names of a graph's outputs except the mask, in order; see :func:`make_onnx`."""
    states = [f"hidden_state_{i}" for i in (range(depth + 1) if layers is None else layers)]
    return states if layers else ["x", *states]


def describe(model: Any, encoder: SpeechEncoder, provenance: Mapping[str, Any], **facts: Any) -> None:
    """Sets a model's properties.

    Args:
        model: a model from :func:`make_onnx`, possibly converted; changed in place.
        encoder: gives shape and sample rate.
        provenance: the encoder's origin.
        facts: facts about this file, see :func:`skill_fairseq.exporting.traceable.describe_graph`.
    """
    import_onnx().helper.set_model_props(
        model,
        {
            INFO_NAME: describe_graph(encoder, provenance, opset=OPSET, **facts),
            "sample_rate": str(encoder.config.sample_rate),
            "normalize": str(encoder.normalize).lower(),
            "downsampling": str(encoder.config.downsampling),
        },
    )


def save_onnx(
    encoder: SpeechEncoder, path: PathLike, provenance: Optional[Mapping[str, Any]] = None, padding_mask: bool = False
) -> None:
    """Writes the float32 graph of :func:`make_onnx` to one file.

    Args:
        encoder: without gates.
        path: the file to write, ending in ``.onnx``.
        provenance: the encoder's origin; kept in the file.
        padding_mask: see :func:`make_onnx`.

    Raises:
        ValueError: see :func:`make_onnx`.
    """
    model = make_onnx(encoder, padding_mask)
    describe(model, encoder, provenance or {})
    write_file(path, model.SerializeToString())


def arrange_gelu(model: Any) -> int:
    """Rewrites x * (0.5 * (1 + erf)), torch.onnx's GELU, to (x * (1 + erf)) * 0.5, which onnxruntime fuses.

    Returns:
        their number.
    """
    onnx = import_onnx()
    halves = {i.name for i in model.graph.initializer if not i.dims and onnx.numpy_helper.to_array(i) == 0.5}
    made = {output: node for node in model.graph.node for output in node.output}
    number = 0
    for outer in model.graph.node:
        inner = made.get(outer.input[1]) if outer.op_type == "Mul" else None
        if inner is None or inner.op_type != "Mul" or inner.input[0] not in halves:
            continue
        half, erf = inner.input
        if made[erf].op_type != "Add" or made[made[erf].input[0]].op_type != "Erf":
            continue
        inner.input[:] = [outer.input[0], erf]
        outer.input[:] = [inner.output[0], half]
        number += 1
    return number


def read_onnx_info(path: Path) -> tuple[str, int] | None:
    """The text of :func:`describe_graph` and the operator set; None if this is not such a file.

    Raises:
        ValueError: the package onnx is missing.
    """
    onnx = import_onnx()
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception:  # protobuf's own errors differ by version
        return None
    found = {entry.key: entry.value for entry in model.metadata_props}
    versions = [entry.version for entry in model.opset_import if not entry.domain]
    return (found[INFO_NAME], versions[0]) if INFO_NAME in found and versions else None


def _name_nodes(model: Any) -> None:
    """Names nodes after the modules that they compute, with a number."""
    for number, node in enumerate(model.graph.node):
        scopes = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes", "[]")
        modules = [scope for scope in ast.literal_eval(scopes) if scope.startswith("encoder.")]
        node.name = f"{modules[-1].removeprefix('encoder.') if modules else 'encoder'}/{node.op_type}_{number}"


def _forget_sources(model: Any) -> None:
    """Removes names of Python modules and paths of this machine from nodes and functions."""
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
    """Suppresses the exporter's log lines for every constant, rule and unneeded package."""
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


def import_onnx() -> Any:
    """Imports the package onnx.

    Raises:
        ValueError: it, or a package that torch needs with it, is missing.
    """
    require("ONNX", *NEEDED)
    import onnx

    return onnx
