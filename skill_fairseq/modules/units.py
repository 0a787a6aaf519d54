"""Kinds of prunable units: where their gates are, and how to cut them.

To add a kind, decorate a subclass of :class:`PrunableUnit` with :func:`register_unit`; ``model.pruning_units`` then
accepts its name. If its gates need modules that the encoder lacks, :meth:`PrunableUnit.build` adds them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Dict, Iterator, List, NamedTuple, Optional, Sequence, Type, TypeVar

import torch
from torch import Tensor, nn

from skill_fairseq.modules.cutting import State, cut_inputs, cut_outputs, keys_of

if TYPE_CHECKING:
    from skill_fairseq.modules.config import EncoderConfig
    from skill_fairseq.modules.size import Number, Widths

_T = TypeVar("_T")
_U = TypeVar("_U", bound="Type[PrunableUnit]")


class Site(NamedTuple):
    """The place of a vector of gates.

    Attributes:
        place: index of these units in the kind's widths.
        owner: path in the encoder of the module that applies the gates.
        num_units: number of units.
        attribute: the owner's attribute for the gates.
    """

    place: int
    owner: str
    num_units: int
    attribute: str = "gate"


class PrunableUnit:
    """A kind of unit.

    Attributes:
        name: its name in ``model.pruning_units`` and in :data:`skill_fairseq.modules.size.Widths`.
        field: field of :class:`EncoderConfig` with the remaining units; None: ``unit_widths[name]``.
        drop_rate: field of the student's config with the gates' initial drop rate.
        least: number of units that must stay.
        multiple: a forward computes them in multiples of this number, see :class:`HardConcrete`.
        label: readable name, for tables; None: not shown separately.
        per_row: entries of its widths per row of tables.
        rows: what a row belongs to, for tables.
        first: number of the first entry, for tables.
    """

    name: ClassVar[str]
    field: ClassVar[Optional[str]] = None
    drop_rate: ClassVar[str] = "layer_drop_rate"
    least: ClassVar[int] = 0
    multiple: ClassVar[int] = 1
    label: ClassVar[Optional[str]] = None
    per_row: ClassVar[int] = 1
    rows: ClassVar[str] = "layer"
    first: ClassVar[int] = 1

    def full(self, config: EncoderConfig) -> List[int]:
        """Widths before any pruning."""
        raise NotImplementedError

    def left(self, config: EncoderConfig) -> List[Optional[int]]:
        """The actual widths; None where the sublayer has been removed."""
        return list(config.unit_widths.get(self.name) or self.full(config))

    def by_row(self, column: Sequence[_T]) -> List[Sequence[_T]]:
        """The entries of its widths by row of tables."""
        return [column[i : i + self.per_row] for i in range(0, len(column), self.per_row)]

    def smallest(self, config: EncoderConfig) -> List[int]:
        """Widths with every closable gate closed."""
        return [self.least] * len(self.full(config))

    def build(self, encoder: nn.Module) -> None:
        """Adds modules to a new encoder that can hold these gates, or the remaining units, of ``encoder.config``."""

    def convert(self, config: EncoderConfig, state: State) -> None:
        """Converts, in place, the state of an encoder without these units for :meth:`build`'s modules."""

    def sites(self, encoder: Any) -> Iterator[Site]:
        """The places of gates in a :class:`SpeechEncoder`, possibly some without units."""
        raise NotImplementedError

    def cut(self, encoder: Any, site: Site, kept: Tensor, factor: Tensor, state: State, shape: Dict[str, Any]) -> None:
        """Removes all units but some.

        Args:
            encoder: the :class:`SpeechEncoder` before any cut.
            site: the units.
            kept: (k,) ascending indices of the units to keep.
            factor: (k,) values of their gates, to fold into weights.
            state: state dict without gates, after earlier cuts; changed in place by replacing tensors, not by writing
                to them. Entries that the smaller encoder lacks may stay.
            shape: the fields ``conv_channels``, ``heads``, ``ffn_dims`` and ``unit_widths`` of the smaller encoder's
                config; changed in place.
        """
        raise NotImplementedError

    def finish(self, encoder: Any, state: State, shape: Dict[str, Any]) -> None:
        """Called after all cuts of all kinds if the encoder has such units, gated or not; see :meth:`cut`."""

    def scores(self, encoder: Any, site: Site) -> Tensor:
        """(num_units,) scores for magnitude pruning.

        Raises:
            ValueError: this kind has no score.
        """
        raise ValueError(f"units: {self.name!r} has no magnitude score; choose among conv, heads, ffn, rank")

    def parameters(self, config: EncoderConfig, widths: Widths) -> Number:
        """Change in the number of parameters compared to an encoder without these units."""
        return 0

    def macs(self, config: EncoderConfig, widths: Widths, frames: int) -> Number:
        """Change in the multiply-accumulates of a forward over this many frames."""
        return 0


