"""Nested sizes of one encoder: units have one order, of which a smaller size drops more.

A stage 1 encoder orders its units by its gates: by the shift of all ``log_alpha`` at which rounding drops a unit. In
stage 2 the weights are those of the largest size, and gates only hold the order, see :func:`settle`.
"""

from __future__ import annotations

from typing import Dict, List, Sequence, Tuple

import torch
from torch import Tensor

from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.hard_concrete import keep_probability
from skill_fairseq.modules.size import Widths, widths_of
from skill_fairseq.modules.units import UNITS
from skill_fairseq.pruning.costs import PARAMETERS, Cost
from skill_fairseq.pruning.exact import ExactConstraint
from skill_fairseq.pruning.gating import gate
from skill_fairseq.pruning.selection import Ranked, Selection, check_reachable, correct, kept_widths
from skill_fairseq.pruning.shrink import cut_units

SETTLED = 30.0
"""The least ``log_alpha`` of gates that only hold an order: such a gate is open, with the value 1 in float32, in
training and evaluation."""
WHOLE = 1e-3
"""An encoder whose size differs by at most this much from the requested one is used uncut, such as the largest."""
_GRID = 4096  # shifts with a known expected number of units; linear between them


def is_settled(encoder: SpeechEncoder) -> bool:
    """Whether the gates only hold an order, see :func:`settle`."""
    return encoder.gates is not None and bool((encoder.gates.log_alpha.detach() >= SETTLED).all())


@torch.no_grad()
def staying(encoder: SpeechEncoder) -> Tensor:
    """How long each unit stays as sizes fall, (n,) float64 on the CPU, in the bank's order; larger stays longer.

    Units that cannot be removed have infinity. Within a vector of gates the order is that of ``log_alpha``.
    """
    assert encoder.gates is not None
    settled, found = is_settled(encoder), []
    for _, vector in encoder.named_gates():
        values, order = vector.log_alpha.detach().cpu().sort(descending=True, stable=True)
        stays = values.double() if settled else _by_rounding(values.double())
        stays[: UNITS[vector.unit].least] = float("inf")
        found.append(torch.empty_like(stays).index_copy_(0, order, stays))
    return torch.cat(found)


def _by_rounding(values: Tensor) -> Tensor:
    """(n,) for each unit, most wanted first: how far all ``log_alpha`` (n,) fall until rounding drops it."""
    ends = float(values.min()) - 40, float(values.max()) + 40
    falls = torch.linspace(*ends, _GRID, dtype=torch.float64)
    kept = torch.cat([keep_probability(values - part[:, None]).sum(1) for part in falls.split(64)])  # falling
    wanted = torch.arange(len(values), dtype=torch.float64) + 0.5  # unit r stays while more than r + 1/2 are expected
    right = torch.searchsorted(-kept, -wanted).clamp(1, _GRID - 1)
    above, below = kept[right - 1], kept[right]
    return falls[right - 1] + (falls[right] - falls[right - 1]) * (above - wanted) / (above - below).clamp(min=1e-300)


class NestedOrder:
    """The order of an encoder's units, and the number of units for each size.

    Args:
        encoder: with gates.
        cost: the cost, before any pruning, that sizes are shares of.
    """

    def __init__(self, encoder: SpeechEncoder, cost: Cost = PARAMETERS) -> None:
        self.encoder, self.cost = encoder, cost
        self.stays = staying(encoder)
        self.sorted = self.stays.sort(descending=True).values
        gates = [vector for _, vector in encoder.named_gates()]
        self.names = [vector.name for vector in gates]
        self.vectors = list(self.stays.split([vector.num_units for vector in gates]))
        self.always = int(torch.isinf(self.sorted).sum())

    def counts(self, number: int) -> Dict[str, int]:
        """Units that each vector keeps if ``number`` are kept in total, including ties with the last of them."""
        last = self._last(number)
        return {name: int((stays >= last).sum()) for name, stays in zip(self.names, self.vectors)}

    def number(self, size: float) -> int:
        """The number of units whose cost is closest to a share of the cost before any pruning."""
        wanted = size * self.cost.original(self.encoder.config)
        low, high = self.always, len(self.sorted)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._cost(middle) <= wanted else (low, middle)
        return min((low, high), key=lambda number: abs(self._cost(number) - wanted))

    def mask(self, size: float) -> Tensor:
        """(n,) bool on the CPU: the units of a size, to within one unit's cost; a smaller size's units are a subset."""
        return self.stays >= self._last(self.number(size))

    def _last(self, number: int) -> Tensor:
        return self.sorted[max(number, 1) - 1]

    def _cost(self, number: int) -> float:
        widths: Widths = kept_widths(self.encoder, self.counts(number))
        return self.cost(self.encoder.config, widths)  # type: ignore[return-value]


