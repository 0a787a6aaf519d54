"""The rank of linear maps as prunable units: one gate per component of the singular value decomposition."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from skill_fairseq.modules.cutting import State
from skill_fairseq.modules.low_rank import LowRankLinear, factorise, is_thin
from skill_fairseq.modules.units import PrunableUnit, Site, register_unit

if TYPE_CHECKING:
    from skill_fairseq.modules.config import EncoderConfig
    from skill_fairseq.modules.size import Number, Widths

LINEARS = (
    *(("attention", name) for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
    *(("ffn", name) for name in ("fc1", "fc2")),
)
"""The linear maps of a layer: sublayer and name. One side has the model's width, the other follows the remaining heads
or FFN units."""
HEADED = 4
"""The number of attention's linear maps, which come first."""


@register_unit
class Rank(PrunableUnit):
    """Components of the six linear maps of each layer, in the order of :data:`LINEARS`.

    A gated map of m outputs and n inputs is two matrices with ``r (m + n)`` weights in total. After cutting it stays so
    if this is less than one matrix of m n weights; otherwise it becomes their product, with the full rank as its entry.

    Sizes are exact for integer widths: ``min(r (m + n), m n)`` per map. Tensor widths apply this to expectations. With
    independent gates this is the expectation if one form is certainly the smaller, and otherwise an upper bound. Where
    one matrix is smaller, dropping a component saves nothing; the gradient of r is nevertheless the saving in two
    matrices, because otherwise gates of a full-rank map would never begin to close.
    """

    name = "rank"
    drop_rate = "rank_drop_rate"
    multiple = 8
    label = "ranks (q k v out fc1 fc2)"
    per_row = len(LINEARS)

    def full(self, config: EncoderConfig) -> List[int]:
        dim = config.encoder_embed_dim
        return ([dim] * HEADED + [min(dim, config.encoder_ffn_embed_dim)] * 2) * config.encoder_layers

    def left(self, config: EncoderConfig) -> List[Optional[int]]:
        there = [bool(units) for pair in zip(config.heads or (), config.ffn_dims or ()) for units in _six(pair)]
        return [width if some else None for width, some in zip(super().left(config), there)]

    def build(self, encoder: Any) -> None:
        for owner, _, name, rank in self._places(encoder):
            linear = getattr(owner, name)
            held = self._held(encoder.config, rank, linear.out_features, linear.in_features)
            if held is not None:
                setattr(owner, name, LowRankLinear(linear.in_features, linear.out_features, held))

    def convert(self, config: EncoderConfig, state: State) -> None:
        for place, rank in enumerate(self.left(config)):
            path = _path(place)
            if rank is None or f"{path}.weight" not in state:
                continue
            held = self._held(config, rank, *state[f"{path}.weight"].shape)
            if held is not None:
                up, down = factorise(state.pop(f"{path}.weight"), held)
                state.update({f"{path}.up.weight": up, f"{path}.down.weight": down})
                state[f"{path}.up.bias"] = state.pop(f"{path}.bias")

    def sites(self, encoder: Any) -> Iterator[Site]:
        for owner, place, name, _ in self._places(encoder):
            linear = getattr(owner, name)
            if isinstance(linear, LowRankLinear):
                yield Site(place, _path(place), linear.rank)

    def cut(self, encoder: Any, site: Site, kept: Tensor, factor: Tensor, state: State, shape: Dict[str, Any]) -> None:
        up, down = f"{site.owner}.up.weight", f"{site.owner}.down.weight"
        state[up], state[down] = state[up][:, kept] * factor, state[down][kept]
        shape["unit_widths"].setdefault(self.name, self.full(encoder.config))[site.place] = len(kept)

    def finish(self, encoder: Any, state: State, shape: Dict[str, Any]) -> None:
        """Merges into one matrix if that is smaller."""
        full = self.full(encoder.config)
        widths = shape["unit_widths"].setdefault(self.name, list(full))
        for place in range(len(full)):
            path = _path(place)
            if f"{path}.up.bias" in state:  # a map without inputs keeps it
                state[f"{path}.bias"] = state[f"{path}.up.bias"]
            if f"{path}.up.weight" not in state:
                continue
            up, down = state[f"{path}.up.weight"], state[f"{path}.down.weight"]
            if not is_thin(up.size(1), up.size(0), down.size(1)):
                state[f"{path}.weight"] = (up.double() @ down.double()).to(up.dtype)
                widths[place] = full[place]
        if widths == full:
            del shape["unit_widths"][self.name]

    def scores(self, encoder: Any, site: Site) -> Tensor:
        """Products of the norms of a component's output and input vectors: singular values."""
        linear = encoder.get_submodule(site.owner)
        return linear.up.weight.norm(dim=0) * linear.down.weight.norm(dim=1)  # type: ignore[no-any-return]

    def parameters(self, config: EncoderConfig, widths: Widths) -> Number:
        """Weights of the maps less those of single matrices."""
        ranks, dim = widths[self.name], config.encoder_embed_dim
        columns = [_column(widths, name) for name in ("heads", "ffn", "attention_layers", "ffn_layers")]
        if isinstance(ranks, Tensor):  # a few operations for all layers
            heads, ffn, *present = (torch.as_tensor(column).unsqueeze(1) for column in columns)
            by_layer = ranks.view(-1, len(LINEARS))
            parts = zip(by_layer.split([HEADED, 2], 1), (heads * config.head_dim, ffn), present)
            return sum((there * _saved(rank, width, dim)).sum() for rank, width, there in parts)
        total: Number = 0
        for layer, (heads, ffn, *present) in enumerate(zip(*columns)):
            inner, there = _six((heads * config.head_dim, ffn)), _six(present)
            mine = ranks[len(LINEARS) * layer :]
            total += sum(p * _saved(r, width, dim) for r, width, p in zip(mine, inner, there))
        return total

    def macs(self, config: EncoderConfig, widths: Widths, frames: int) -> Number:
        return frames * self.parameters(config, widths)

    def _places(self, encoder: Any) -> Iterator[Tuple[nn.Module, int, str, int]]:
        """Yields the module of each linear map, its entry of widths, its name there and its rank."""
        for place, rank in enumerate(self.left(encoder.config)):
            layer, linear = divmod(place, len(LINEARS))
            sublayer, name = LINEARS[linear]
            if rank is not None:
                yield getattr(encoder.transformer.layers[layer], sublayer), place, name, rank

    def _held(self, config: EncoderConfig, rank: int, outputs: int, inputs: int) -> Optional[int]:
        """The rank of the two matrices of a linear map; None for one matrix."""
        if self.name not in config.unit_widths:  # full rank, for gates
            return min(rank, outputs, inputs)
        return rank if is_thin(rank, outputs, inputs) else None


def _path(place: int) -> str:
    layer, linear = divmod(place, len(LINEARS))
    return f"transformer.layers.{layer}.{'.'.join(LINEARS[linear])}"


def _six(pair: Sequence[Any]) -> List[Any]:
    """The heads or FFN units of a layer, for each of its linear maps."""
    return [pair[0]] * HEADED + [pair[1]] * (len(LINEARS) - HEADED)


def _column(widths: Widths, name: str) -> Any:
    """Widths of a kind; without widths of whole sublayers, all exist."""
    return widths[name] if name in widths else [1] * len(widths["heads"])


def _saved(rank: Any, inner: Any, dim: int) -> Any:
    """Weights of two matrices less those of one, at most 0; see :class:`Rank` for the gradient."""
    thin, dense = rank * (inner + dim), inner * dim
    if not any(isinstance(x, Tensor) for x in (thin, dense)):
        return min(thin - dense, 0)
    pull = (rank - rank.detach()) * torch.as_tensor(inner + dim).detach() if isinstance(rank, Tensor) else 0 * dense
    return torch.where(torch.as_tensor(thin < dense), thin - dense, pull)
