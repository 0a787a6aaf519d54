"""The speech encoder: one class for teacher, gated student and shrunk student."""

from __future__ import annotations

import itertools
from typing import Any, Collection, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from skill_fairseq.modules.attention import SelfAttention
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.conv_stack import ConvStack
from skill_fairseq.modules.feed_forward import FeedForward
from skill_fairseq.modules.gate_bank import Draw, GateBank, HardConcrete
from skill_fairseq.modules.hard_concrete import Units
from skill_fairseq.modules.layer import EncoderLayer
from skill_fairseq.modules.norms import ChannelLayerNorm
from skill_fairseq.modules.padding import check_padding_mask, exporting, frame_padding_mask
from skill_fairseq.modules.positional_conv import PositionalConv
from skill_fairseq.modules.positional_conv_stack import PositionalConvStack
from skill_fairseq.modules.prepared import Prepared
from skill_fairseq.modules.relative_position import RelativePosition
from skill_fairseq.modules.size import count_macs, widths_of
from skill_fairseq.modules.slicing import has_plain_weight, take
from skill_fairseq.modules.taps import AttentionMaps, FrameTransform, Tap, collect, map_layers
from skill_fairseq.modules.units import units_of


class Dropouts(NamedTuple):
    """Dropout probabilities; only training uses them, so they are no part of an encoder's shape."""

    hidden: float = 0.0
    attention: float = 0.0
    activation: float = 0.0
    input: float = 0.0
    layerdrop: float = 0.0


class EncoderOutput(NamedTuple):
    """What an encoder returns.

    Attributes:
        x: (B, T, D) output, after the final LayerNorm where the model has one.
        hidden_states: L + 1 tensors (B, T, D): [0] before the positional convolution, [i] after layer i, before a
            final LayerNorm.
        padding_mask: (B, T) bool, True = padding, or None.
    """

    x: Tensor
    hidden_states: List[Tensor]
    padding_mask: Optional[Tensor]


class FeatureProjection(nn.Module):
    """LayerNorm over the conv channels, then a linear map to the model's width, each where the shape has it.

    Args:
        config: shape.
        dropout: dropout probability on the result.
    """

    def __init__(self, config: EncoderConfig, dropout: float) -> None:
        super().__init__()
        assert config.conv_channels is not None
        width = config.conv_channels[-1]
        full = config.conv_feature_layers[-1][0]
        self.norm = ChannelLayerNorm(width, full) if config.feature_layer_norm else None
        self.linear = nn.Linear(width, config.encoder_embed_dim) if config.feature_linear else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, units: Optional[Units] = None) -> Tensor:
        """(B, T, C) conv features and which channels they are, None for all, to (B, T, D)."""
        if self.norm is not None:
            x = self.norm(x, units)
        if self.linear is None:
            return self.dropout(x)
        if units is None or units.indices is None:
            return self.dropout(self.linear(x))
        if not has_plain_weight(self.linear):
            every = x.new_zeros(*x.shape[:-1], self.linear.in_features)
            return self.dropout(self.linear(every.index_copy(-1, units.indices, x)))
        return self.dropout(F.linear(x, take(self.linear.weight, 1, units.indices), self.linear.bias))


