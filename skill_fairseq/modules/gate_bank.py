"""All gates of an encoder in one flat parameter: one draw, one copy to the host and one back per forward."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from skill_fairseq.modules.fp32 import Float32Module
from skill_fairseq.modules.hard_concrete import (
    EPS,
    Units,
    deterministic_gate,
    hard_concrete_sample,
    keep_probability,
    kept_units,
    multiple_on,
    open_units,
)
from skill_fairseq.modules.host import to_host
from skill_fairseq.modules.size import flat_widths, widths_of
from skill_fairseq.modules.units import Site, units_of

_BY_ROUNDING = -1  # in GateBank.kept_override: no override


class HardConcrete:
    """A vector of gates, one per unit: conv channels, attention heads, or a single one for a whole sublayer.

    It belongs to a :class:`GateBank`, is created by :meth:`GateBank.add`, and has no storage of its own.

    Attributes:
        bank: the bank with its values.
        index: its index among the bank's vectors.
        part: its slice of the bank's flat tensors.
        drop_rate: initial drop rate, in (0, 1): ``log_alpha`` is drawn around ``log((1 - drop_rate) / drop_rate)``.
            0.01 opens almost all units; 0.5 means ``log_alpha`` 0.
        init_std: standard deviation of that draw, which breaks ties between units.
        multiple: a forward computes units in multiples of this number.
        unit: kind of the units, a name of :data:`skill_fairseq.modules.units.UNITS`.
        site: its place in an encoder.
        position: index of its width among the encoder's flat widths.
    """

    unit: str
    site: Site
    position: int

    def __init__(
        self, bank: GateBank, index: int, part: slice, drop_rate: float, init_std: float, multiple: int
    ) -> None:
        self.bank = bank
        self.index = index
        self.part = part
        self.drop_rate = drop_rate
        self.init_std = init_std
        self.multiple = multiple

    @property
    def name(self) -> str:
        """Path of its attribute."""
        return f"{self.site.owner}.{self.site.attribute}"

    @property
    def num_units(self) -> int:
        return self.part.stop - self.part.start

    @property
    def log_alpha(self) -> Tensor:
        """(num_units,) float32, a view of the bank's parameter."""
        return self.bank.log_alpha[self.part]

    @property
    def grad(self) -> Tensor | None:
        """(num_units,) float32, the gradient of ``log_alpha``; None before a backward pass."""
        return None if self.bank.log_alpha.grad is None else self.bank.log_alpha.grad[self.part]

    def __call__(self) -> Tensor:
        """z, (num_units,) float32 in [0, 1]: in training a sample for this vector only, in evaluation deterministic."""
        if not self.bank.training:
            return deterministic_gate(self.log_alpha, self.kept())
        return hard_concrete_sample(self.log_alpha, self.bank.noise(self.num_units))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws ``log_alpha`` again and removes an override of the kept units."""
        nn.init.normal_(self.log_alpha, math.log((1 - self.drop_rate) / self.drop_rate), self.init_std)
        self.set_kept(None)

    def expected_kept(self) -> Tensor:
        """Expected number of open gates, a differentiable float32 scalar."""
        return keep_probability(self.log_alpha).sum()

    def kept(self) -> Tensor:
        """Units kept in evaluation, (num_units,) bool: the override if any, else by rounding."""
        return _kept(self.log_alpha, self.bank.kept_override[self.part])

    def set_kept(self, mask: Tensor | None) -> None:
        """Sets the units kept in evaluation, (num_units,) bool; None restores rounding.

        The choice is saved with the state. Training ignores it: remove it when training continues.

        Raises:
            ValueError: the mask has another shape or dtype.
        """
        override = self.bank.kept_override[self.part]
        if mask is None:
            override.fill_(_BY_ROUNDING)
            return
        if mask.dtype != torch.bool or mask.shape != override.shape:
            raise ValueError(
                f"mask is {mask.dtype} of shape {tuple(mask.shape)}, but must be torch.bool of shape "
                f"({self.num_units},): True for each unit to keep"
            )
        override.copy_(mask)

    def __repr__(self) -> str:
        return f"HardConcrete(num_units={self.num_units}, drop_rate={self.drop_rate})"


class Draw:
    """The gates of one forward.

    Attributes:
        z: (n,) float32 in [0, 1], every gate of the bank.
        units: the units to compute, for each vector of gates.
    """

    def __init__(self, z: Tensor, units: Sequence[Units]) -> None:
        self.z = z
        self.units = units

    def of(self, gate: HardConcrete | None) -> Units | None:
        """The units of a vector of gates; None without a gate."""
        return None if gate is None else self.units[gate.index]


class GateBank(Float32Module):
    """Vectors of gates, concatenated in one parameter.

    The parameter ``log_alpha`` (n,) stays float32 in a model of lower precision and belongs to the optimizer group
    ``gates``. Nothing derived from it is cached, so loading or editing it takes effect immediately.

    Attributes:
        gates: the vectors, in the order of addition.
        generator: source of the noise; None: torch's global generator of the gates' device. Noise is drawn on the
            generator's device, so CPU generators with the same seed give every rank the same gates. A copied or
            unpickled bank has none.
    """

    param_group = "gates"
    kept_override: Tensor
    fixed_widths: Tensor
    positions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.gates: list[HardConcrete] = []
        self.generator: torch.Generator | None = None
        self.log_alpha = nn.Parameter(torch.empty(0, dtype=torch.float32))
        # Always present, so that state dicts load strictly with and without an override.
        self.register_buffer("kept_override", torch.empty(0, dtype=torch.int8))
        self.register_buffer("fixed_widths", torch.empty(0), persistent=False)
        self.register_buffer("positions", torch.empty(0, dtype=torch.long), persistent=False)

    def add(self, num_units: int, drop_rate: float = 0.01, init_std: float = 0.01, multiple: int = 1) -> HardConcrete:
        """Appends a vector of gates; the arguments are attributes of :class:`HardConcrete`.

        Raises:
            ValueError: an argument is out of range.
        """
        if num_units < 1:
            raise ValueError(f"num_units is {num_units}, but must be at least 1; leave the gate out instead")
        if not 0.0 < drop_rate < 1.0:
            raise ValueError(f"drop_rate is {drop_rate}, but must lie in (0, 1); 0.01 is usual")
        if init_std < 0.0:
            raise ValueError(f"init_std is {init_std}, but must not be negative; 0 starts all units alike")
        start = self.log_alpha.numel()
        gate = HardConcrete(self, len(self.gates), slice(start, start + num_units), drop_rate, init_std, multiple)
        self.gates.append(gate)
        self.log_alpha = nn.Parameter(torch.cat([self.log_alpha.detach(), self.log_alpha.new_empty(num_units)]))
        self.kept_override = torch.cat([self.kept_override, self.kept_override.new_empty(num_units)])
        gate.reset_parameters()
        return gate

    def noise(self, number: int) -> Tensor:
        """(number,) float32 uniform noise in (EPS, 1 - EPS), on the gates' device."""
        device = self.log_alpha.device
        source = device if self.generator is None else self.generator.device
        pinned = source.type == "cpu" and device.type == "cuda"
        noise = torch.empty(number, dtype=torch.float32, device=source, pin_memory=pinned)
        noise.uniform_(generator=self.generator)
        return EPS + (1 - 2 * EPS) * noise.to(device, non_blocking=True)

    def draw(self, slicing: bool = True, log_alpha: Tensor | None = None) -> Draw:
        """All gates: a fresh sample in training, deterministic in evaluation.

        Shapes depend on which units are open, so the host waits for the device once.

        Args:
            slicing: skip closed units; False: compute all of them.
            log_alpha: (n,) replaces the bank's own, for an encoder of another size; evaluation then keeps the units
                that these round to.
        """
        sizes = [gate.num_units for gate in self.gates]
        if not sizes:
            return Draw(self.log_alpha, [])
        values = self.log_alpha if log_alpha is None else log_alpha
        if self.training:
            z = hard_concrete_sample(values, self.noise(values.numel()))
            is_open = to_host(z.detach() > 0, "open gates") if slicing else None
        else:
            vectors = to_host(values.detach(), "open gates").split(sizes)
            if log_alpha is None:
                override = to_host(self.kept_override, "open gates").split(sizes)
                is_open = torch.cat([_kept(*vector) for vector in zip(vectors, override)])
            else:
                is_open = torch.cat([kept_units(vector) for vector in vectors])
            z = deterministic_gate(values, is_open.to(values.device))
        parts = z.split(sizes)
        if is_open is None or not slicing:
            return Draw(z, [Units(None, value) for value in parts])
        masks = is_open.split(sizes)
        multiples = [multiple_on(z.device, gate.multiple) for gate in self.gates]
        indices = [open_units(mask, multiple) for multiple, mask in zip(multiples, masks)]
        on_device = _together([index for index in indices if index is not None], z.device)
        units = []
        for index, mask, value in zip(indices, masks, parts):
            any_open = bool(mask.numpy().any())
            if index is None:
                units.append(Units(None, value, any_open))
            else:
                index = next(on_device)
                units.append(Units(index, value[index], any_open))
        return Draw(z, units)

    def place(self, encoder: Any) -> None:
        """Adds gates to the units in an encoder's ``config.pruning_units``."""
        config = encoder.config
        modules = {name: place for place, (name, _) in enumerate(encoder.named_modules())}
        sites = [
            (site, unit)
            for unit in units_of(config)
            if unit.name in config.pruning_units
            for site in unit.sites(encoder)
            if site.num_units
        ]
        # Sorted by module, not by kind: the order of saved gates.
        sites.sort(key=lambda found: (modules[found[0].owner], found[0].attribute))
        widths = widths_of(config)
        starts = dict(zip(widths, itertools.accumulate(map(len, widths.values()), initial=0)))
        for site, unit in sites:
            gate = self.add(site.num_units, multiple=unit.multiple)
            gate.unit, gate.site, gate.position = unit.name, site, starts[unit.name] + site.place
            setattr(encoder.get_submodule(site.owner), site.attribute, gate)
        device = self.log_alpha.device
        self.fixed_widths = torch.tensor(flat_widths(widths), dtype=torch.float32, device=device)
        self.positions = torch.tensor([gate.position for gate in self.gates], dtype=torch.long, device=device)

    def expected_widths(self, shift: float | Tensor = 0.0) -> Tensor:
        """(W,) float32 expected widths under the gates, differentiable; exact widths without gates.

        Args:
            shift: added to every ``log_alpha``, for the widths after such a move. Widths have the dtype of a tensor (a
                scalar or (n,)), such as float64.
        """
        if not self.gates:
            return self.fixed_widths
        if isinstance(shift, Tensor):
            log_alpha, fixed = self.log_alpha.to(shift.dtype) + shift, self.fixed_widths.to(shift.dtype)
        else:
            log_alpha, fixed = self.log_alpha + shift if shift else self.log_alpha, self.fixed_widths
        kept = keep_probability(log_alpha)
        counts = torch.stack([part.sum() for part in kept.split([gate.num_units for gate in self.gates])])
        return fixed.index_copy(0, self.positions, counts)

    def extra_repr(self) -> str:
        return f"{len(self.gates)} vectors, {self.log_alpha.numel()} gates"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "generator": None}  # it belongs to a run, and some versions of torch cannot copy it


def _kept(log_alpha: Tensor, override: Tensor) -> Tensor:
    """(n,) bool for one vector of gates, on its device."""
    return kept_units(log_alpha) if bool((override == _BY_ROUNDING).all()) else override == 1


def _together(indices: Sequence[Tensor], device: torch.device) -> Any:
    """Iterates over the (k,) indices on the device, after copying them at once."""
    if not indices:
        return iter(())
    flat = torch.cat(list(indices))
    if device.type == "cuda":
        flat = flat.pin_memory()
    return iter(flat.to(device, non_blocking=True).split([len(index) for index in indices]))
