"""Writes a model card (README.md of a published model) from the known facts about an encoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from skill_fairseq.exporting.describe import further_units
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.size import count_parameters, widths_of
from skill_fairseq.text_tables import markdown

PROVENANCE = {
    "source": "exported from",
    "source_format": "which is",
    "source_sha256": "its SHA-256",
    "teacher": "teacher",
    "data": "training data",
    "groups": "groups of teacher layers",
    "objectives": "trained for",
    "target_sparsity": "target sparsity",
    "num_updates": "updates",
    "exported_by": "exported by",
}
"""Labels of provenance entries; others are listed by name."""

TERMS = (
    "Licence: the terms of the teacher's weights, and of the data that it and this model were trained on, also apply "
    "to this model. Look them up before you share it, and name the licence here."
)


def model_card(
    encoder: SpeechEncoder,
    provenance: Mapping[str, Any],
    usage: str,
    library: str,
    tags: tuple[str, ...] = (),
    notes: str = "",
) -> str:
    """The card as Markdown, with the header that the Hugging Face hub reads.

    Args:
        encoder: gives size and shape.
        provenance: its origin; the card omits what is not in it.
        usage: Python code that loads the model.
        library: the library that loads it, "transformers" or "s3prl".
        tags: further tags for the hub's index.
        notes: Markdown for the end of the card.
    """
    header = [
        "---",
        f"library_name: {library}",
        "pipeline_tag: feature-extraction",
        "tags:",
        *(f"- {tag}" for tag in ("speech", "skill_fairseq", *tags)),
        "---",
    ]
    config = encoder.config
    stock = library == "transformers" and bool(tags)  # transformers' own model
    wave = "normalised to zero mean and unit variance" if encoder.normalize else "not normalised"
    body = [
        "# Speech encoder" if not encoder.config.original_parameters else "# Pruned speech encoder",
        "",
        f"Input: {config.sample_rate} Hz mono, {wave}. Output: {config.encoder_embed_dim} features every "
        f"{config.downsampling} samples ({1000 * config.downsampling / config.sample_rate:g} ms), and the states of "
        f"{config.encoder_layers} layers. The first state is the one {'after' if stock else 'before'} the positional "
        "convolution. Every frame depends on the whole utterance: the encoder is not causal.",
        "",
        "```python",
        usage.strip(),
        "```",
        "",
        markdown([["", ""], *facts(encoder, provenance)]),
        "",
        TERMS,
        "",
    ]
    return "\n".join([*header, "", *body, *filter(None, [notes])])


def facts(encoder: SpeechEncoder, provenance: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Size, units left in every layer, and provenance, as (name, value)."""
    config = encoder.config
    assert config.conv_channels is not None and config.heads is not None and config.ffn_dims is not None
    parameters = int(count_parameters(config, widths_of(config)))
    yield "parameters", f"{parameters:,}"
    if config.original_parameters:
        sparsity = 1 - parameters / config.original_parameters
        yield "before pruning", f"{config.original_parameters:,} (sparsity {100 * sparsity:.1f} %)"
    yield "MACs per second of audio", f"{encoder.macs(1.0):,}"
    yield "conv channels", " ".join(map(str, config.conv_channels))
    yield "attention heads", " ".join("-" if heads is None else str(len(heads)) for heads in config.heads)
    yield "FFN units", " ".join("-" if units is None else str(units) for units in config.ffn_dims)
    yield from ((unit.label or unit.name, cells) for unit, cells in further_units(config))
    if config.pruning_units:
        yield "gates", ", ".join(config.pruning_units)
    for name, value in provenance.items():
        yield PROVENANCE.get(name, name), value