class Transformer(nn.Module):
    """Positional convolution and transformer layers.

    Args:
        config: shape.
        dropouts: dropout probabilities.

    Attributes:
        checkpoint_activations: keep of each layer its input alone for the backward pass, which computes the layer once
            more, with the same dropout and the same gates (Chen et al. 2016, arXiv:1604.06174).
    """

    def __init__(self, config: EncoderConfig, dropouts: Dropouts) -> None:
        super().__init__()
        self.checkpoint_activations = False
        dim = config.encoder_embed_dim
        self.layer_norm_first = config.layer_norm_first
        self.layerdrop = dropouts.layerdrop
        kernel_size, groups, depth = config.pos_conv_kernel, config.conv_pos_groups, config.pos_conv_depth
        self.pos_conv: Union[PositionalConv, PositionalConvStack] = (
            PositionalConv(dim, kernel_size, groups)
            if depth == 1
            else PositionalConvStack(dim, kernel_size, groups, depth)
        )
        self.relative_position = (
            RelativePosition(config.num_buckets, config.max_distance, config.encoder_attention_heads)
            if config.relative_position
            else None
        )
        self.layer_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropouts.hidden)
        layers = []
        assert config.heads is not None and config.ffn_dims is not None
        for heads, ffn_dim in zip(config.heads, config.ffn_dims):
            attention = ffn = None
            if heads is not None:
                attention = SelfAttention(
                    dim,
                    config.head_dim,
                    heads,
                    config.encoder_attention_heads,
                    dropouts.attention,
                    config.relative_position,
                )
            if ffn_dim is not None:
                ffn = FeedForward(dim, ffn_dim, config.activation_fn, dropouts.activation)
            layers.append(EncoderLayer(dim, attention, ffn, config.layer_norm_first, dropouts.hidden))
        self.layers: Sequence[EncoderLayer] = nn.ModuleList(layers)  # type: ignore[assignment]
        self.apply(_init_like_bert)

    def run(
        self,
        x: Tensor,
        padding_mask: Optional[Tensor] = None,
        draw: Optional[Draw] = None,
        map_layers: Collection[int] = (),
    ) -> Iterator[Tuple[Tensor, Optional[AttentionMaps]]]:
        """Layer by layer, each computed when it is asked for.

        Args:
            x: (B, T, D) projected features.
            padding_mask: (B, T) bool, True = padding, or None.
            draw: the gates of this forward; None where there are none.
            map_layers: 1-based layers whose attention maps are wanted; they are never dropped by layerdrop.

        Yields:
            a layer's output (B, T, D), before a final LayerNorm, and its attention maps where they are wanted.
        """
        if padding_mask is not None:
            # A mask of nothing is asked for on the CPU alone: on a GPU the host would wait for the answer.
            if exporting() or padding_mask.device.type != "cpu" or padding_mask.any():
                x = x.masked_fill(padding_mask.unsqueeze(-1), 0.0)
            else:
                padding_mask = None
        if padding_mask is not None:
            # Of an utterance without a frame nothing counts; with every key hidden, kernels differ or give NaN.
            padding_mask = padding_mask & ~padding_mask.all(1, keepdim=True)
        x = x + self.pos_conv(x)
        if not self.layer_norm_first:
            x = self.layer_norm(x)
        x = self.dropout(x)
        by_offset = None if self.relative_position is None else self.relative_position(x.size(1))
        for layer, block in enumerate(self.layers, start=1):
            dropped = self.training and self.layerdrop > 0 and np.random.random() < self.layerdrop
            inputs: Tuple[Any, ...] = (x, by_offset, padding_mask, draw)
            again = self.checkpoint_activations and torch.is_grad_enabled()
            maps = None
            if layer in map_layers:
                inputs = (*inputs, True)
                x, maps = checkpoint(block, *inputs, use_reentrant=False) if again else block(*inputs)
            elif not dropped:
                x = checkpoint(block, *inputs, use_reentrant=False) if again else block(*inputs)
            yield x, maps

    def forward(
        self,
        x: Tensor,
        padding_mask: Optional[Tensor] = None,
        layer: Optional[int] = None,
        draw: Optional[Draw] = None,
    ) -> Tuple[Tensor, List[Tensor]]:
        """Args:
            x: (B, T, D) projected features.
            padding_mask: (B, T) bool, True = padding, or None.
            layer: 0-based index of the layer to stop after; None runs all and the final LayerNorm.
            draw: the gates of this forward; None where there are none.

        Returns:
            (B, T, D) output, and the output (B, T, D) of every layer that ran.
        """
        layers = itertools.islice(self.run(x, padding_mask, draw), None if layer is None else layer + 1)
        states = [state for state, _ in layers]
        x = states[-1]
        return (self.layer_norm(x) if self.layer_norm_first and layer is None else x), states