UNITS: Dict[str, PrunableUnit] = {}
"""Kinds of units by name, in the order of widths and of cutting: a whole sublayer after its parts."""


def register_unit(kind: _U) -> _U:
    """Class decorator that registers a kind of units under its ``name``."""
    UNITS[kind.name] = kind()
    return kind


def units_of(config: EncoderConfig) -> List[PrunableUnit]:
    """The kinds that an encoder has: the built-in ones always, others if pruned or gated."""
    names = {*config.unit_widths, *config.pruning_units}
    return [unit for unit in UNITS.values() if unit.field or unit.name in names]


def new_units(config: EncoderConfig, before: EncoderConfig) -> List[PrunableUnit]:
    """The kinds that an encoder has and the shape ``before`` lacks."""
    had = units_of(before)
    return [unit for unit in units_of(config) if unit not in had]


def with_units(config: EncoderConfig, state: State, before: EncoderConfig) -> State:
    """Converts the state of an encoder of shape ``before`` for one with the units of ``config``, without gates."""
    state = dict(state)
    for unit in new_units(config, before):
        unit.convert(config, state)
    return state


@register_unit
class ConvChannels(PrunableUnit):
    """Output channels of the convolutions, gated after the activation."""

    name, field, drop_rate = "conv", "conv_channels", "conv_drop_rate"
    least, multiple = 1, 8
    label, rows, first = "conv channels", "convolution", 0

    def full(self, config: EncoderConfig) -> List[int]:
        return [channels for channels, _, _ in config.conv_feature_layers]

    def left(self, config: EncoderConfig) -> List[Optional[int]]:
        return list(config.conv_channels or ())

    def smallest(self, config: EncoderConfig) -> List[int]:
        smallest = super().smallest(config)
        return smallest if config.feature_linear else [*smallest[:-1], config.encoder_embed_dim]

    def sites(self, encoder: Any) -> Iterator[Site]:
        layers = encoder.feature_extractor.layers
        # Without a linear map after them, the last channels are the model's features.
        for i, layer in enumerate(layers if encoder.config.feature_linear else layers[:-1]):
            yield Site(i, f"feature_extractor.layers.{i}", layer.conv.out_channels)

    def cut(self, encoder: Any, site: Site, kept: Tensor, factor: Tensor, state: State, shape: Dict[str, Any]) -> None:
        if not len(kept):
            raise ValueError(
                f"{site.owner}: all channels are closed, so no audio can pass; train longer with a lower "
                "criterion.target_sparsity, or give shrink() a sparsity"
            )
        layers = encoder.feature_extractor.layers
        layer, after = layers[site.place], site.place + 1
        cut_outputs(state, f"{site.owner}.conv", layer.conv, kept)
        cut_outputs(state, f"{site.owner}.norm", layer.norm, kept)
        if after < len(layers):
            cut_inputs(state, f"feature_extractor.layers.{after}.conv", layers[after].conv, kept, factor)
        else:  # a LayerNorm may follow, into which gates cannot be folded
            state["feature_extractor.scale"] = state["feature_extractor.scale"][kept] * factor
            projection = encoder.feature_projection
            if projection.norm is not None:
                cut_outputs(state, "feature_projection.norm", projection.norm, kept)
            cut_inputs(state, "feature_projection.linear", projection.linear, kept, torch.ones_like(factor))
        shape["conv_channels"][site.place] = len(kept)

    def scores(self, encoder: Any, site: Site) -> Tensor:
        """Norms of the filters."""
        return encoder.get_submodule(site.owner).conv.weight.flatten(1).norm(dim=1)  # type: ignore[no-any-return]


class _SublayerUnit(PrunableUnit):
    """Base class of units of the attention or feed-forward sublayer of each layer.

    Attributes:
        sublayer: "attention" or "ffn".
        output: its last linear map.
    """

    sublayer: ClassVar[str] = "attention"
    output: ClassVar[str] = "out_proj"

    def sites(self, encoder: Any) -> Iterator[Site]:
        for i, layer in enumerate(encoder.transformer.layers):
            module = getattr(layer, self.sublayer)
            if module is not None:
                yield Site(i, f"transformer.layers.{i}.{self.sublayer}", self.number(module))

    def number(self, module: Any) -> int:
        """Units of a sublayer."""
        raise NotImplementedError


