"""The frozen teacher, kept out of model, criterion, optimiser and checkpoint."""

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
"""Precisions that a teacher may run in."""


def check_alike(shapes: Sequence[EncoderConfig], names: Sequence[str], field: str = "task.teacher") -> None:
    """Refuses several teachers that cannot read the same waveforms and return the same frames.

    Args:
        shapes, names: shape and file of each teacher.
        field: config field that names them, for messages.

    Raises:
        ValueError: two differ in sample rate, normalisation or frames; names the files and values.
    """
    for shape, name in zip(shapes[1:], names[1:]):
        for what, first, other in (
            ("sample_rate", shapes[0].sample_rate, shape.sample_rate),
            ("normalize", shapes[0].normalize, shape.normalize),
            ("samples per frame", shapes[0].downsampling, shape.downsampling),
            (
                "samples that the first frame covers",
                shapes[0].feature_receptive_field,
                shape.feature_receptive_field,
            ),
        ):
            if first != other:
                raise ValueError(
                    f"{field}: {name} has {what} = {other}, but {names[0]} has {first}; expected the same for all "
                    "teachers, which read the same waveforms: remove one"
                )


class FrozenTeacher:
    """A teacher that is not a submodule of anything, so it is never trained, saved, cast or wrapped.

    Args:
        encoder: the teacher; it is converted in place.
        dtype: the precision to run in, a key of :data:`DTYPES`.
        compile: run its layers through ``torch.compile``, which takes a few minutes at the start.

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
        """Runs the teacher up to the deepest layer that the taps need.

        Args:
            source: (B, N) samples; the teacher moves to their device.
            padding_mask: (B, N) bool, True = padding, or None.
            taps: the states to return.
            masked: (B, T) bool for each masking of the taps, True = masked, or None: see ``with_masks``.

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
        # Copies, because inference tensors cannot enter an autograd graph.
        return [tensor.to(torch.float32, copy=True) for tensor in found]
