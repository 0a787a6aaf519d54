"""Masked frames for objectives: the fields that say how many, and the draw of one batch.

An objective that masks takes :class:`MaskingConfig` into its own config, and asks for masked passes::

    @dataclass
    class MyConfig(MaskingConfig): ...

    self.masking = parse_masking(cfg, field)  # None where cfg.mask_prob is 0
    self.student_taps = [Tap((student.encoder_layers,), masking=self.masking)]

In training the dataset draws the frames of every masking that is asked for, and the student puts its own mask embedding
(``mask_emb``, which is then learned) in their place; a teacher whose taps have the same masking gets the same frames
hidden by its own. What :meth:`Objective.forward` needs of them is ``masked_frames(sample, self.masking)``, (B, T) bool
at the rate of the convolutions, or None: in validation nothing is hidden.

The loss stays a mean over **all** frames outside the padding, masked or not (a sum over some of them, divided by the
number of all): batches are weighed by that number, so that any division of the audio over ranks gives the same update.
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
"""Of an utterance, where they fit; as in HuBERT."""


@dataclass
class MaskingConfig:
    """Frames that are masked in training, named as in fairseq's HuBERT."""

    mask_prob: float = field(
        default=0.0,
        metadata={"help": "share of the frames to mask, before spans overlap or find no room; 0: no masks"},
    )
    mask_length: int = field(default=10, metadata={"help": "frames of a masked span; the mean where lengths vary"})
    mask_selection: str = field(
        default="static",
        metadata={"help": "lengths: static, uniform (mask_other to twice mask_length), normal or poisson"},
    )
    mask_other: float = field(default=0.0, metadata={"help": "least length of uniform, standard deviation of normal"})
    no_mask_overlap: bool = field(default=False, metadata={"help": "spans neither overlap nor touch"})
    mask_min_space: int = field(default=1, metadata={"help": "frames between two spans with no_mask_overlap"})


def parse_masking(cfg: Any, field: str) -> Optional[SpanMasking]:
    """What the fields of a :class:`MaskingConfig` say; None without masks.

    Raises:
        ValueError: a value is out of range, or does nothing; names the field.
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

    fairseq's draw, of one utterance at a time: in a batch it drops masked frames until all utterances have as many,
    so that they would depend on each other.

    Args:
        masking: how.
        frames: T, of the utterance without padding.
        seed: numbers that decide the draw, alone: numpy's own state plays no part.

    Returns:
        (T,) bool, True = masked; nothing is where no span fits.
    """
    from fairseq.data.data_utils import compute_mask_indices  # here: skill-cluster needs no fairseq

    other: float = int(masking.other) if masking.selection == "uniform" else masking.other
    random = np.random.RandomState([int(number) % 2**32 for number in seed])
    # fairseq's draws from numpy's own state, which the trainer seeds while the loader's thread is here.
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
    except (IndexError, ValueError):  # so fairseq fails where no span finds room
        return np.zeros(frames, dtype=bool)


class _Numpy:
    """numpy with random numbers of its own, and the name that fairseq still calls ``int`` by."""

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
    """The masked frames of a batch. Those of an utterance depend only on its seed and its length.

    Args:
        maskings: how, one or several.
        config: shape of the encoder that hears the batch.
        samples: N, of each row.
        padding_mask: (B, N) bool, True = padding, or None.
        seeds: of each of the B utterances, see :func:`draw_spans`.

    Returns:
        (B, T) bool for each masking, True = masked; no padding is.
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
    """(B, T) bool of a batch, True = masked; None where nothing is: without masking, and in validation."""
    return None if sample is None else (sample.get("masked") or {}).get(masking)
