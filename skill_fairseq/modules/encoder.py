"""The speech encoder: one class for teacher, gated student and shrunk student."""

from __future__ import annotations

import itertools
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.conv_stack import ConvStack, Statistics
from skill_fairseq.modules.fake_quantize import quantize
from skill_fairseq.modules.gate_bank import Draw, GateBank, HardConcrete
from skill_fairseq.modules.hard_concrete import Units
from skill_fairseq.modules.kernels import check_setting, choose_for_linears, linear, setting
from skill_fairseq.modules.norms import ChannelLayerNorm
from skill_fairseq.modules.padding import check_padding_mask, frame_padding_mask, reduce_padding_mask
from skill_fairseq.modules.prepared import Prepared
from skill_fairseq.modules.size import count_macs, widths_of
from skill_fairseq.modules.slicing import has_plain_weight, take
from skill_fairseq.modules.streaming import BLOCK_SECONDS, cut, plan
from skill_fairseq.modules.taps import FrameTransform, Tap, collect, map_layers
from skill_fairseq.modules.transformer import Dropouts, Transformer
from skill_fairseq.modules.units import units_of
from skill_fairseq.modules.waves import Features, features_of


class EncoderOutput(NamedTuple):
    """The output of an encoder.

    Attributes:
        x: (B, T, D) output, after the final LayerNorm if the model has one.
        hidden_states: L + 1 tensors (B, T, D): [0] before the positional convolution, [i] after layer i, before a
            final LayerNorm. With ``time_reduction`` [0] is the mean over merged frames, so that all have the same rate.
        padding_mask: (B, T) bool, True = padding, or None.
    """

    x: Tensor
    hidden_states: List[Tensor]
    padding_mask: Optional[Tensor]


