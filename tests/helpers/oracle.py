"""Tensors and numbers of oracle/related.json, described in its ``about``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

RELATED = json.loads((Path(__file__).parents[1] / "oracle" / "related.json").read_text())


def tensor(spec: dict[str, Any]) -> Tensor:
    """The float64 tensor of a description {shape, k, p, scale, offset}."""
    shape, k, p = spec["shape"], spec["k"], spec["p"]
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    values = (k * n + p).sin() + 0.5 * (0.61 * n + 0.017 * n**2 + p**2).cos()
    return (spec["offset"] + spec["scale"] * values).view(shape)


def tensors(specs: dict[str, Any]) -> dict[str, Tensor]:
    """All of a group by name."""
    return {name: tensor(spec) for name, spec in specs.items()}


def near(number: Any, rel: float = 1e-5) -> Any:
    """Checks equality to the reference's precision."""
    return pytest.approx(number, rel=rel, abs=1e-6)


def agrees(found: Tensor, summary: dict[str, Any]) -> bool:
    """Checks a tensor's {shape, sum, norm, first, last}."""
    flat = found.detach().double().flatten()
    return (
        list(found.shape) == summary["shape"]
        and flat.sum().item() == pytest.approx(summary["sum"], rel=1e-5, abs=1e-5)
        and flat.norm().item() == near(summary["norm"])
        and flat[: len(summary["first"])].tolist() == near(summary["first"])
        and flat[-len(summary["last"]) :].tolist() == near(summary["last"])
    )
