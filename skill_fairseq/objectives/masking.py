"""Masked frames for objectives: their config fields, and how a batch draws them.

An objective that masks inherits its config from :class:`MaskingConfig` and asks for masked passes::

    @dataclass
    class MyConfig(MaskingConfig): ...

    self.masking = parse_masking(cfg, field)  # None where cfg.mask_prob is 0
    self.student_taps = [Tap((student.encoder_layers,), masking=self.masking)]

In training the dataset draws the frames of each masking, and the student replaces them by its learned mask embedding
(``mask_emb``); a teacher whose taps have the same masking replaces the same frames by its own.
:meth:`Objective.forward` reads them with ``masked_frames(sample, self.masking)``: (B, T) bool at the rate of the
convolutions, or None, as in validation, which masks nothing.

The loss stays a mean over **all** frames outside the padding, masked or not (a sum over some, divided by the number of
all). Batches are weighted by that number, so the update does not depend on how the audio is divided over ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import FunctionType
from typing import Any, Dict, List, Optional

import numpy as np
import torch
from torch import Tensor

from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.padding import frame_padding_mask
from skill_fairseq.modules.taps import SpanMasking

SELECTIONS = ("static", "uniform", "normal", "poisson")
MIN_SPANS = 2
"""Least number of spans per utterance, where they fit; as in HuBERT."""


@dataclass
class MaskingConfig:
    """Frames that are masked in training, named as in fairseq's HuBERT."""

    mask_prob: float = field(
        default=0.0,
        metadata={"help": "share of frames to mask, counted before spans overlap or fail to fit; 0: no masks"},
    )
    mask_length: int = field(default=10, metadata={"help": "frames of a masked span; the mean where lengths vary"})
    mask_selection: str = field(
        default="static",
        metadata={"help": "lengths: static, uniform (mask_other to twice mask_length), normal or poisson"},
    )
    mask_other: float = field(default=0.0, metadata={"help": "least length for uniform, standard deviation for normal"})
    no_mask_overlap: bool = field(default=False, metadata={"help": "spans neither overlap nor touch"})
    mask_min_space: int = field(default=1, metadata={"help": "frames between two spans with no_mask_overlap"})


def parse_masking(cfg: Any, field: str) -> Optional[SpanMasking]:
    """The masking that a :class:`MaskingConfig` describes; None without masks.

    Raises:
        ValueError: a value is out of range or has no effect; names the field.
    """
    if not cfg.mask_prob:
        for other in fields(MaskingConfig):
            value = getattr(cfg, other.name)
            if value != other.default:
                raise ValueError(
                    f"{field}.{other.name}: {value} does nothing with {field}.mask_prob=0; leave it out, or mask frames"
                )
        return None
    for ok, name, expected in (
        (0 < cfg.mask_prob <= 1, "mask_prob", "a share of the frames, from 0 to 1"),
        (cfg.mask_length >= 1, "mask_length", "a whole number of at least 1"),
        (cfg.mask_selection in SELECTIONS, "mask_selection", f"one of {', '.join(SELECTIONS)}"),
        (0 <= cfg.mask_other <= 2 * cfg.mask_length, "mask_other", "a number from 0 to twice mask_length"),
        (cfg.mask_min_space >= 1, "mask_min_space", "a whole number of at least 1"),
    ):
        if not ok:
            raise ValueError(f"{field}.{name}: {getattr(cfg, name)}; expected {expected}")
    lengths = cfg.mask_length, cfg.mask_selection, cfg.mask_other
    return SpanMasking(cfg.mask_prob, *lengths, cfg.no_mask_overlap, cfg.mask_min_space)


def draw_spans(masking: SpanMasking, frames: int, seed: Sequence[int]) -> np.ndarray:
    """The masked frames of one utterance.

    Calls fairseq's draw for one utterance at a time: for a batch it would drop masked frames until all utterances have
    the same number, and utterances would depend on each other.

    Args:
        masking: what to draw.
        frames: T, the utterance's frames without padding.
        seed: numbers that determine the draw; numpy's global state has no influence.

    Returns:
        (T,) bool, True = masked; all False where no span fits.
    """
    from fairseq.data.data_utils import compute_mask_indices  # here: skill-cluster needs no fairseq

    other: float = int(masking.other) if masking.selection == "uniform" else masking.other
    random = np.random.RandomState([int(number) % 2**32 for number in seed])
    # fairseq draws from numpy's global state, which the trainer may seed while the loader's thread is here.
    draw = FunctionType(
        compute_mask_indices.__code__,
        {**compute_mask_indices.__globals__, "np": _Numpy(random)},
        argdefs=compute_mask_indices.__defaults__,
    )
    try:
        return draw(
            (1, frames),
            None,
            masking.prob,
            masking.length,
            masking.selection,
            other,
            min_masks=MIN_SPANS,
            no_overlap=masking.no_overlap,
            min_space=masking.min_space,
        )[0]
    except (IndexError, ValueError):  # fairseq raises these where no span fits
        return np.zeros(frames, dtype=bool)


class _Numpy:
    """numpy with its own random state, and ``np.int``, which fairseq still uses."""

    int = int

    def __init__(self, random: np.random.RandomState) -> None:
        self.random = random

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def draw_masks(
    maskings: Sequence[SpanMasking],
    config: EncoderConfig,
    samples: int,
    padding_mask: Optional[Tensor],
    seeds: Sequence[Sequence[int]],
) -> Dict[SpanMasking, Tensor]:
    """The masked frames of a batch. An utterance's frames depend only on its seed and length.

    Args:
        maskings: one or several.
        config: shape of the encoder that reads the batch.
        samples: N, samples per row.
        padding_mask: (B, N) bool, True = padding, or None.
        seeds: one for each of the B utterances, see :func:`draw_spans`.

    Returns:
        (B, T) bool for each masking, True = masked; padding never is.
    """
    total = int(config.num_frames(samples))
    lengths: List[int] = [total] * len(seeds)
    if padding_mask is not None:
        lengths = (~frame_padding_mask(padding_mask, total, config)).sum(1).tolist()
    found = {masking: torch.zeros(len(seeds), total, dtype=torch.bool) for masking in maskings}
    for masking, masked in found.items():
        for row, (length, seed) in enumerate(zip(lengths, seeds)):
            masked[row, :length] = torch.from_numpy(draw_spans(masking, length, seed))
    return found


def masked_frames(sample: Optional[Mapping[str, Any]], masking: Optional[SpanMasking]) -> Optional[Tensor]:
    """(B, T) bool of a batch, True = masked; None without masking, and in validation."""
    return None if sample is None else (sample.get("masked") or {}).get(masking)