class FeatureProjection(nn.Module):
    """LayerNorm over the conv channels, then a linear map to the model's width, each if the shape has it.

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
        """(B, T, C) conv features and their channels (None: all) to (B, T, D)."""
        if self.norm is not None:
            x = self.norm(x, units)
        if self.linear is None:
            return self.dropout(x)
        if units is None or units.indices is None:
            return self.dropout(linear(self.linear, x))
        if not has_plain_weight(self.linear):
            every = x.new_zeros(*x.shape[:-1], self.linear.in_features)
            return self.dropout(self.linear(every.index_copy(-1, units.indices, x)))
        return self.dropout(F.linear(x, take(self.linear.weight, 1, units.indices), self.linear.bias))


class SpeechEncoder(nn.Module):
    """A WavLM, HuBERT, wav2vec 2.0 or data2vec encoder, whose layers may differ in width.

    Args:
        config: shape.
        dropouts: dropout probabilities for training.

    Example::

        encoder = skill_fairseq.load_encoder("student.safetensors")
        out = encoder(torch.randn(1, 16000))
        out.hidden_states[6]  # (1, 49, D)

    Attributes:
        mask_embedding: (D,) that pre-training used for masked frames, None if unknown. It is not a parameter, does not
            count in sizes, and does not move with the encoder.
    """

    def __init__(self, config: EncoderConfig, dropouts: Dropouts = Dropouts()) -> None:  # noqa: B008
        super().__init__()
        self.config = config
        self.dropouts = dropouts
        self.mask_embedding: Optional[Tensor] = None
        self.feature_extractor = ConvStack(config)
        self.feature_projection = FeatureProjection(config, dropouts.input)
        self.transformer = Transformer(config, dropouts)
        for unit in units_of(config):
            unit.build(self)
        if config.quantize == "int8":
            quantize(self)
        self.gates = GateBank() if config.pruning_units else None
        if self.gates is not None:
            self.gates.place(self)

    @property
    def normalize(self) -> bool:
        """Whether the input waveform must be normalised to zero mean and unit variance."""
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
            source: (B, N) samples at 16 kHz, already normalised if ``normalize``.
            padding_mask: (B, N) bool, True = padding, at the end of each row; or None.
            transform: maps the projected features (B, T, D) and the frames' padding mask, both at the rate of the
                convolutions, to features (B, T, D) for the Transformer: time masking in pre-training and fine-tuning.
            last_layer: stop after this layer, from 1 (0 runs none); None runs all.
            draw: gates from :meth:`draw_gates`; None: draw them here.

        Returns:
            output, hidden states, and padding mask of the frames.

        Raises:
            TypeError: the padding mask is not a bool tensor.
            ValueError: the source is not (B, N), or too short for one frame; or the padding mask has another shape,
                masks a whole row, or masks samples before unmasked ones.
        """
        draw = self.draw_gates() if draw is None else draw
        return self._encode(source, padding_mask, transform, last_layer, draw, None)

    def _encode(
        self,
        source: Tensor,
        padding_mask: Optional[Tensor],
        transform: Optional[FrameTransform],
        last_layer: Optional[int],
        draw: Optional[Draw],
        statistics: Optional[Statistics],
    ) -> EncoderOutput:
        """Like :meth:`forward`; with ``statistics``, for a part of longer audio."""
        projected, frames = self._project(source, padding_mask, draw, statistics)
        x = projected if transform is None else transform(projected, frames)
        first, padding_mask = self._first_state(projected), self._output_padding(frames)
        if last_layer == 0:
            return EncoderOutput(first, [first], padding_mask)
        x, states = self.transformer(x, frames, None if last_layer is None else last_layer - 1, draw)
        return EncoderOutput(x, [first, *states], padding_mask)

    def tap(
        self,
        source: Tensor,
        padding_mask: Optional[Tensor],
        taps: Sequence[Tap],
        draw: Optional[Draw] = None,
    ) -> Tuple[List[Tensor], Optional[Tensor]]:
        """Computes only what the taps need: no layer beyond the deepest, and no unused attention map.

        Args:
            source, padding_mask, draw: see :meth:`forward`.
            taps: the states to return.

        Returns:
            a tensor for each tap, see :class:`Tap`; and the (B, T) padding mask of the frames or None.
        """
        draw = self.draw_gates() if draw is None else draw
        projected, frames = self._project(source, padding_mask, draw)
        found: Dict[Tap, Tensor] = {}
        for kind in dict.fromkeys((tap.transform, tap.adapters) for tap in taps):
            asked, transform = [tap for tap in taps if (tap.transform, tap.adapters) == kind], kind[0]
            x = projected if transform is None else transform(projected, frames)
            above = self.transformer.run(x, frames, draw, map_layers(asked), kind[1])
            found.update(zip(asked, collect(asked, itertools.chain([(self._first_state(x), None)], above))))
        return [found[tap] for tap in taps], self._output_padding(frames)

    def features(self, waves: Any, sampling_rate: int, layers: Optional[Sequence[int]] = None) -> Features:
        """Features of raw waveforms, without gradients.

        Args:
            waves: (N,) floating-point samples of one utterance, a tensor or an array, or a list of these.
            sampling_rate: their sample rate, Hz; scipy resamples them if the encoder's differs.
            layers: layers whose states to return; 0 precedes the Transformer; None: all of them.

        Returns:
            states (B, T, D), and the number of frames of each utterance. Results do not depend on the other utterances.

        Raises:
            ValueError: the encoder is in training mode, a waveform is not (N,), not floating-point or too short, a
                layer does not exist, or the rate differs and scipy is missing.

        Example:
            >>> from skill_fairseq.modules.config import EncoderConfig
            >>> encoder = SpeechEncoder(EncoderConfig(encoder_layers=2, encoder_embed_dim=48)).eval()
            >>> states, lengths = encoder.features([torch.randn(16000), torch.randn(8000)], 16000, layers=[1, 2])
            >>> [tuple(state.shape) for state in states], lengths.tolist()
            ([(2, 49, 48), (2, 49, 48)], [49, 24])
        """
        return features_of(self, waves, sampling_rate, layers)

    def stream(
        self,
        audio: Any,
        chunk_seconds: float = 30.0,
        context_seconds: float = 10.0,
        last_layer: Optional[int] = None,
    ) -> Iterator[EncoderOutput]:
        """Encodes audio of any length in constant memory, without gradients.

        The convolutions' frames are exactly those of the whole audio, which is read twice if they are normalised over
        time. Positional convolution and attention cover a chunk and its context; with a context as long as the audio,
        the result is that of :meth:`forward`.

        Args:
            audio: (N,) samples, normalised as a whole if ``normalize``: a tensor, an array (also memory-mapped), or
                anything with a length that can be sliced.
            chunk_seconds: audio per output, seconds.
            context_seconds: additional context on each side, seconds.
            last_layer: see :meth:`forward`.

        Yields:
            outputs (1, t, D) with consecutive frames, which together cover the whole audio.

        Raises:
            ValueError: the encoder is in training mode, the audio is not (N,) or too short for a frame, the chunk is
                shorter than a frame, or the context negative.

        Example::

            features = torch.cat([out.hidden_states[9] for out in encoder.stream(wave, last_layer=9)], 1)
        """
        if self.training:
            raise ValueError("the encoder is in training mode, where chunks would not match; call eval() first")
        device = next(self.parameters()).device
        statistics = None
        draw = self.draw_gates()
        for window, source in plan(audio, self.config, chunk_seconds, context_seconds):
            with torch.no_grad():
                if window.start == 0:
                    size = round(BLOCK_SECONDS * self.config.sample_rate)
                    blocks = (cut(audio, i, i + size)[None].to(device) for i in range(0, len(audio), size))
                    statistics = self.feature_extractor.statistics(blocks)
                out = self._encode(source.to(device), None, None, last_layer, draw, statistics)
            # Copies, so that keeping them does not keep the context too.
            states = [state[:, window.kept].clone() for state in out.hidden_states]
            yield EncoderOutput(out.x[:, window.kept].clone(), states, None)

    def prepare(self, kernels: Optional[str] = None) -> SpeechEncoder:
        """Prepares for inference: evaluation mode, weights laid out once instead of in every forward, and on a CPU the
        fastest kernel for each linear map and convolution, found by timing in the first forwards of a length.

        The preparation ends when weights are loaded, moved, converted or trained. Writes through ``.data`` are not
        detected: call it again after those. Gradients are not affected.

        Args:
            kernels: "plain": bit-identical in every process; "measured"; or the name of a kernel, see
                :mod:`skill_fairseq.modules.kernels`. None: the environment variable ``SKILL_KERNELS``, or measured.
                All agree to float rounding.

        Returns:
            the encoder itself.

        Raises:
            ValueError: there is no such kernel.
        """
        choice = setting() if kernels is None else check_setting(kernels, "kernels")
        choose_for_linears(self.transformer, choice)
        choose_for_linears(self.feature_projection, choice)
        self.eval()
        for module in self.modules():
            if isinstance(module, Prepared) and not getattr(module, "gated", False):
                module.prepare(choice)
        return self

    def draw_gates(self, log_alpha: Optional[Tensor] = None) -> Optional[Draw]:
        """Draws the gates of one forward, None without gates. Drawing before other work is launched avoids a wait.

        Args:
            log_alpha: see :meth:`GateBank.draw`.
        """
        return None if self.gates is None else self.gates.draw(log_alpha=log_alpha)

    def _project(
        self,
        source: Tensor,
        padding_mask: Optional[Tensor],
        draw: Optional[Draw],
        statistics: Optional[Statistics] = None,
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
        features, units = self.feature_extractor(source, draw, statistics)
        if padding_mask is not None:
            padding_mask = frame_padding_mask(padding_mask, features.size(1), self.config)
        return self.feature_projection(features, units), padding_mask

    def _first_state(self, x: Tensor) -> Tensor:
        """State 0 at the rate of the other states: (B, T, D) projected features to (B, T / time_reduction, D) means."""
        rate = self.config.time_reduction
        return x if rate == 1 else x[:, : x.size(1) // rate * rate].unflatten(1, (-1, rate)).mean(2)

    def _output_padding(self, frames: Optional[Tensor]) -> Optional[Tensor]:
        """The convolutions' padding mask (B, T) at the rate of the output."""
        return None if frames is None else reduce_padding_mask(frames, self.config)

    def named_gates(self) -> Iterator[Tuple[str, HardConcrete]]:
        """Every vector of gates with its attribute path, in the bank's order."""
        for gate in () if self.gates is None else self.gates.gates:
            yield gate.name, gate

    def gather_gates(self, state: Dict[str, Any], prefix: str = "") -> None:
        """Converts a state dict of version 0.1, where every vector of gates was a separate parameter, to the bank.

        Args:
            state: changed in place.
            prefix: prefix of the encoder's names in it.
        """
        for name in ("log_alpha", "kept_override"):
            parts = [f"{prefix}{gate}.{name}" for gate, _ in self.named_gates()]
            if parts and all(part in state for part in parts):
                state[f"{prefix}gates.{name}"] = torch.cat([state.pop(part) for part in parts])

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *arguments: Any) -> None:
        self.gather_gates(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def num_parameters(self) -> int:
        """Parameters of the encoder, without gates."""
        gates = 0 if self.gates is None else self.gates.log_alpha.numel()
        return sum(p.numel() for p in self.parameters()) - gates

    def macs(self, seconds: float) -> int:
        """Multiply-accumulates of one forward over this much audio, ignoring closed gates."""
        samples = round(seconds * self.config.sample_rate)
        return int(count_macs(self.config, widths_of(self.config), samples))