def nested_selections(encoder: SpeechEncoder, sizes: Sequence[float], cost: Cost = PARAMETERS) -> List[Selection]:
    """Units of each size: the first of the order, then single units are opened or closed until the cost is as close to
    its share as possible. A smaller size's units are a subset of a larger one's.

    Args:
        encoder: with gates.
        sizes: shares of the cost before any pruning, in (0, 1).
        cost: the cost that they are shares of.

    Returns:
        a selection for each size, in the same order.

    Raises:
        ValueError: a size cannot be reached.
    """
    order, found = NestedOrder(encoder, cost), {}
    original, whole = cost.original(encoder.config), 1 - float(cost.sparsity(encoder.config, widths_of(encoder.config)))
    tables = []
    for (name, vector), stays in zip(encoder.named_gates(), order.vectors):
        values, units = stays.sort(descending=True, stable=True)
        tables.append((name, units.tolist(), values.tolist(), UNITS[vector.unit].least))
    most = {name: len(units) for name, units, _, _ in tables}
    for size in sorted(set(sizes), reverse=True):
        if abs(size - whole) > WHOLE:
            check_reachable(encoder.config, 1 - size, "size", cost)
        limit = round(size * original) if isinstance(original, int) else size * original
        counts = {name: min(count, most[name]) for name, count in order.counts(order.number(size)).items()}
        table = [Ranked(name, us[: most[name]], vs[: most[name]], least) for name, us, vs, least in tables]
        correct(table, counts, limit, lambda kept: cost(encoder.config, kept_widths(encoder, kept)))  # type: ignore
        found[size] = _selection(encoder, {name: units[: counts[name]] for name, units, _, _ in tables})
        most = counts
    return [found[size] for size in sizes]


def _selection(encoder: SpeechEncoder, kept: Dict[str, List[int]]) -> Selection:
    selection = {}
    for name, vector in encoder.named_gates():
        selection[name] = torch.zeros_like(vector.log_alpha, dtype=torch.bool)
        selection[name][kept[name]] = True
    return selection


def cut_sizes(encoder: SpeechEncoder, sizes: Sequence[float], cost: Cost = PARAMETERS) -> List[SpeechEncoder]:
    """Nested students of several sizes from one encoder, each of its size to within the smallest unit's cost.

    For a stage 1 encoder, a size's gates have their values at the shift that makes this size the expected one.

    Args, Raises: see :func:`nested_selections`. Returns a new encoder without gates for each size, in the same order.
    """
    selections = nested_selections(encoder, sizes, cost)
    return [_cut(encoder, selection, size, cost) for size, selection in zip(sizes, selections)]


def _cut(encoder: SpeechEncoder, selection: Selection, size: float, cost: Cost) -> SpeechEncoder:
    if is_settled(encoder):
        return cut_units(encoder, selection)
    return cut_units(encoder, selection, float(ExactConstraint(1 - size, 0, cost).shift_to(encoder, [1 - size])))


def settle(encoder: SpeechEncoder, size: float, cost: Cost = PARAMETERS) -> SpeechEncoder:
    """Stage 2's student: the encoder cut to its largest size, with gates that hold the order of the remaining units.

    Args:
        encoder: a gated encoder from stage 1.
        size: the largest, a share of the cost before any pruning.
        cost: the cost that it is a share of.

    Returns:
        a new encoder whose gates have ``log_alpha`` from 30 to 60, higher for units that stay longer; all are open,
        with the value 1.

    Raises:
        ValueError: the size cannot be reached.
    """
    (selection,), stays = nested_selections(encoder, [size], cost), staying(encoder)
    small = _cut(encoder, selection, size, cost)
    units = list(encoder.config.pruning_units)
    parts = dict(zip(selection, stays.split([len(mask) for mask in selection.values()])))
    gate(small, units)
    assert small.gates is not None
    kept = torch.cat([parts[name][selection[name].cpu()] for name, _ in small.named_gates()])
    places = torch.empty(len(kept), dtype=torch.float64)
    places[torch.sort(kept, stable=True).indices] = torch.arange(len(kept), dtype=torch.float64) / len(kept)
    with torch.no_grad():
        small.gates.log_alpha.copy_(SETTLED * (1 + places))
    return small


def range_of(encoder: SpeechEncoder, ends: Tuple[float, float], trained: Cost, cost: Cost) -> Tuple[float, float]:
    """The smallest and largest trained size, as shares of another cost."""
    if cost == trained:
        return ends
    low, high = (
        float(1 - cost.sparsity(encoder.config, kept_widths(encoder, {n: int(m.sum()) for n, m in found.items()})))
        for found in nested_selections(encoder, ends, trained)
    )
    return low, high