@register_unit
class Heads(_SublayerUnit):
    """Attention heads, gated before the output projection."""

    name, field, drop_rate = "heads", "heads", "head_drop_rate"
    label = "heads"

    def full(self, config: EncoderConfig) -> List[int]:
        return [config.encoder_attention_heads] * config.encoder_layers

    def left(self, config: EncoderConfig) -> List[Optional[int]]:
        return [None if heads is None else len(heads) for heads in config.heads or ()]

    def number(self, module: Any) -> int:
        return int(module.heads.numel())

    def cut(self, encoder: Any, site: Site, kept: Tensor, factor: Tensor, state: State, shape: Dict[str, Any]) -> None:
        attention = encoder.get_submodule(site.owner)
        dim = attention.head_dim
        rows = (kept[:, None] * dim + torch.arange(dim, device=kept.device)).flatten()
        for name in ("q_proj", "k_proj", "v_proj"):
            cut_outputs(state, f"{site.owner}.{name}", getattr(attention, name), rows)
        cut_inputs(state, f"{site.owner}.out_proj", attention.out_proj, rows, factor.repeat_interleave(dim))
        shape["heads"][site.place] = attention.heads[kept].tolist()

    def scores(self, encoder: Any, site: Site) -> Tensor:
        """Products of the norms of the rows of ``v_proj`` and the columns of ``out_proj``."""
        attention = encoder.get_submodule(site.owner)
        made, read = attention.v_proj.weight, attention.out_proj.weight.T
        norms = (weight.unflatten(0, (-1, attention.head_dim)).flatten(1).norm(dim=1) for weight in (made, read))
        return next(norms) * next(norms)  # type: ignore[no-any-return]


@register_unit
class FFNUnits(_SublayerUnit):
    """Units of the feed-forward sublayers, gated after the activation."""

    name, field, drop_rate = "ffn", "ffn_dims", "ffn_drop_rate"
    sublayer, output = "ffn", "fc2"
    multiple = 16
    label = "FFN units"

    def full(self, config: EncoderConfig) -> List[int]:
        return [config.encoder_ffn_embed_dim] * config.encoder_layers

    def left(self, config: EncoderConfig) -> List[Optional[int]]:
        return list(config.ffn_dims or ())

    def number(self, module: Any) -> int:
        return int(module.width)

    def cut(self, encoder: Any, site: Site, kept: Tensor, factor: Tensor, state: State, shape: Dict[str, Any]) -> None:
        ffn = encoder.get_submodule(site.owner)
        cut_outputs(state, f"{site.owner}.fc1", ffn.fc1, kept)
        cut_inputs(state, f"{site.owner}.fc2", ffn.fc2, kept, factor)
        shape["ffn_dims"][site.place] = len(kept)

    def scores(self, encoder: Any, site: Site) -> Tensor:
        """Products of the norms of the rows of ``fc1`` and the columns of ``fc2``."""
        ffn = encoder.get_submodule(site.owner)
        return ffn.fc1.weight.norm(dim=1) * ffn.fc2.weight.norm(dim=0)  # type: ignore[no-any-return]


@register_unit
class AttentionLayers(_SublayerUnit):
    """Whole attention sublayers, gated at their output."""

    name, field = "attention_layers", "heads"

    def full(self, config: EncoderConfig) -> List[int]:
        return [1] * config.encoder_layers

    def left(self, config: EncoderConfig) -> List[Optional[int]]:
        assert self.field is not None
        return [int(units is not None) for units in getattr(config, self.field)]

    def sites(self, encoder: Any) -> Iterator[Site]:
        return (site._replace(attribute="output_gate") for site in super().sites(encoder))

    def number(self, module: Any) -> int:
        return 1

    def cut(self, encoder: Any, site: Site, kept: Tensor, factor: Tensor, state: State, shape: Dict[str, Any]) -> None:
        if not len(kept):
            shape[self.field][site.place] = None
            return
        name = f"{site.owner}.{self.output}"
        layer = encoder.get_submodule(name)
        for key in keys_of(state, name, getattr(layer, "outputs", ("weight", "bias"))):
            state[key] = state[key] * factor


@register_unit
class FFNLayers(AttentionLayers):
    """Whole feed-forward sublayers, gated at their output."""

    name, field = "ffn_layers", "ffn_dims"
    sublayer, output = "ffn", "fc2"
