"""Runs exported ONNX graphs in onnxruntime."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
from torch import Tensor

from skill_fairseq.checkpoints.plain_files import parse_fields
from skill_fairseq.exporting.traceable import INFO_NAME
from skill_fairseq.messages import require
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.streaming import plan


class OnnxEncoder:
    """An encoder written by ``skill-export --to onnx``, ready to run.

    Args:
        model: path of the file, or its bytes.
        threads: threads per product; None: onnxruntime's choice.
        providers: onnxruntime's execution providers, in order of preference; None: the CPU.

    Attributes:
        config: shape of the encoder.
        outputs: names of the exported states: ``x`` and ``hidden_state_0`` ....
        samples: the graph's fixed input length; None: any.

    Raises:
        ValueError: onnxruntime is missing, or this is not a graph of skill-export.

    Example::

        encoder = OnnxEncoder("student.onnx")
        encoder(np.zeros((1, 16000), dtype=np.float32))["hidden_state_9"]  # (1, 49, D)
    """

    def __init__(
        self, model: Union[str, Path, bytes], threads: Optional[int] = None, providers: Optional[list[str]] = None
    ) -> None:
        require("OnnxEncoder", "onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        source = model if isinstance(model, bytes) else str(model)
        self.session = onnxruntime.InferenceSession(source, options, providers=providers or ["CPUExecutionProvider"])
        name = "the graph" if isinstance(model, bytes) else str(model)
        found = self.session.get_modelmeta().custom_metadata_map
        if INFO_NAME not in found:
            raise ValueError(f"{name}: has no {INFO_NAME} among its properties; expected a graph of skill-export")
        self.info: dict[str, Any] = parse_fields(found[INFO_NAME], Path(name), "its description")
        self.config = EncoderConfig.from_dict(self.info["config"])
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs() if value.name != "frame_padding_mask"]
        shape = self.session.get_inputs()[0].shape
        self.samples: Optional[int] = shape[1] if isinstance(shape[1], int) else None

    @property
    def normalize(self) -> bool:
        """Whether the input waveform must be normalised to zero mean and unit variance."""
        return self.config.normalize

    def __call__(self, source: np.ndarray) -> dict[str, np.ndarray]:
        """Encodes a batch without padding.

        Args:
            source: (B, N) float32 samples, normalised if ``normalize``; (1, ``samples``) if that is set.

        Returns:
            (B, T, D) float32 by output name.

        Raises:
            ValueError: the shape is wrong.
        """
        fixed = self.samples is not None and source.shape != (1, self.samples)
        if source.ndim != 2 or fixed or source.shape[1] < self.config.receptive_field:
            expected = f"(1, {self.samples})" if self.samples else f"(B, N), N at least {self.config.receptive_field}"
            raise ValueError(f"source: shape {source.shape}; expected {expected}")
        source = np.ascontiguousarray(source, dtype=np.float32)
        feeds = {"source": source, "padding_mask": np.zeros(source.shape, dtype=bool)}
        values = self.session.run(self.outputs, {name: feeds[name] for name in self.inputs})
        return dict(zip(self.outputs, values))

    def states(self, source: Tensor) -> dict[str, Tensor]:
        """The same for torch tensors on the CPU."""
        return {name: torch.from_numpy(value) for name, value in self(source.numpy()).items()}

    def stream(
        self, audio: np.ndarray, chunk_seconds: float = 30.0, context_seconds: float = 10.0
    ) -> Iterator[dict[str, np.ndarray]]:
        """Encodes audio of any length in constant memory.

        Like :meth:`skill_fairseq.modules.encoder.SpeechEncoder.stream`, but a GroupNorm over time, as in Base models,
        uses one window instead of the whole, and so does the peak that scales log-mel features (with a warning: the
        states of a quiet passage then depend on the cut). For a graph of fixed length, windows are padded with zeros at
        the end.

        Args:
            audio: (N,) samples, normalised as a whole if ``normalize``; may be memory-mapped.
            chunk_seconds: audio per output, seconds.
            context_seconds: additional context on each side, seconds.

        Yields:
            (1, t, D) float32 by output name, with consecutive frames.

        Raises:
            ValueError: the audio is not (N,) or too short for a frame, the chunk is shorter than a frame, the context
                is negative, or a chunk with its context is longer than the graph's input.
        """
        if self.config.mel_bins:
            warnings.warn(
                "stream: an ONNX graph scales log-mel features by the peak of each window, not of the whole audio; use "
                "SpeechEncoder.stream for audio with quiet passages",
                stacklevel=2,
            )
        for window, source in plan(audio, self.config, chunk_seconds, context_seconds):
            if self.samples is not None:
                if source.size(1) > self.samples:
                    raise ValueError(
                        f"chunk_seconds, context_seconds: {chunk_seconds:g} and {context_seconds:g} give windows of "
                        f"{source.size(1)} samples; expected at most {self.samples}, the exported length"
                    )
                source = torch.nn.functional.pad(source, (0, self.samples - source.size(1)))
            yield {name: state[:, window.kept] for name, state in self(source.numpy()).items()}
