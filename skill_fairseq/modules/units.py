"""The kinds of units that gates can close, each described once: where its gates sit, what cutting them means.

A kind of your own is a subclass of :class:`PrunableUnit` under :func:`register_unit`; ``model.pruning_units`` then
takes its name. Where its gates need modules that the encoder does not have, :meth:`PrunableUnit.build` puts them in.
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
    """Where one vector of gates sits.

    Attributes:
        place: which entry of the kind's widths these units are.
        owner: path in the encoder of the module that applies the gates.
        num_units: how many units there are.
        attribute: of the owner, which holds the gates.
    """

    place: int
    owner: str
    num_units: int
    attribute: str = "gate"


class PrunableUnit:
    """One kind of unit.

    Attributes:
        name: its name in ``model.pruning_units``, and of its widths in :data:`skill_fairseq.modules.size.Widths`.
        field: field of :class:`EncoderConfig` with what is left; None: ``unit_widths[name]``.
        drop_rate: field of the student's config with the gates' initial drop rate.
        least: units that cannot go.
        multiple: a forward computes them in multiples of this number, see :class:`HardConcrete`.
        label: what people call the units, for tables; None: they are not shown by themselves.
        per_row: entries of its widths to a line of tables.
        rows: what an entry of its widths belongs to, for tables.
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
        """Widths as they are; None where what they are part of has been removed."""
        return list(config.unit_widths.get(self.name) or self.full(config))

    def by_row(self, column: Sequence[_T]) -> List[Sequence[_T]]:
        """The entries of a column of its widths, line by line of tables."""
        return [column[i : i + self.per_row] for i in range(0, len(column), self.per_row)]

    def smallest(self, config: EncoderConfig) -> List[int]:
        """Widths if every gate closed that may close."""
        return [self.least] * len(self.full(config))

    def build(self, encoder: nn.Module) -> None:
        """Puts modules into a new encoder, as ``encoder.config`` says, that can hold these gates, or what they left."""

    def convert(self, config: EncoderConfig, state: State) -> None:
        """Changes the state of an encoder without these units to what :meth:`build`'s modules load, in place."""

    def sites(self, encoder: Any) -> Iterator[Site]:
        """Where gates go in a :class:`SpeechEncoder`; places without units may be among them."""
        raise NotImplementedError

    def cut(self, encoder: Any, site: Site, kept: Tensor, factor: Tensor, state: State, shape: Dict[str, Any]) -> None:
        """Cuts all but some units out.

        Args:
            encoder: the :class:`SpeechEncoder` before any cut.
            site: which units.
            kept: (k,) ascending indices of those that stay.
            factor: (k,) values of their gates, to be folded into weights.
            state: of the encoder without gates, as the cuts of other units have left it; changed in place. Tensors are
                replaced, not written to. What the smaller encoder does not have may stay in it.
            shape: the fields ``conv_channels``, ``heads``, ``ffn_dims`` and ``unit_widths`` of the smaller encoder's
                config; changed in place.
        """
        raise NotImplementedError

    def finish(self, encoder: Any, state: State, shape: Dict[str, Any]) -> None:
        """Called after all cuts, of whatever kinds, if the encoder has such units, gated or not; see :meth:`cut`."""

    def scores(self, encoder: Any, site: Site) -> Tensor:
        """(num_units,) how much each unit weighs, for pruning by magnitude.

        Raises:
            ValueError: no score is known.
        """
        raise ValueError(f"units: {self.name!r} has no score by magnitude; choose out of conv, heads, ffn, rank")

    def parameters(self, config: EncoderConfig, widths: Widths) -> Number:
        """What these units change in the number of parameters of an encoder that does not have them."""
        return 0

    def macs(self, config: EncoderConfig, widths: Widths, frames: int) -> Number:
        """What they change in the multiply-accumulates of a forward over so many frames."""
        return 0


UNITS: Dict[str, PrunableUnit] = {}
"""Kinds of units by name. Their order is that of the widths, and of cutting: a whole sublayer after its parts."""


def register_unit(kind: _U) -> _U:
    """Class decorator: makes a kind of units known under its ``name``."""
    UNITS[kind.name] = kind()
    return kind


def units_of(config: EncoderConfig) -> List[PrunableUnit]:
    """The kinds that an encoder has: our own always, others where it has been pruned or gated."""
    names = {*config.unit_widths, *config.pruning_units}
    return [unit for unit in UNITS.values() if unit.field or unit.name in names]


def new_units(config: EncoderConfig, before: EncoderConfig) -> List[PrunableUnit]:
    """The kinds that an encoder has and one of the shape ``before`` lacks."""
    had = units_of(before)
    return [unit for unit in units_of(config) if unit not in had]


def with_units(config: EncoderConfig, state: State, before: EncoderConfig) -> State:
    """The state of an encoder of the shape ``before`` as one with the units of ``config`` loads it, gates left out."""
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
        # Without a linear map behind them, the last channels are the model's features.
        for i, layer in enumerate(layers if encoder.config.feature_linear else layers[:-1]):
            yield Site(i, f"feature_extractor.layers.{i}", layer.conv.out_channels)

    def cut(self, encoder: Any, site: Site, kept: Tensor, factor: Tensor, state: State, shape: Dict[str, Any]) -> None:
        if not len(kept):
            raise ValueError(
                f"{site.owner}: all channels are gated off, which no audio can pass; train longer with a lower "
                "criterion.target_sparsity, or give shrink() a sparsity"
            )
        layers = encoder.feature_extractor.layers
        layer, after = layers[site.place], site.place + 1
        cut_outputs(state, f"{site.owner}.conv", layer.conv, kept)
        cut_outputs(state, f"{site.owner}.norm", layer.norm, kept)
        if after < len(layers):
            cut_inputs(state, f"feature_extractor.layers.{after}.conv", layers[after].conv, kept, factor)
        else:  # a LayerNorm may follow, which the gates cannot be folded through
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
    """What belongs to the attention or the feed-forward sublayer of each layer.

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
