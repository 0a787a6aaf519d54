"""Costs to constrain: a cost is a function of an encoder's config and widths, differentiable in tensor widths.

To add a cost, decorate a subclass of :class:`Cost` with :func:`register_cost`; ``criterion.cost`` then accepts its
name.
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
    """A cost of encoders. Its settings are dataclass fields with plain values.

    ``str(cost)`` completes "1,000,000 ...", for reports.
    """

    name: ClassVar[str]
    absolute: ClassVar[Optional[str]] = None
    """Name under which a target sets the cost itself instead of a share of ``unpruned()``."""

    def __call__(self, config: EncoderConfig, widths: Widths) -> Number:
        """The cost: exact (an int if possible) for integer widths, a scalar with gradient for tensors."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.name

    def original(self, config: EncoderConfig) -> int | float:
        """The cost before any pruning, which sparsity refers to."""
        full = config.full().replace(pruning_units=[])  # may differ from the actual modules
        return self(full, widths_of(full))  # type: ignore[return-value]

    def sparsity(self, config: EncoderConfig, widths: Widths) -> Any:
        """Removed fraction of the original cost; a scalar with gradient for tensor widths."""
        return 1 - self(config, widths) / self.original(config)

    def unpruned(self) -> float:
        """The cost before any pruning, if known without the encoder; only used if ``absolute`` is set."""
        raise NotImplementedError

    def settings(self) -> Dict[str, Any]:
        """Plain values from which :func:`make_cost` rebuilds it."""
        return {"cost": self.name, **{f"cost_{name}": value for name, value in dataclasses.asdict(self).items()}}


COSTS: Dict[str, Type[Cost]] = {}
"""Costs by name."""


def register_cost(cost: _C) -> _C:
    """Class decorator that registers a cost under its ``name``."""
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
        """``config.original_parameters``, if set."""
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
    """Creates a cost by name.

    Args:
        cost: a name of :data:`COSTS`; None: parameters.
        settings: values by ``cost_`` and the name of a field; None and fields that this cost lacks are ignored.

    Raises:
        ValueError: there is no such cost, or a setting is not usable.
    """
    kind = COSTS.get(str(cost or PARAMETERS.name))
    if kind is None:
        raise ValueError(f"cost: {cost!r} is not known; expected one of {', '.join(COSTS)}")
    known = {f"cost_{f.name}": f.name for f in dataclasses.fields(kind)}
    return kind(**{known[name]: v for name, v in settings.items() if name in known and v is not None})


def saved_cost(provenance: Mapping[str, Any]) -> Cost:
    """The cost of a checkpoint's target, from its provenance.

    Raises:
        ValueError: the cost is not registered here, or its settings are not usable.
    """
    return make_cost(**{name: value for name, value in provenance.items() if name.partition("_")[0] == "cost"})