def _init_like_bert(module: nn.Module) -> None:
    """BERT's initialisation, as fairseq's speech encoders use it."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, RelativePosition):
        nn.init.normal_(module.weight, std=0.02)


class SpeechEncoder(nn.Module):
    """WavLM, HuBERT, wav2vec 2.0 or data2vec encoder whose every layer may have its own width.

    Args:
        config: shape.
        dropouts: dropout probabilities for training.

    Example::

        encoder = skill_fairseq.load_encoder("student.safetensors")
        out = encoder(torch.randn(1, 16000))
        out.hidden_states[6]  # (1, 49, D)
    """

    def __init__(self, config: EncoderConfig, dropouts: Dropouts = Dropouts()) -> None:  # noqa: B008
        super().__init__()
        self.config = config
        self.dropouts = dropouts
        self.feature_extractor = ConvStack(config)
        self.feature_projection = FeatureProjection(config, dropouts.input)
        self.transformer = Transformer(config, dropouts)
        for unit in units_of(config):
            unit.build(self)
        self.gates = GateBank() if config.pruning_units else None
        if self.gates is not None:
            self.gates.place(self)

    @property
    def normalize(self) -> bool:
        """Whether the waveform must be brought to zero mean and unit variance before it comes in."""
        return self.config.normalize

    def forward(
        self,
        source: Tensor,
        padding_mask: Optional[Tensor] = None,
        transform: Optional[FrameTransform] = None,
        last_layer: Optional[int] = None,
        draw: Optional[Draw] = None,
    ) -> EncoderOutput:
        """Encodes a batch.

        Args:
            source: (B, N) samples at 16 kHz, already normalised where ``normalize`` says so.
            padding_mask: (B, N) bool, True = padding, at the end of each row; or None.
            transform: called with the projected features (B, T, D) and the frames' padding mask, returns features
                (B, T, D) for the transformer: time masking in pre-training and fine-tuning.
            last_layer: stop after this layer (1-based; 0 runs none); None runs all.
            draw: gates of :meth:`draw_gates`; None: they are drawn here.

        Returns:
            output, hidden states, padding mask of the frames.

        Raises:
            TypeError: the padding mask is no bool tensor.
            ValueError: the source is not (B, N), or too short for one frame; or the padding mask has another shape,
                hides a whole row, or hides samples before others that it does not hide.
        """
        draw = self.draw_gates() if draw is None else draw
        projected, padding_mask = self._project(source, padding_mask, draw)
        x = projected if transform is None else transform(projected, padding_mask)
        if last_layer == 0:
            return EncoderOutput(projected, [projected], padding_mask)
        x, states = self.transformer(x, padding_mask, None if last_layer is None else last_layer - 1, draw)
        return EncoderOutput(x, [projected, *states], padding_mask)

    def tap(
        self,
        source: Tensor,
        padding_mask: Optional[Tensor],
        taps: Sequence[Tap],
        draw: Optional[Draw] = None,
    ) -> Tuple[List[Tensor], Optional[Tensor]]:
        """What is asked for and nothing else: no layer runs beyond the deepest, and no map is made that nobody wants.

        Args:
            source, padding_mask, draw: as in :meth:`forward`.
            taps: what is asked for.

        Returns:
            a tensor for each tap, see :class:`Tap`; and the (B, T) padding mask of the frames or None.
        """
        draw = self.draw_gates() if draw is None else draw
        projected, padding_mask = self._project(source, padding_mask, draw)
        found: Dict[Tap, Tensor] = {}
        for transform in dict.fromkeys(tap.transform for tap in taps):
            asked = [tap for tap in taps if tap.transform == transform]
            x = projected if transform is None else transform(projected, padding_mask)
            layers = itertools.chain([(x, None)], self.transformer.run(x, padding_mask, draw, map_layers(asked)))
            found.update(zip(asked, collect(asked, layers)))
        return [found[tap] for tap in taps], padding_mask

    def prepare(self) -> SpeechEncoder:
        """Makes ready for inference: evaluation mode, and weights laid out once instead of in every forward.

        That lasts until weights are loaded, moved, converted or trained, which is noticed; whoever writes into them
        through ``.data`` calls it again. Gradients are computed as ever.

        Returns:
            the encoder itself.
        """
        self.eval()
        for module in self.modules():
            if isinstance(module, Prepared) and not getattr(module, "gated", False):
                module.prepare()
        return self

    def draw_gates(self) -> Optional[Draw]:
        """The gates of one forward; None without gates. Drawn before other work is launched, they cost no wait."""
        return None if self.gates is None else self.gates.draw()

    def _project(
        self, source: Tensor, padding_mask: Optional[Tensor], draw: Optional[Draw]
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """(B, N) samples to (B, T, D) projected features, and the frames' padding mask."""
        if source.dim() != 2:
            raise ValueError(f"source: shape {tuple(source.shape)}; expected (batch, samples)")
        if source.size(1) < self.config.receptive_field:
            raise ValueError(
                f"source: {source.size(1)} samples are too short for one frame; at least "
                f"{self.config.receptive_field} are needed: drop or pad shorter audio"
            )
        if padding_mask is not None:
            values = source.device.type == "cpu" or not self.training
            padding_mask = check_padding_mask(padding_mask, source, values)
        features, units = self.feature_extractor(source, draw)
        if padding_mask is not None:
            padding_mask = frame_padding_mask(padding_mask, features.size(1), self.config)
        return self.feature_projection(features, units), padding_mask

    def named_gates(self) -> Iterator[Tuple[str, HardConcrete]]:
        """Every vector of gates with the path of the attribute that holds it, in the bank's order."""
        for gate in () if self.gates is None else self.gates.gates:
            yield gate.name, gate

    def gather_gates(self, state: Dict[str, Any], prefix: str = "") -> None:
        """Changes a state dict of version 0.1, where every vector of gates was a parameter of its own, to the bank's.

        Args:
            state: changed in place.
            prefix: of the encoder's names in it.
        """
        for name in ("log_alpha", "kept_override"):
            parts = [f"{prefix}{gate}.{name}" for gate, _ in self.named_gates()]
            if parts and all(part in state for part in parts):
                state[f"{prefix}gates.{name}"] = torch.cat([state.pop(part) for part in parts])

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *arguments: Any) -> None:
        self.gather_gates(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def num_parameters(self) -> int:
        """Parameters of the encoder itself, gates not counted."""
        gates = 0 if self.gates is None else self.gates.log_alpha.numel()
        return sum(p.numel() for p in self.parameters()) - gates

    def macs(self, seconds: float) -> int:
        """Multiply-accumulates of one forward over that much audio; closed gates are not taken into account."""
        samples = round(seconds * self.config.sample_rate)
        return int(count_macs(self.config, widths_of(self.config), samples))
