"""Groups of layers: reading and checking them, their mean representations, and the projections on top.

Layers are numbered as hidden states are: 0 before the positional convolution, i after Transformer layer i.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

Groups = tuple[tuple[int, ...], ...]


def parse_groups(value: Any, num_layers: int, field: str = "criterion.groups") -> Groups:
    """Checks groups of teacher layers as a config holds them.

    Args:
        value: sequence of sequences of ints (lists, tuples, omegaconf's), such as ``[[0], [4], [8], [12]]``.
        num_layers: Transformer layers of the teacher; valid are the layers 0 to ``num_layers``.
        field: where the value comes from, for messages.

    Returns:
        The groups, in the order given.

    Raises:
        ValueError: if there is no group, a group is empty or no sequence of ints, or a layer does not exist
            or appears twice.
    """
    remedy = f"give groups of layers 0..{num_layers}, each layer at most once, such as [[0],[{num_layers}]]"
    if not _is_sequence(value) or not len(value):
        raise ValueError(f"{field} is {_shown(value)}, but must be a list of at least one group; {remedy}")
    seen: set[int] = set()
    for group in value:
        if not _is_sequence(group) or not len(group):
            raise ValueError(f"{field} has the group {_shown(group)}, which is no list of layers; {remedy}")
        for layer in group:
            if isinstance(layer, bool) or not isinstance(layer, int):
                raise ValueError(f"{field} names the layer {_shown(layer)}, which is no integer; {remedy}")
            if not 0 <= layer <= num_layers:
                raise ValueError(f"{field} names layer {layer}, which the teacher has not; {remedy}")
            if layer in seen:
                raise ValueError(f"{field} names layer {layer} twice in {_shown(value)}; {remedy}")
            seen.add(layer)
    return tuple(tuple(group) for group in value)


def map_groups(groups: Groups, teacher_layers: int, student_layers: int) -> Groups:
    """Groups for a student of another depth: layer i becomes ``i student_layers / teacher_layers``.

    Rounded half up, but never from a Transformer layer to layer 0, the convolutional features (our choice).
    Layers of a group that meet in one student layer count once; two groups may share a student layer. At
    equal depth the groups stay as they are.
    """

    def mapped(layer: int) -> int:
        nearest = (2 * layer * student_layers + teacher_layers) // (2 * teacher_layers)
        return max(nearest, min(layer, 1))

    return tuple(tuple(dict.fromkeys(mapped(layer) for layer in group)) for group in groups)


class GroupMeanAccumulator:
    """Means over groups of layers from states that come one by one; keeps one sum a group, no states.

    Sums of lower precision are kept in float32 (a sum of layers can overflow float16); the means have the
    states' dtype again. The mean over one layer is that layer's state itself. Differentiable.

    >>> accumulator = GroupMeanAccumulator([(0,), (1, 2)])
    >>> for layer in range(3):
    ...     accumulator.add(layer, torch.full((1, 1, 1), float(layer)))
    >>> [mean.item() for mean in accumulator.means()]
    [0.0, 1.5]
    """

    def __init__(self, groups: Sequence[Sequence[int]]) -> None:
        self._groups = groups
        self._missing = [set(group) for group in groups]
        self._sums: list[Tensor | None] = [None] * len(groups)
        self._dtype: torch.dtype | None = None

    def add(self, layer: int, state: Tensor) -> None:
        """Takes the state of a layer, (B, T, D). Layers of no group are passed over.

        Raises:
            ValueError: if the layer was added before.
        """
        self._dtype = state.dtype
        for index, group in enumerate(self._groups):
            if layer not in group:
                continue
            if layer not in self._missing[index]:
                raise ValueError(f"layer {layer} was added before; use a new accumulator for every batch")
            self._missing[index].remove(layer)
            total = self._sums[index]
            if len(group) > 1 and state.dtype in (torch.float16, torch.bfloat16):
                state = state.float()
            self._sums[index] = state if total is None else total + state

    def means(self) -> list[Tensor]:
        """The mean of each group, (B, T, D), in the groups' order.

        Raises:
            ValueError: if a layer of a group was not added.
        """
        means = []
        for group, missing, total in zip(self._groups, self._missing, self._sums):
            if missing or total is None:
                raise ValueError(f"layers {sorted(missing)} of group {list(group)} were not added")
            means.append(total if len(group) == 1 else (total / len(group)).to(self._dtype))
        return means


def group_means(hidden_states: Sequence[Tensor], groups: Sequence[Sequence[int]]) -> list[Tensor]:
    """Mean representation of each group of layers (SKILL, arXiv:2402.16830).

    Args:
        hidden_states: (B, T, D) of each layer, from layer 0 on.
        groups: the layers of each group.

    Returns:
        One (B, T, D) tensor a group, as :class:`GroupMeanAccumulator` computes it.

    Raises:
        ValueError: if a group names a layer that is not among the states.
    """
    accumulator = GroupMeanAccumulator(groups)
    for layer, state in enumerate(hidden_states):
        accumulator.add(layer, state)
    return accumulator.means()


def parse_sharing(value: Any, num_groups: int, field: str = "criterion.projection_sharing") -> tuple[int, ...]:
    """Which projection each group uses.

    Args:
        value: "none" or None (one projection a group), "all" (one for all), or the index of the projection
            for each group: DPHuBERT, whose layers 4, 8 and 12 share one, is ``[0, 1, 1, 1]``.
        num_groups: number of groups.
        field: where the value comes from, for messages.

    Raises:
        ValueError: if the value is none of these, or a list that leaves out an index.
    """
    if value is None or value == "none":
        return tuple(range(num_groups))
    if value == "all":
        return (0,) * num_groups
    remedy = f"give 'none', 'all', or {num_groups} indices from 0 without gaps, such as [0,1,1,1]"
    if not _is_sequence(value) or len(value) != num_groups:
        raise ValueError(f"{field} is {_shown(value)}, which does not fit {num_groups} groups; {remedy}")
    if any(isinstance(index, bool) or not isinstance(index, int) for index in value):
        raise ValueError(f"{field} is {_shown(value)}, which are not all integers; {remedy}")
    if set(value) != set(range(max(value) + 1)):
        raise ValueError(f"{field} is {_shown(value)}, whose indices have gaps; {remedy}")
    return tuple(value)


class GroupProjections(nn.Module):
    """Projects the student's group means to the teacher's dimension; groups may share a projection.

    A linear projection starts as the identity with zero bias, so that training starts from the student's own
    representation. Where the dimensions differ its weight starts with ones on the diagonal: the first
    ``min(dim_student, dim_teacher)`` features pass, the other outputs start at zero.

    Args:
        groups: the layers of each group.
        dim_student: dimension of the student's states.
        dim_teacher: dimension of the teacher's states.
        kind: "linear", or "identity" for no projection.
        sharing: see :func:`parse_sharing`.

    Raises:
        ValueError: if ``kind`` or ``sharing`` is invalid, or dimensions differ where ``kind`` is "identity".
    """

    def __init__(
        self,
        groups: Sequence[Sequence[int]],
        dim_student: int,
        dim_teacher: int,
        kind: str = "linear",
        sharing: None | str | Sequence[int] = None,
    ) -> None:
        super().__init__()
        if kind not in ("linear", "identity"):
            raise ValueError(f"criterion.projection is {kind!r}, but must be 'linear' or 'identity'")
        if kind == "identity" and dim_student != dim_teacher:
            raise ValueError(
                f"criterion.projection=identity needs equal dimensions, but the student has {dim_student} "
                f"and the teacher {dim_teacher}; set criterion.projection=linear"
            )
        self.sharing = parse_sharing(sharing, len(groups))
        self.projections = nn.ModuleList(
            nn.Linear(dim_student, dim_teacher) if kind == "linear" else nn.Identity()
            for _ in range(max(self.sharing) + 1)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for projection in self.projections:
            if isinstance(projection, nn.Linear):
                nn.init.eye_(projection.weight)
                nn.init.zeros_(projection.bias)

    def forward(self, means: Sequence[Tensor]) -> list[Tensor]:
        """(B, T, dim_student) a group -> (B, T, dim_teacher) a group.

        Raises:
            ValueError: if there are more or fewer means than groups.
        """
        if len(means) != len(self.sharing):
            raise ValueError(f"{len(means)} means were given for {len(self.sharing)} groups; give one each")
        return [self.projections[index](mean) for index, mean in zip(self.sharing, means)]


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _shown(value: Any) -> str:
    """A config value on one line; omegaconf's lists look like lists. What is long or deep is cut."""
    return _SHORT.repr(_plain(value))


def _plain(value: Any, depth: int = 0) -> Any:
    if not _is_sequence(value):
        return value
    return [_plain(item, depth + 1) for item in value[:100]] if depth < 3 else "..."


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxstring, _SHORT.maxother = 3, 30, 100, 100
