"""Describes any file or folder that the importers read or skill-export writes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from skill_fairseq.checkpoints.load import read_source
from skill_fairseq.checkpoints.plain_files import parse_fields
from skill_fairseq.checkpoints.source import build_encoder, left_out, reading_config, reading_file
from skill_fairseq.exporting.onnx_graph import read_onnx_info
from skill_fairseq.exporting.torch_program import read_program_info
from skill_fairseq.modules.config import EncoderConfig, format_conv_layers
from skill_fairseq.modules.size import count_macs, count_parameters, widths_of
from skill_fairseq.modules.units import PrunableUnit, units_of


class Description(NamedTuple):
    """Facts about an encoder in a file.

    Attributes:
        format: the recognised kind of file, in words.
        types: dtypes of the stored numbers.
        config: the shape.
        provenance: its origin.
        assumed: choices made because the file leaves them open, in words.
        left_out: names of weights that the encoder does not need.
    """

    format: str
    types: list[str]
    config: EncoderConfig
    provenance: Mapping[str, Any]
    assumed: Sequence[str] = ()
    left_out: Sequence[str] = ()


def describe(path: Path, trust: bool = False) -> Description:
    """Recognises a file or folder by its content. Reads weights and checks them against the shape, except for graphs,
    which are trusted.

    Args:
        path: anything that :func:`skill_fairseq.load_encoder` reads or ``skill-export`` writes.
        trust: see :func:`skill_fairseq.load_encoder`.

    Raises:
        FileNotFoundError, ValueError: see ``load_encoder``; or a package to read ONNX is missing.
    """
    with reading_file(path):
        graph = _describe_graph(path) if path.is_file() else None
    if graph is not None:
        return graph
    source = read_source(path, trust)
    encoder = build_encoder(source, path)
    types = {str(tensor.dtype).replace("torch.", "") for tensor in source.state.values() if tensor.is_floating_point()}
    unused = left_out(source, encoder)
    return Description(source.format, sorted(types), encoder.config, source.provenance, source.assumed, unused)


def _describe_graph(path: Path) -> Description | None:
    text, format = read_program_info(path), "a torch.export program of skill-export"
    if text is None:
        with open(path, "rb") as file:
            if file.read(1) != b"\x08":  # ONNX files start with the format's version
                return None
        found = read_onnx_info(path)
        if found is None:
            return None
        text, format = found[0], f"an ONNX graph of skill-export, opset {found[1]}"
    info = parse_fields(text, path, "its description")
    with reading_config(path):
        config = EncoderConfig.from_dict(info["config"])
    provenance = info.get("provenance", {})
    if not isinstance(provenance, dict):
        raise ValueError(f"{path}: its provenance is {type(provenance).__name__}; expected named fields")
    precision = info.get("precision", "fp32")
    types = {"fp16": ["float16"], "int8": ["float32", "int8"]}.get(precision, ["float32"])
    return Description(format, types, config, provenance)


def as_dict(found: Description) -> dict[str, Any]:
    """Plain types, for JSON; ``shape`` has the fields of :class:`EncoderConfig`, with widths per layer."""
    config = found.config
    widths = widths_of(config)
    parameters, original = int(count_parameters(config, widths)), config.original_parameters
    return {
        "format": found.format,
        "types": found.types,
        "parameters": parameters,
        "original_parameters": original,
        "sparsity": 1 - parameters / original if original else None,
        "macs_per_second": int(count_macs(config, widths, config.sample_rate)),
        "gates": config.pruning_units,
        "normalize": config.normalize,
        "shape": config.to_dict(),
        "provenance": dict(found.provenance),
        "assumed": list(found.assumed),
        "left_out": list(found.left_out),
    }


def further_units(config: EncoderConfig) -> Iterator[tuple[PrunableUnit, str]]:
    """Kinds of units that only some encoders have, each with one line on what is left in all layers."""
    for unit in units_of(config):
        if unit.field is None:
            rows = (" ".join("-" if w is None else str(w) for w in row) for row in unit.by_row(unit.left(config)))
            yield unit, (", " if unit.per_row > 1 else " ").join(rows)


def as_rows(found: Description) -> Iterator[tuple[str, str]]:
    """The same as rows of a readable table."""
    config, facts = found.config, as_dict(found)
    assert config.conv_channels is not None and config.heads is not None and config.ffn_dims is not None
    yield "format", f"{found.format}, stored as {', '.join(found.types)}"
    sparsity = f" of {facts['original_parameters']:,} before pruning" if facts["original_parameters"] else ""
    yield "parameters", f"{facts['parameters']:,}{sparsity}"
    if facts["sparsity"] is not None:
        yield "sparsity", f"{100 * facts['sparsity']:.1f} %"
    yield "MACs", f"{facts['macs_per_second']:,} per second of audio"
    yield "convolutions", f"{format_conv_layers(config.conv_feature_layers)} originally"
    if config.mel_bins:
        yield "input", f"{config.mel_bins} log-mel features every 10 ms"
    yield "channels", " ".join(map(str, config.conv_channels))
    yield (
        "layers",
        f"{config.encoder_layers} of width {config.encoder_embed_dim}, originally with "
        f"{config.encoder_attention_heads} heads and {config.encoder_ffn_embed_dim} FFN units",
    )
    yield "heads", " ".join("-" if h is None else str(len(h)) for h in config.heads)
    yield "FFN units", " ".join("-" if f is None else str(f) for f in config.ffn_dims)
    yield from ((unit.name, cells) for unit, cells in further_units(config))
    if config.adapter_dim:
        how = f"{config.adapter_activation}, {config.adapter_form}"
        yield "adapters", f"{config.adapter_dim} features, {how}, beside each FFN"
    yield "LayerNorm", f"{'before' if config.layer_norm_first else 'after'} each sublayer"
    yield "extractor", config.extractor_mode
    yield "positions", f"{'relative and ' if config.relative_position else ''}convolutional"
    yield "waveforms", f"{config.sample_rate} Hz, {'normalised' if config.normalize else 'not normalised'}"
    if config.quantize != "none":
        yield "trained in", f"{config.quantize}: linear layers and convolutions round weights and inputs"
    yield "gates", ", ".join(config.pruning_units) or "none"
    yield "provenance", json.dumps(dict(found.provenance))
    yield from (("assumed", what) for what in found.assumed)
    if found.left_out:
        yield "left out", ", ".join(found.left_out)
