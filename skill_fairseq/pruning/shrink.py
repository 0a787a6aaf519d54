"""Shrinking: removes the units of closed gates, with unchanged outputs."""

from __future__ import annotations

from typing import Dict, List, Optional, TypeVar

import torch
from torch import nn

from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.hard_concrete import deterministic_gate
from skill_fairseq.modules.units import UNITS, units_of
from skill_fairseq.pruning.costs import PARAMETERS, Cost
from skill_fairseq.pruning.expected import full_parameters
from skill_fairseq.pruning.selection import Selection, select_units
from skill_fairseq.pruning.targets import Asked

Encoder = TypeVar("Encoder", bound=nn.Module)


@torch.no_grad()
def shrink(encoder: Encoder, sparsity: Optional[Asked] = None, cost: Cost = PARAMETERS) -> Encoder:
    """Builds a smaller encoder that computes what the gated one computes in evaluation.

    Removes units with closed gates; folds the soft value of an open gate into the next weights. Without ``sparsity``
    the gates decide, and outputs agree to float rounding. With it, a global correction first matches the cost (see
    :func:`select_units`), and outputs agree with the gated encoder under the same selection.

    Args:
        encoder: a gated encoder, ours or a transformers model that :func:`skill_fairseq.pruning.gate` accepts; it is
            not modified. It may have been shrunk and gated before.
        sparsity: fraction of the original cost to remove, in [0, 1); or several targets; None: round the gates.
        cost: the cost that the sparsity refers to.

    Returns:
        a new encoder of the same class without gates, in evaluation mode, with the same device and dtype.

    Raises:
        ValueError: the encoder has no gates, a convolution would lose all its channels, or the sparsity cannot be
            reached.
    """
    if not isinstance(encoder, SpeechEncoder):
        from skill_fairseq.pruning.huggingface_shrink import shrink_model

        return shrink_model(encoder, sparsity, cost)
    return cut_units(encoder, select_units(encoder, sparsity, cost))  # type: ignore[return-value]


@torch.no_grad()
def cut_units(encoder: SpeechEncoder, selection: Selection, shift: float = 0.0) -> SpeechEncoder:
    """:func:`shrink` for selected units.

    Args:
        encoder: a gated encoder; it is not modified.
        selection: the units to keep.
        shift: added to every ``log_alpha`` before the gates' values are folded into weights.
    """
    fields = encoder.config.to_dict()
    shape = {name: fields.get(name, {}) for name in ("conv_channels", "heads", "ffn_dims", "unit_widths")}
    state = encoder.state_dict()
    gates = list(encoder.named_gates())
    for unit in UNITS.values():
        for name, gate in gates:
            if gate.unit == unit.name:
                kept = selection[name].nonzero().flatten()
                factor = deterministic_gate(gate.log_alpha + shift, selection[name])[kept]
                unit.cut(encoder, gate.site, kept, factor, state, shape)
    for unit in units_of(encoder.config):
        unit.finish(encoder, state, shape)

    original = full_parameters(encoder.config)
    config = encoder.config.replace(**shape, pruning_units=[], original_parameters=original)
    like = encoder.feature_extractor.layers[0].conv.weight
    small = SpeechEncoder(config, encoder.dropouts).eval().to(like.device, like.dtype)
    small.load_state_dict({name: state[name] for name in small.state_dict()})
    small.mask_embedding = encoder.mask_embedding
    return small


def kept_tables(config: EncoderConfig) -> Dict[str, List[List[str]]]:
    """Readable tables of what is left of each layer: by kind of row ("layer"), rows of cells, header first."""
    tables: Dict[str, List[List[str]]] = {}
    for unit in units_of(config):
        left, full = unit.left(config), unit.full(config)
        if unit.label is not None:
            cells = list(map(describe_units, left, full))
            if unit.per_row > 1:
                cells = [" ".join("-" if width is None else str(width) for width in row) for row in unit.by_row(left)]
            numbers = range(unit.first, unit.first + len(cells))
            lines = tables.setdefault(unit.rows, [[unit.rows], *([str(number)] for number in numbers)])
            for line, cell in zip(lines, [unit.label, *cells]):
                line.append(cell)
    return tables


def describe_units(left: Optional[int], full: int) -> str:
    """What is left of a sublayer, as text: "3 / 12", "bias only" without units, or "removed".

    Args:
        left: number of units; 0 and None as in EncoderConfig.
        full: number before pruning.
    """
    if left is None:
        return "removed"
    return f"{left} / {full}" if left else "bias only"
