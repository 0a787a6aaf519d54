"""Saves what fairseq's half precision loses at a restart: float32 weights, moments, and the loss scale's history."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Dict, Tuple

import torch
from fairseq.optim import FP16Optimizer, MemoryEfficientFP16Optimizer
from torch import Tensor, nn

_SCALER = ("_iter", "_last_overflow_iter", "_last_rescale_iter", "_overflows_since_rescale")


def check_memory_efficient(common: Any) -> str:
    """A warning about what a run with ``common.memory_efficient_*`` gives up; empty for other runs.

    Raises:
        ValueError: the option is set without ``common.fp16`` or ``common.bf16``; hydra runs would ignore it.
    """
    for dtype in ("fp16", "bf16"):
        option = f"common.memory_efficient_{dtype}"
        if not getattr(common, f"memory_efficient_{dtype}"):
            continue
        if not getattr(common, dtype):
            raise ValueError(
                f"{option}: true, but common.{dtype} is false, and the run would train in another precision; "
                f"set common.{dtype}=true as well"
            )
        return f"{option}: no float32 weights are kept, an update below the rounding of {dtype} is lost"
    return ""


class MasterWeights:
    """The float32 weights behind a half-precision model.

    fairseq casts the model, makes the optimizer's float32 copy ("master weights") from the cast weights, and saves only
    the cast model. Here master weights start as the weights before the cast, a checkpoint holds them instead of the
    cast weights, and loading restores them.

    Args:
        model: the model before the cast.
        criterion: the criterion before the cast.
    """

    def __init__(self, model: nn.Module, criterion: nn.Module) -> None:
        self._modules = {"model": model, "criterion": criterion}
        # Casting gives parameters new storage; this one does not change.
        self._known = {part: {k: p.detach() for k, p in self._saved(part)} for part in self._modules}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Records the weights to be loaded into model and criterion, before they are rounded."""
        with contextlib.ExitStack() as stack:
            for part, module in self._modules.items():
                handle = module._register_load_state_dict_pre_hook(functools.partial(self._note, part))
                stack.callback(handle.remove)
            yield

    def restore(self, optimizer: Any) -> None:
        """Copies the recorded weights to the optimizer, once."""
        known, self._known = self._known, {}
        masters = _masters(optimizer)
        for part, state in known.items():
            for name, parameter in self._saved(part):
                if id(parameter) in masters and name in state:
                    masters[id(parameter)].copy_(state[name])

    def follow(self, optimizer: Any, parameter: Tensor) -> None:
        """Copies a changed weight of the model, one that is not cast, to the optimizer."""
        master = _masters(optimizer).get(id(parameter))
        if master is not None:
            master.copy_(parameter.detach())

    def fill(self, state: Dict[str, Any], optimizer: Any) -> None:
        """Replaces the cast weights in a checkpoint by the master weights."""
        masters = _masters(optimizer)
        for part in self._modules:
            for name, parameter in self._saved(part):
                if id(parameter) in masters:
                    state[part][name] = masters[id(parameter)]

    def _saved(self, part: str) -> Iterator[Tuple[str, Tensor]]:
        yield from self._modules[part].state_dict(keep_vars=True).items()

    def _note(self, part: str, state: Dict[str, Tensor], *others: Any) -> None:
        self._known[part] = dict(state)


def _masters(optimizer: Any) -> Dict[int, Tensor]:
    """Float32 weights by the parameter's id."""
    if not isinstance(optimizer, FP16Optimizer):
        return {}
    if not isinstance(optimizer.fp32_params, dict):
        return {id(p): master.data for p, master in zip(optimizer.fp16_params, optimizer.fp32_params)}
    found, offsets = {}, dict.fromkeys(optimizer.fp32_params, 0)
    for p in optimizer.fp16_params:  # one flat tensor per device
        begin = offsets[p.device.index]
        offsets[p.device.index] += p.numel()
        flat = optimizer.fp32_params[p.device.index].data
        found[id(p)] = flat[begin : offsets[p.device.index]].view_as(p)
    return found


def load_moments_exactly(optimizer: Any) -> None:
    """Makes ``common.memory_efficient_*`` load its moments in the precision in which they were saved.

    torch casts them to the parameters' half precision; fairseq's workaround fails with ``composite``:
    "'CompositeOptimizer' object has no attribute 'param_groups'".
    """
    if not isinstance(optimizer, MemoryEfficientFP16Optimizer):
        return
    load = optimizer.load_state_dict
    optimizer.optimizer.disable_mem_eff_fp16_loading_hack = True

    def load_state_dict(state: Dict[str, Any], optimizer_overrides: Any = None) -> None:
        load(state, optimizer_overrides)
        groups = getattr(optimizer.wrapped_optimizer, "optimizers", None)
        for inner, saved in (
            [(optimizer.wrapped_optimizer, state)] if groups is None else [(o, state[k]) for k, o in groups.items()]
        ):
            parameters = [p for group in inner.param_groups for p in group["params"]]
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            for number, parameter in zip(numbers, parameters):
                for name, value in saved["state"].get(number, {}).items():
                    moved = value.to(parameter.device) if torch.is_tensor(value) else value
                    inner.optimizer.state[parameter][name] = moved

    optimizer.load_state_dict = load_state_dict


def scaler_state(optimizer: Any) -> Dict[str, int]:
    """The state of fairseq's loss scaler up to its next rise; fairseq saves only the scale."""
    scaler = getattr(optimizer, "scaler", None)
    return {name: getattr(scaler, name) for name in _SCALER if hasattr(scaler, name)}


def load_scaler_state(optimizer: Any, state: Dict[str, int]) -> None:
    """Restores the result of :func:`scaler_state`."""
    for name, value in state.items():
        if name in _SCALER and hasattr(optimizer.scaler, name):
            setattr(optimizer.scaler, name, value)
