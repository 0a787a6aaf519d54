"""What can be constrained: a cost is a number for an encoder's config and widths, differentiable in tensor widths.

A cost of your own is a subclass of :class:`Cost` under :func:`register_cost`; the config's ``criterion.cost`` then
takes its name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Dict, Optional, Type, TypeVar

from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.size import Number, Widths, count_macs, count_parameters, widths_of

_C = TypeVar("_C", bound="Type[Cost]")


@dataclasses.dataclass(frozen=True)
class Cost:
    """A cost of encoders. Its settings are fields of the dataclass, plain values.

    ``str(cost)`` completes "1,000,000 ...", for reports.
    """

    name: ClassVar[str]
    absolute: ClassVar[Optional[str]] = None
    """Name under which a target gives the cost itself and not the share that is left of ``unpruned()``."""

    def __call__(self, config: EncoderConfig, widths: Widths) -> Number:
        """The cost: exact, and an int where that can be, for integer widths; a scalar with gradient for tensors."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.name

    def original(self, config: EncoderConfig) -> int | float:
        """The cost before any pruning, which sparsity refers to."""
        full = config.full().replace(pruning_units=[])  # which may stand in for smaller modules
        return self(full, widths_of(full))  # type: ignore[return-value]

    def sparsity(self, config: EncoderConfig, widths: Widths) -> Any:
        """Fraction of the original cost that is gone; a scalar with gradient for tensor widths."""
        return 1 - self(config, widths) / self.original(config)

    def unpruned(self) -> float:
        """The cost before any pruning where it is known without the encoder; where ``absolute`` has a name."""
        raise NotImplementedError

    def settings(self) -> Dict[str, Any]:
        """What :func:`make_cost` makes it of again; plain values."""
        return {"cost": self.name, **{f"cost_{name}": value for name, value in dataclasses.asdict(self).items()}}


COSTS: Dict[str, Type[Cost]] = {}
"""Costs by name."""


def register_cost(cost: _C) -> _C:
    """Class decorator: makes the cost known under its ``name``."""
    COSTS[cost.name] = cost
    return cost


@register_cost
@dataclasses.dataclass(frozen=True)
class ParameterCost(Cost):
    """Number of parameters."""

    name = "parameters"

    def __call__(self, config: EncoderConfig, widths: Widths) -> Number:
        return count_parameters(config, widths)

    def original(self, config: EncoderConfig) -> int:
        """What ``config.original_parameters`` says, where it says something."""
        return config.original_parameters or int(super().original(config))


@register_cost
@dataclasses.dataclass(frozen=True)
class MacCost(Cost):
    """Multiply-accumulates of one forward over ``seconds`` of audio, see :func:`count_macs`."""

    name = "macs"
    seconds: float = 10.0

    def __post_init__(self) -> None:
        if not isinstance(self.seconds, (int, float)) or not 0 < self.seconds <= 86400:
            raise ValueError(f"cost_seconds: {self.seconds}; expected a length of audio in seconds, such as 10")

    def __call__(self, config: EncoderConfig, widths: Widths) -> Number:
        return count_macs(config, widths, round(self.seconds * config.sample_rate))

    def __str__(self) -> str:
        return f"MACs for {self.seconds:g} s of audio"


PARAMETERS = ParameterCost()


def make_cost(cost: str | None = None, **settings: Any) -> Cost:
    """A cost by its name.

    Args:
        cost: a name of :data:`COSTS`; None: parameters.
        settings: ``cost_`` and the name of a field; what this cost has no field for, or is None, is passed over.

    Raises:
        ValueError: there is no such cost, or a setting is not usable.
    """
    kind = COSTS.get(str(cost or PARAMETERS.name))
    if kind is None:
        raise ValueError(f"cost: {cost!r} is not known; expected one of {', '.join(COSTS)}")
    known = {f"cost_{f.name}": f.name for f in dataclasses.fields(kind)}
    return kind(**{known[name]: v for name, v in settings.items() if name in known and v is not None})


def saved_cost(provenance: Mapping[str, Any]) -> Cost:
    """The cost that a checkpoint's target is of, from its provenance.

    Raises:
        ValueError: it is of a cost that is not registered here, or its settings are not usable.
    """
    return make_cost(**{name: value for name, value in provenance.items() if name.partition("_")[0] == "cost"})
