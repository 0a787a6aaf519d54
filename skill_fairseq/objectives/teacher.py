"""The frozen teacher: kept outside model, criterion, optimiser and checkpoint."""

from __future__ import annotations

from typing import List, Mapping, Optional, Sequence

import torch
from torch import Tensor

from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.kernels import setting
from skill_fairseq.modules.masking import with_masks
from skill_fairseq.modules.taps import SpanMasking, Tap

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions a teacher may run in."""


def check_alike(shapes: Sequence[EncoderConfig], names: Sequence[str], field: str = "task.teacher") -> None:
    """Refuses several teachers that cannot hear the same waveforms and answer frame by frame.

    Args:
        shapes, names: of each teacher, its shape and its file.
        field: where they are named, for messages.

    Raises:
        ValueError: two differ in sample rate, normalisation or frames; names the files and values.
    """
    for shape, name in zip(shapes[1:], names[1:]):
        for what, first, other in (
            ("sample_rate", shapes[0].sample_rate, shape.sample_rate),
            ("normalize", shapes[0].normalize, shape.normalize),
            ("samples a frame", shapes[0].downsampling, shape.downsampling),
            (
                "samples that the first frame hears",
                shapes[0].feature_receptive_field,
                shape.feature_receptive_field,
            ),
        ):
            if first != other:
                raise ValueError(
                    f"{field}: {name} has {what} = {other}, but {names[0]} has {first}; expected the same of all "
                    "teachers, which hear the same waveforms: leave one out"
                )


class FrozenTeacher:
    """A teacher that is never trained, saved, half-cast or wrapped, because it is no submodule of anything.

    Args:
        encoder: the teacher; it is taken over and converted.
        dtype: precision that it runs in, a key of :data:`DTYPES`.
        compile: run its layers through ``torch.compile``, which takes some minutes at the start.

    Raises:
        ValueError: the precision is unknown, or this torch cannot compile.
    """

    def __init__(self, encoder: SpeechEncoder, dtype: str = "fp32", compile: bool = False) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"teacher precision: {dtype!r}; expected one of {', '.join(DTYPES)}")
        self.dtype = DTYPES[dtype]
        self.encoder = encoder.to(self.dtype).requires_grad_(False).prepare(setting("plain"))
        self.config = encoder.config
        if compile:
            if not hasattr(torch.nn.Module, "compile"):
                raise ValueError(f"torch {torch.__version__} cannot compile a teacher; install torch 2.2 or later")
            for layer in self.encoder.transformer.layers:
                layer.compile(dynamic=True)

    def tap(
        self,
        source: Tensor,
        padding_mask: Optional[Tensor],
        taps: Sequence[Tap],
        masked: Optional[Mapping[SpanMasking, Tensor]] = None,
    ) -> List[Tensor]:
        """Runs the teacher as deep as it is asked for.

        Args:
            source: (B, N) samples; the teacher moves to their device.
            padding_mask: (B, N) bool, True = padding, or None.
            taps: what is asked for.
            masked: (B, T) bool for each masking of the taps, True = hidden, or None for none: see ``with_masks``.

        Returns:
            a float32 tensor for each tap, see :class:`Tap`.
        """
        if next(self.encoder.parameters()).device != source.device:
            self.encoder.to(source.device).prepare(setting("plain"))
            if self.encoder.mask_embedding is not None:
                self.encoder.mask_embedding = self.encoder.mask_embedding.to(source.device, self.dtype)
        with torch.inference_mode(), torch.autocast(source.device.type, enabled=False):
            asked = with_masks(taps, masked or {}, self.encoder.mask_embedding)
            found, _ = self.encoder.tap(source, padding_mask, asked)
        # Copies: what was made in inference mode cannot enter a graph.
        return [tensor.to(torch.float32, copy=True) for tensor in found]
