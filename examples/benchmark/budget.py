"""Scales a recipe's student to a number of parameters or MACs. Pure functions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Optional

from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.size import widths_of
from skill_fairseq.pruning.costs import Cost
from skill_fairseq.pruning.expected import smallest_widths

TOLERANCE = 0.01
"""Tolerated relative deviation from the budget."""
CUT = ("conv", "heads", "ffn")
"""Units of copied parts to prune, smallest weights first."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to make a student of the budget's size.

    Attributes:
        shape: the student's shape before cutting.
        parts: parts of the teacher to copy: ``model.init_parts``.
        layers: the teacher's layers to copy, from 1: ``model.init_layers``; None: all in order.
        cut: kinds of units to cut by magnitude afterwards, to the budget's size; (): none.
    """

    shape: EncoderConfig
    parts: tuple[str, ...]
    layers: Optional[tuple[int, ...]] = None
    cut: tuple[str, ...] = ()


def cost_of(shape: EncoderConfig, cost: Cost) -> float:
    """The cost of an encoder of this shape."""
    return float(cost(shape, widths_of(shape)))  # type: ignore[arg-type]


def plan(
    shape: EncoderConfig,
    parts: Sequence[str],
    layers: Optional[Sequence[int]],
    depth: int,
    target: float,
    cost: Cost,
    tolerance: float = TOLERANCE,
) -> Plan:
    """Scales a recipe's student to a budget.

    A shape within the tolerance does not change. A student that copies layers of the teacher keeps its width: it also
    copies the teacher's next layers while it is smaller than the budget, and loses units by magnitude if it is larger.
    Any other is scaled, see :func:`scaled`; it then copies only the convolutions, cut to its share.

    Args:
        shape: the recipe's shape.
        parts: parts of the teacher that the recipe copies.
        layers: the teacher's layers to copy, from 1; None: all in order.
        depth: the teacher's number of layers.
        target: the student's cost.
        cost: parameters or MACs.
        tolerance: tolerance relative to ``target``.

    Raises:
        ValueError: no student of this kind has that cost.
    """
    if abs(cost_of(shape, cost) - target) <= tolerance * target:
        return Plan(shape, tuple(parts), None if layers is None else tuple(layers))
    if shape.unit_widths:
        raise ValueError(f"model.unit_widths: {shape.unit_widths}; expected none: ranks cannot be scaled, gate them")
    if "layers" not in parts:
        keep = "conv" in parts
        found = scaled(shape, target, cost, keep, tolerance)
        return Plan(found, ("conv",) * keep, None, ("conv",) * keep)
    taken = list(layers or range(1, shape.encoder_layers + 1))
    while cost_of(shape, cost) < target * (1 - tolerance):
        further = [layer for layer in range(taken[-1] + 1, depth + 1) if layer not in taken]
        if not further:
            raise ValueError(
                f"layers {taken} of the teacher cost {cost_of(shape, cost):,.0f} {cost}, the budget is {target:,.0f}, "
                "and the teacher has no more; give a higher sparsity"
            )
        taken.append(further[0])
        shape = shape.replace(encoder_layers=len(taken))
    chosen = None if layers is None and len(taken) == depth else tuple(taken)
    if cost_of(shape, cost) <= target * (1 + tolerance):
        return Plan(shape, tuple(parts), chosen)
    cut = tuple(unit for unit in CUT if unit != "heads" or not shape.reuse_attention)
    gated = shape.replace(pruning_units=list(cut))
    least = float(cost(gated, smallest_widths(gated)))  # type: ignore[arg-type]
    if least > target:
        raise ValueError(
            f"layers {taken} of the teacher cost {least:,.0f} {cost} or more after any cut; the budget is "
            f"{target:,.0f}: give a lower sparsity"
        )
    return Plan(shape, tuple(parts), chosen, cut)


def scaled(
    shape: EncoderConfig, target: float, cost: Cost, keep_convolutions: bool = False, tolerance: float = TOLERANCE
) -> EncoderConfig:
    """Scales the widths of a shape to a cost, keeping depth and number of heads.

    The width is a multiple of heads and of groups of the positional convolution; channels scale with the width; the FFN
    gets the rest. Of the widths within the tolerance, chooses the one whose FFN-to-width ratio is closest to the
    recipe's.

    Args:
        shape: the shape to scale.
        target: the cost to reach.
        cost: parameters or MACs.
        keep_convolutions: the convolutions will be copied and cut to their share later: count them as cut, but keep
            them in full.
        tolerance: tolerance relative to ``target``.

    Raises:
        ValueError: no width is within the tolerance.
    """
    wanted = shape.encoder_ffn_embed_dim / shape.encoder_embed_dim
    found = []
    for width in _widths(shape):
        ratio = width / shape.encoder_embed_dim
        channels = [max(1, round(ratio * c)) for c, _, _ in shape.conv_feature_layers]
        if not shape.feature_linear:
            channels[-1] = width
        convs = [(c, k, s) for c, (_, k, s) in zip(channels, shape.conv_feature_layers)]
        full = [max(c, old) for c, (old, _, _) in zip(channels, shape.conv_feature_layers)]
        thin = shape.replace(
            encoder_embed_dim=width, conv_feature_layers=convs, conv_channels=None, encoder_ffn_embed_dim=1
        )
        least, step = cost_of(thin, cost), cost_of(thin.replace(encoder_ffn_embed_dim=2), cost)
        units = 1 + round((target - least) / (step - least))
        if units < 1:
            break
        thin = thin.replace(encoder_ffn_embed_dim=units)
        if keep_convolutions and full != [c for c, _, _ in shape.conv_feature_layers]:
            continue  # the teacher's convolutions cannot grow
        if abs(cost_of(thin, cost) - target) <= tolerance * target:
            kept = thin.replace(conv_feature_layers=shape.conv_feature_layers) if keep_convolutions else thin
            found.append((abs(math.log(units / width / wanted)), kept))
    if not found:
        raise ValueError(
            f"no width of {shape.encoder_layers} layers is within {100 * tolerance:g} % of {target:,.0f} {cost}; "
            "give a lower sparsity, or a recipe with fewer layers"
        )
    return min(found, key=lambda pair: pair[0])[1]


def _widths(shape: EncoderConfig) -> Iterator[int]:
    """Usable widths up to four times the shape's, ascending."""
    step = math.lcm(shape.encoder_attention_heads, shape.conv_pos_groups)
    yield from range(step, 4 * shape.encoder_embed_dim + 1, step)
