"""Refuses unusable numbers in a config before the first update."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Tuple

LARGEST = 1e30
"""Products of larger float32 numbers soon overflow; no field of a training needs them."""

BLOCKS = ("common", "criterion", "dataset", "model", "optimization", "optimizer", "lr_scheduler", "task")

FAIRSEQS_RATE = [0.25]
"""Default of ``optimization.lr``, which means that it is not set."""


def check_values(cfg: Mapping[str, Any]) -> None:
    """Refuses numbers that are NaN, infinite or absurd, and an unused learning rate.

    Args:
        cfg: fairseq's whole config, plain.

    Raises:
        ValueError: names the field, its value and the expectation.
    """
    for block in BLOCKS:
        for name, value in _numbers(cfg.get(block), block):
            if not math.isfinite(value) or abs(value) > LARGEST:
                raise ValueError(f"{name}: {value}; expected a finite number, at most {LARGEST:g}")
    optimization = cfg["optimization"]
    for field, least in (("lr", 0), ("update_freq", 1), ("clip_norm", 0), ("max_update", 0)):
        for name, value in _numbers(optimization.get(field), f"optimization.{field}"):
            if value < least:
                raise ValueError(f"{name}: {value}; expected at least {least}")
    check_rate(cfg)


def check_rate(cfg: Mapping[str, Any]) -> None:
    """Refuses an ``optimization.lr`` that no optimizer group uses: it would have no effect.

    Raises:
        ValueError: names the rates in use.
    """
    groups, given = (cfg.get("optimizer") or {}).get("groups") or {}, list(cfg["optimization"]["lr"])
    for name, group in groups.items():  # fairseq does not check their types
        rate = group.get("lr_float")
        if rate is not None and (isinstance(rate, bool) or not isinstance(rate, (int, float))):
            raise ValueError(f"optimizer.groups.{name}.lr_float: {rate!r}; expected a number")
    rates = {
        name: list(group.get("lr") or given) if group.get("lr_float") is None else [group["lr_float"]]
        for name, group in groups.items()
    }
    if groups and given != FAIRSEQS_RATE and given not in rates.values():
        shown = ", ".join(f"{name} {rate[0]:g}" for name, rate in rates.items())
        raise ValueError(
            f"optimization.lr: {given} is not the rate of any optimizer group ({shown}) and would have no effect; set "
            f"optimizer.groups.default.lr_float={given[0]:g}, or optimization.lr=[{rates.get('default', given)[0]:g}]"
        )


def _numbers(value: Any, name: str) -> Iterator[Tuple[str, float]]:
    if isinstance(value, bool):
        return
    if isinstance(value, (int, float)):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _numbers(item, f"{name}[{index}]")
