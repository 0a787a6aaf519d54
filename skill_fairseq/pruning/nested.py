"""Sizes out of one encoder, nested: each unit has its place in one order, and a smaller size leaves out more of it.

An encoder of stage 1 orders its units by its gates: by the shift of all ``log_alpha`` at which rounding lets a unit go.
In stage 2 weights are those of the largest size, and gates hold nothing but the order: see :func:`settle`.
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
"""The least ``log_alpha`` of gates that only hold an order: such a gate is open, and its value 1 in float32, in
training and evaluation alike."""
WHOLE = 1e-3
"""Difference in size up to which an encoder as it is has the size asked for: a largest one, once it has been cut."""
_GRID = 4096  # shifts at which a vector's expected number of units is known; between them a line


def is_settled(encoder: SpeechEncoder) -> bool:
    """Whether the gates only hold an order, as :func:`settle` leaves them."""
    return encoder.gates is not None and bool((encoder.gates.log_alpha.detach() >= SETTLED).all())


@torch.no_grad()
def staying(encoder: SpeechEncoder) -> Tensor:
    """How long each unit stays as sizes fall, (n,) float64 on the CPU, in the bank's order: the more the longer.

    Units that cannot go have infinity. Within a vector of gates the order is that of ``log_alpha``.
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
    """(n,) for each unit, the most wanted first, how far all ``log_alpha`` (n,) fall until rounding lets it go."""
    ends = float(values.min()) - 40, float(values.max()) + 40
    falls = torch.linspace(*ends, _GRID, dtype=torch.float64)
    kept = torch.cat([keep_probability(values - part[:, None]).sum(1) for part in falls.split(64)])  # falling
    wanted = torch.arange(len(values), dtype=torch.float64) + 0.5  # unit r stays while more than r + 1/2 are expected
    right = torch.searchsorted(-kept, -wanted).clamp(1, _GRID - 1)
    above, below = kept[right - 1], kept[right]
    return falls[right - 1] + (falls[right] - falls[right - 1]) * (above - wanted) / (above - below).clamp(min=1e-300)


class NestedOrder:
    """The order of an encoder's units, and how many of them a size has.

    Args:
        encoder: with gates.
        cost: what sizes are shares of, before any pruning.
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
        """Units that each vector keeps where ``number`` are kept in all; all that stay as long as the last of them."""
        last = self._last(number)
        return {name: int((stays >= last).sum()) for name, stays in zip(self.names, self.vectors)}

    def number(self, size: float) -> int:
        """Of units with which the cost is nearest to a share of what it was before any pruning."""
        wanted = size * self.cost.original(self.encoder.config)
        low, high = self.always, len(self.sorted)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._cost(middle) <= wanted else (low, middle)
        return min((low, high), key=lambda number: abs(self._cost(number) - wanted))

    def mask(self, size: float) -> Tensor:
        """(n,) bool on the CPU, the units of a size, to within one unit's cost; those of a smaller size are among
        them."""
        return self.stays >= self._last(self.number(size))

    def _last(self, number: int) -> Tensor:
        return self.sorted[max(number, 1) - 1]

    def _cost(self, number: int) -> float:
        widths: Widths = kept_widths(self.encoder, self.counts(number))
        return self.cost(self.encoder.config, widths)  # type: ignore[return-value]


def nested_selections(encoder: SpeechEncoder, sizes: Sequence[float], cost: Cost = PARAMETERS) -> List[Selection]:
    """Units of each size: as the order has them, then opened or closed one by one until the cost is as near to its
    share as single units bring it. A smaller size's units are among a larger one's.

    Args:
        encoder: with gates.
        sizes: shares of the cost before any pruning, in (0, 1).
        cost: what they are shares of.

    Returns:
        a selection for each size, in their order.

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
    """Students of several sizes out of one encoder, nested, each of its size to within the smallest unit's cost.

    In one that stage 1 has trained, a size's gates have the values of the shift that makes it the expected one.

    Args, Raises: as :func:`nested_selections`. Returns a new encoder without gates for each size, in their order.
    """
    selections = nested_selections(encoder, sizes, cost)
    return [_cut(encoder, selection, size, cost) for size, selection in zip(sizes, selections)]


def _cut(encoder: SpeechEncoder, selection: Selection, size: float, cost: Cost) -> SpeechEncoder:
    if is_settled(encoder):
        return cut_units(encoder, selection)
    return cut_units(encoder, selection, float(ExactConstraint(1 - size, 0, cost).shift_to(encoder, [1 - size])))


def settle(encoder: SpeechEncoder, size: float, cost: Cost = PARAMETERS) -> SpeechEncoder:
    """Stage 2's student: the encoder cut to its largest size, with gates that hold the order of what is left.

    Args:
        encoder: with gates, as stage 1 has trained it.
        size: the largest, a share of the cost before any pruning.
        cost: what it is a share of.

    Returns:
        a new encoder whose gates have the ``log_alpha`` 30 to 60, the later a unit goes the more: all are open, with
        the value 1.

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
    """The smallest and largest size that were trained, as shares of another cost."""
    if cost == trained:
        return ends
    low, high = (
        float(1 - cost.sparsity(encoder.config, kept_widths(encoder, {n: int(m.sum()) for n, m in found.items()})))
        for found in nested_selections(encoder, ends, trained)
    )
    return low, high
