"""The speech encoder: one class for teacher, gated student and shrunk student."""

from __future__ import annotations

import itertools
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.conv_stack import ConvStack
from skill_fairseq.modules.fake_quantize import quantize
from skill_fairseq.modules.gate_bank import Draw, GateBank, HardConcrete
from skill_fairseq.modules.hard_concrete import Units
from skill_fairseq.modules.kernels import check_setting, choose_for_linears, linear, setting
from skill_fairseq.modules.norms import ChannelLayerNorm, Moments
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
    """What an encoder returns.

    Attributes:
        x: (B, T, D) output, after the final LayerNorm where the model has one.
        hidden_states: L + 1 tensors (B, T, D): [0] before the positional convolution, [i] after layer i, before a
            final LayerNorm. With ``time_reduction`` [0] is the mean of the frames that become one: all have one rate.
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
            return self.dropout(linear(self.linear, x))
        if not has_plain_weight(self.linear):
            every = x.new_zeros(*x.shape[:-1], self.linear.in_features)
            return self.dropout(self.linear(every.index_copy(-1, units.indices, x)))
        return self.dropout(F.linear(x, take(self.linear.weight, 1, units.indices), self.linear.bias))


class SpeechEncoder(nn.Module):
    """WavLM, HuBERT, wav2vec 2.0 or data2vec encoder whose every layer may have its own width.

    Args:
        config: shape.
        dropouts: dropout probabilities for training.

    Example::

        encoder = skill_fairseq.load_encoder("student.safetensors")
        out = encoder(torch.randn(1, 16000))
        out.hidden_states[6]  # (1, 49, D)

    Attributes:
        mask_embedding: (D,) what its pre-training put in place of masked frames, None where nobody knows. It is no
            parameter, counts in no size, and stays where it is when the encoder moves.
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
            transform: called with the projected features (B, T, D) and the frames' padding mask, both at the rate of
                the convolutions, returns features (B, T, D) for the transformer: time masking in pre-training and
                fine-tuning.
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
        return self._encode(source, padding_mask, transform, last_layer, draw, None)

    def _encode(
        self,
        source: Tensor,
        padding_mask: Optional[Tensor],
        transform: Optional[FrameTransform],
        last_layer: Optional[int],
        draw: Optional[Draw],
        statistics: Optional[Moments],
    ) -> EncoderOutput:
        """:meth:`forward`; of a part of more audio where ``statistics`` are given."""
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
        """What is asked for and nothing else: no layer runs beyond the deepest, and no map is made that nobody wants.

        Args:
            source, padding_mask, draw: as in :meth:`forward`.
            taps: what is asked for.

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
        """Features of waveforms as they come from a file, without gradients.

        Args:
            waves: (N,) floating-point samples of one utterance, a tensor or an array, or a list of such.
            sampling_rate: of all of them, in Hz; where the encoder has another, they are resampled (by scipy).
            layers: whose states are wanted: 0 precedes the transformer; None: all of them.

        Returns:
            states (B, T, D), and the number of frames of each utterance. Each utterance is as it would be alone.

        Raises:
            ValueError: the encoder is in training mode, a waveform is not (N,), not of floating point or too short, a
                layer does not exist, or the rate is another and scipy is missing.

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
        """Encodes audio of any length in memory that does not grow with it, without gradients.

        The convolutions' frames are those of the whole, exactly: the audio is read twice where they are normalised over
        time. Positional convolution and attention see a chunk and its context; with a context as long as the audio, all
        is as :meth:`forward` gives it.

        Args:
            audio: (N,) samples, normalised as a whole where ``normalize`` says so: a tensor, an array (also one that
                lies in a file, as numpy's memory maps do), or anything that has a length and can be sliced.
            chunk_seconds: what each output holds.
            context_seconds: what is encoded beyond that on either side.
            last_layer: as in :meth:`forward`.

        Yields:
            outputs (1, t, D) whose frames follow each other; together they are the whole.

        Raises:
            ValueError: the encoder is in training mode, the audio is not (N,) or too short for a frame, the chunk is
                shorter than a frame, or the context negative.

        Example::

            features = torch.cat([out.hidden_states[9] for out in encoder.stream(wave, last_layer=9)], 1)
        """
        if self.training:
            raise ValueError("the encoder is in training mode, where chunks would not fit together; call eval() first")
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
            # Copies, so that who keeps them does not keep the context too.
            states = [state[:, window.kept].clone() for state in out.hidden_states]
            yield EncoderOutput(out.x[:, window.kept].clone(), states, None)

    def prepare(self, kernels: Optional[str] = None) -> SpeechEncoder:
        """Makes ready for inference: evaluation mode, weights laid out once instead of in every forward, and on a CPU
        the fastest kernel for each linear map and convolution, which the first forwards of a length find by timing.

        That lasts until weights are loaded, moved, converted or trained, which is detected, except for writes through
        ``.data``: call it again after those. Gradients are not affected.

        Args:
            kernels: "plain": the same in every process, to the last bit; "measured"; or the name of a kernel, see
                :mod:`skill_fairseq.modules.kernels`. None: what the environment variable ``SKILL_KERNELS`` says, or
                measured. They agree to float rounding.

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
        """The gates of one forward; None without gates. Drawn before other work is launched, they cost no wait.

        Args:
            log_alpha: see :meth:`GateBank.draw`.
        """
        return None if self.gates is None else self.gates.draw(log_alpha=log_alpha)

    def _project(
        self,
        source: Tensor,
        padding_mask: Optional[Tensor],
        draw: Optional[Draw],
        statistics: Optional[Moments] = None,
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
        """State 0 at the rate of the others: (B, T, D) projected features to (B, T / time_reduction, D) means."""
        rate = self.config.time_reduction
        return x if rate == 1 else x[:, : x.size(1) // rate * rate].unflatten(1, (-1, rate)).mean(2)

    def _output_padding(self, frames: Optional[Tensor]) -> Optional[Tensor]:
        """Padding of the convolutions' frames (B, T) to that of the output's."""
        return None if frames is None else reduce_padding_mask(frames, self.config)

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
