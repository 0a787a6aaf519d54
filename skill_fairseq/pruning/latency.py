"""Measured time as a cost: a table fitted to times of whole students on one machine, interpolated between widths.

An encoder's time is the time of what gates never close plus that of its parts: each attention sublayer by its heads,
each feed-forward sublayer by its units, the conv stack by its multiply-accumulates. A table from `skill-bench table`
has each part at several widths and is linear between them, so that expected widths have a gradient. ZipLM
(arXiv:2302.04089) uses measured tables for other models.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Dict, List

from torch import Tensor

from skill_fairseq.modules.config import UNWRITTEN, EncoderConfig
from skill_fairseq.modules.size import Number, Widths, widths_of
from skill_fairseq.pruning.costs import Cost, register_cost

PARTS = ("conv", "heads", "ffn")
"""Parts of a table and their widths: the conv stack's share of its MACs, a layer's heads, a layer's FFN units."""
SHAPE = (
    "conv_feature_layers",
    "encoder_layers",
    "encoder_embed_dim",
    "encoder_attention_heads",
    "encoder_ffn_embed_dim",
    "relative_position",
    "extractor_mode",
    "time_reduction",
    "reuse_attention",
    "mel_bins",
)
"""Fields of :class:`EncoderConfig` that must equal those of the measured encoder."""


def interpolate(x: Any, knots: Sequence[float], values: Sequence[float]) -> Any:
    """Linear interpolation between knots, constant outside: number to float, tensor to tensor with gradient."""
    result: Any = values[0]
    for left, right, low, high in zip(knots, knots[1:], values, values[1:]):
        slope = (high - low) / (right - left)
        if isinstance(x, Tensor):
            result = result + (x - left).clamp(0.0, right - left) * slope
        else:
            result = result + min(max(x - left, 0.0), right - left) * slope
    return result


def conv_share(config: EncoderConfig, channels: Any) -> Any:
    """The conv stack's multiply-accumulates for these output channels, relative to those before pruning."""
    found: Any = 0
    full: float = 0
    frames, before, before_full = 1.0, config.mel_bins or 1, config.mel_bins or 1  # frames relative to each other
    for out, (most, kernel, stride) in zip(channels, config.conv_feature_layers):
        frames /= stride
        found = found + frames * kernel * before * out
        full += frames * kernel * before_full * most
        before, before_full = out, most
    return found / full


@functools.lru_cache(maxsize=8)
def read_table(text: str) -> Dict[str, Any]:
    """Parses and checks a table.

    Raises:
        ValueError: it is not a table; names the entry.
    """
    try:
        table = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"latency table: not JSON: {error}; give a file of skill-bench table") from error
    if not isinstance(table, dict) or not {"rest_ms", "shape", *PARTS} <= table.keys():
        raise ValueError(
            f"latency table: expected rest_ms, shape, {', '.join(PARTS)}; give a file of skill-bench table"
        )
    for part in PARTS:
        entry: Any = table[part] if isinstance(table[part], dict) else {}
        widths, times = entry.get("widths"), entry.get("ms")
        fine = isinstance(widths, list) and isinstance(times, list) and len(widths) == len(times) > 1
        if not fine or any(not isinstance(v, (int, float)) for v in [*widths, *times]):
            raise ValueError(f"latency table: {part}: expected two lists of numbers, widths and ms, of equal length")
        if any(a >= b for a, b in zip(widths, widths[1:])) or any(a > b for a, b in zip(times, times[1:])):
            raise ValueError(f"latency table: {part}: widths must ascend, and times must not fall")
    return table


def table_text(table: Mapping[str, Any]) -> str:
    """The parts of a table that a cost needs, as JSON."""
    return json.dumps({name: table[name] for name in ("rest_ms", "shape", *PARTS) if name in table}, sort_keys=True)


@register_cost
@dataclasses.dataclass(frozen=True)
class LatencyCost(Cost):
    """Milliseconds of one forward, from a table.

    Attributes:
        table: JSON, see :func:`table_text`; a table's content is converted.
    """

    name = "latency"
    absolute: ClassVar[str] = "latency_ms"
    table: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.table, Mapping):
            object.__setattr__(self, "table", table_text(self.table))
        read_table(self.table)

    def unpruned(self) -> float:
        """Milliseconds before pruning."""
        table = read_table(self.table)
        layers = table["shape"]["encoder_layers"]
        return float(table["rest_ms"] + sum(table[p]["ms"][-1] * (1 if p == "conv" else layers) for p in PARTS))

    def __call__(self, config: EncoderConfig, widths: Widths) -> Number:
        table = read_table(self.table)
        for name in SHAPE:
            mine = json.loads(json.dumps(getattr(config, name)))
            measured = table["shape"].get(name, UNWRITTEN.get(name))
            if mine != measured:
                raise ValueError(
                    f"latency table: measured with {name}={measured}, but this encoder has {mine}; "
                    "measure one of this shape with skill-bench table"
                )
        others = [name for name in config.pruning_units if name not in (*PARTS, "attention_layers", "ffn_layers")]
        if others:
            raise ValueError(
                f"latency table: has no times for the units {others}; remove them from model.pruning_units"
            )
        conv = [*widths["conv"]]
        time = table["rest_ms"] + _time(table, "conv", conv_share(config, conv))
        for part, sublayers in (("heads", "attention_layers"), ("ffn", "ffn_layers")):
            column, present = widths[part], widths.get(sublayers)
            if isinstance(column, Tensor):
                times = _time(table, part, column)
                time = time + (times if present is None else times * present).sum()
            else:
                there = [1] * len(column) if present is None else present
                time += sum(_time(table, part, width) * p for width, p in zip(column, there))
        return time  # type: ignore[no-any-return]

    def __str__(self) -> str:
        return "ms by the latency table"


def _time(table: Mapping[str, Any], part: str, width: Any) -> Any:
    return interpolate(width, table[part]["widths"], table[part]["ms"])


def fit(
    full: EncoderConfig, knots: Mapping[str, Sequence[float]], students: Sequence[EncoderConfig], times: Sequence[float]
) -> Dict[str, Any]:
    """Fits a table to times of whole students: least squares of the relative errors, no part faster when wider.

    Args:
        full: the encoder before pruning.
        knots: for each of :data:`PARTS` its widths in the table, ascending; the first is the narrowest student's.
        students: their shapes.
        times: their milliseconds.
    """
    import numpy as np
    from scipy.optimize import nnls

    rows = [[1.0, *(rise for part in PARTS for rise in _rises(student, part, knots[part]))] for student in students]
    measured = np.asarray(times, dtype=float)
    (rest, *rises), _ = nnls(np.asarray(rows) / measured[:, None], np.ones(len(measured)))
    table: Dict[str, Any] = {"rest_ms": float(rest), "shape": {name: getattr(full, name) for name in SHAPE}}
    for part in PARTS:
        own, rises = rises[: len(knots[part]) - 1], rises[len(knots[part]) - 1 :]
        table[part] = {"widths": list(knots[part]), "ms": [0.0, *np.cumsum(own).tolist()]}
    return table


def _rises(student: EncoderConfig, part: str, knots: Sequence[float]) -> List[float]:
    """How far a student's parts rise between neighbouring knots, 1 if all the way, summed over its layers."""
    column = widths_of(student)[part]
    widths = [float(w) for w in ([conv_share(student, column)] if part == "conv" else column)]
    pairs = zip(knots, knots[1:])
    return [sum(min(max(w - low, 0.0), high - low) for w in widths) / (high - low) for low, high in pairs]
