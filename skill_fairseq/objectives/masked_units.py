"""Prediction of the teacher's units: of masked frames as HuBERT's (arXiv:2106.07447), or of all.

DiceHuBERT (arXiv:2507.02911) trains a student so. The units are not read from label files: the frozen teacher's states
are assigned to centroids batch by batch, whatever crop of the audio the batch holds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skill_fairseq.files import sha256
from skill_fairseq.labels.codebook import load_codebook
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.taps import Tap
from skill_fairseq.objectives.groups import is_sequence
from skill_fairseq.objectives.loss import at_least_float32, check_weights
from skill_fairseq.objectives.masking import MaskingConfig, masked_frames, parse_masking
from skill_fairseq.objectives.objective import Objective, register_objective


@dataclass
class MaskedUnitsConfig(MaskingConfig):
    """Units, heads, and which frames count."""

    codebooks: Optional[Any] = field(
        default=None, metadata={"help": "file, or list of files, that skill-labels --units kmeans wrote"}
    )
    codebooks_sha256: Optional[Any] = field(
        default=None, metadata={"help": "hashes of the files; null: they are filled in and saved with the run"}
    )
    teacher: int = field(default=0, metadata={"help": "which of several teachers the codebooks are of, from 0"})
    student_layer: Optional[int] = field(
        default=None, metadata={"help": "layer of the student that predicts the units; null: the last one"}
    )
    head: str = field(
        default="cosine",
        metadata={
            "help": "cosine: a linear map to head_dim features, whose cosine with an embedding of each unit, divided "
            "by the temperature, is the logit; linear: a linear map to the logits"
        },
    )
    head_dim: int = field(default=256, metadata={"help": "features of the cosine; HuBERT's final_dim"})
    temperature: float = field(default=0.1, metadata={"help": "of the logits of cosine; HuBERT's logit_temp"})
    masked_weight: float = field(default=1.0, metadata={"help": "weight of masked frames; HuBERT's pred_masked_weight"})
    unmasked_weight: float = field(
        default=0.0, metadata={"help": "weight of the other frames; HuBERT's pred_nomask_weight"}
    )
    mask_prob: float = field(
        default=0.8,
        metadata={"help": "share of the frames to mask, before spans overlap or find no room; 0: no masks"},
    )


@register_objective("masked_units", MaskedUnitsConfig)
class MaskedUnits(Objective):
    """loss = sum over codebooks of mean over frames of w_t * cross-entropy of the teacher's unit at frame t.

    w_t is ``masked_weight`` or ``unmasked_weight``. Where nothing is masked, with ``mask_prob: 0`` and in validation,
    every frame weighs as masked ones do. The mean is over all frames, those of weight 0 too: HuBERT divides the same
    sum by the number of masked ones.

    Args:
        cfg: a :class:`MaskedUnitsConfig`; layer and hashes are written into it.
        student, teachers, field: see :class:`Objective`.

    Raises:
        FileNotFoundError, ValueError: codebooks, heads, weights or masks are not usable; names the field.
    """

    def __init__(
        self, cfg: Any, student: EncoderConfig, teachers: Sequence[EncoderConfig], field: str = "criterion"
    ) -> None:
        super().__init__(cfg, student, teachers, field)
        self.cfg = cfg
        self.masking = parse_masking(cfg, field)
        check_weights(cfg, ("masked_weight", "unmasked_weight"), field)
        if self.masking is None and (cfg.unmasked_weight or not cfg.masked_weight):
            raise ValueError(
                f"{field}.unmasked_weight: {cfg.unmasked_weight} does nothing with {field}.mask_prob=0, where all "
                f"frames have {field}.masked_weight ({cfg.masked_weight}); leave both out"
            )
        if not 0 <= cfg.teacher < len(teachers):
            raise ValueError(
                f"{field}.teacher: {cfg.teacher}; expected a number below {len(teachers)}, of task.teacher"
            )
        self._read_codebooks(teachers[cfg.teacher], field)
        if cfg.student_layer is None:
            cfg.student_layer = student.encoder_layers
        if not 0 <= cfg.student_layer <= student.encoder_layers:
            raise ValueError(
                f"{field}.student_layer: {cfg.student_layer}; expected a layer from 0 to {student.encoder_layers}"
            )
        # Where layers begin with their LayerNorm, HuBERT predicts behind a last one; here the head has its affine part.
        self.student_taps = [Tap((cfg.student_layer,), normalize=student.layer_norm_first, masking=self.masking)]
        self.teacher_taps = [Tap((book.layer,), teacher=cfg.teacher) for book in self.codebooks]
        kinds = {"cosine": CosineHead, "linear": LinearHead}
        if cfg.head not in kinds:
            raise ValueError(f"{field}.head: {cfg.head!r}; expected one of {', '.join(kinds)}")
        for name in ("head_dim", "temperature"):
            if not 0 < getattr(cfg, name) < float("inf"):
                raise ValueError(f"{field}.{name}: {getattr(cfg, name)}; expected a number above 0")
        sizes = [book.centroids.size(1) for book in self.codebooks for _ in book.centroids]
        self.heads = nn.ModuleList(kinds[cfg.head](student.encoder_embed_dim, size, cfg) for size in sizes)

    def _read_codebooks(self, teacher: EncoderConfig, field: str) -> None:
        """Loads the files; they are no buffers, which half precision would round."""
        cfg, given = self.cfg, self.cfg.codebooks
        files = list(given) if is_sequence(given) else [given] if given else []
        if not files:
            raise ValueError(
                f"{field}.codebooks: not set; expected a file that skill-labels --units kmeans wrote, or a list of them"
            )
        self.codebooks = [load_codebook(file, f"{field}.codebooks") for file in files]
        for file, book in zip(files, self.codebooks):
            width = book.centroids.size(2)
            if width != teacher.encoder_embed_dim or not 0 <= book.layer <= teacher.encoder_layers:
                raise ValueError(
                    f"{field}.codebooks: {file} is of layer {book.layer} of width {width} of {book.teacher}, but the "
                    f"teacher has {teacher.encoder_layers} layers of width {teacher.encoder_embed_dim}; give that one, "
                    "or make a codebook of this one by skill-labels"
                )
        found = [sha256(file) for file in files]
        wanted = cfg.codebooks_sha256
        if wanted is not None and (list(wanted) if is_sequence(wanted) else [wanted]) != found:
            raise ValueError(
                f"{field}.codebooks_sha256: {wanted}, but those of {files} are {found}; give the files that the run "
                "began with, or null"
            )
        cfg.codebooks, cfg.codebooks_sha256 = files, found
        self.made_with = {cfg.teacher: [(str(f), b.teacher, b.teacher_sha256) for f, b in zip(files, self.codebooks)]}

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        padding_mask: Optional[Tensor] = None,
        sample: Optional[Mapping[str, Any]] = None,
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        """See :class:`Objective`; logged is ``accuracy``, of units predicted right those among frames of a weight above
        0, in all codebooks."""
        shape, masked = student[0].shape[:2], masked_frames(sample, self.masking)
        weights = torch.full(shape, self.cfg.masked_weight, device=student[0].device)
        if masked is not None:
            weights = weights.masked_fill(~masked, self.cfg.unmasked_weight)
        counted = torch.ones_like(weights, dtype=torch.bool) if padding_mask is None else ~padding_mask
        chosen = (counted & (weights > 0)).flatten().nonzero().flatten()
        if not len(chosen):  # their loss is 0, and every parameter has its gradient
            chosen = counted.flatten().nonzero().flatten()
        weight = weights.flatten()[chosen]
        states = student[0].flatten(0, 1)[chosen]
        every = [unit for book, seen in zip(self.codebooks, teacher) for unit in self._units(book, seen, chosen)]
        losses, right = [], []
        for head, unit in zip(self.heads, every):
            logits = head(states)
            losses.append((F.cross_entropy(logits, unit, reduction="none") * weight).sum())
            right.append((logits.argmax(-1) == unit).sum())
        seen = torch.stack(right).new_tensor(len(right) * len(chosen))
        accuracy = torch.stack([torch.stack(right).sum(), seen]).double()
        return torch.stack(losses).sum() / counted.sum(), {"accuracy": accuracy}

    @staticmethod
    def _units(book: Any, states: Tensor, chosen: Tensor) -> Tuple[Tensor, ...]:
        """(F,) for each codebook of a file, of the chosen frames of (B, T, D)."""
        return tuple(book.assign(states.flatten(0, 1)[chosen]).unbind(-1))

    def settings(self, cfg: Mapping[str, Any]) -> Dict[str, Any]:
        """See :class:`Objective`."""
        names = ("codebooks_sha256", "student_layer", "head", "temperature")
        return {n: list(v) if is_sequence(v) else v for n, v in cfg.items() if n in names and v is not None}


class CosineHead(nn.Module):
    """HuBERT's: logits cos(A s, e_k) / temperature, with a linear map A and an embedding e_k of each unit.

    Args:
        width: D, of the states.
        units: K.
        cfg: with ``head_dim`` and ``temperature``.
    """

    def __init__(self, width: int, units: int, cfg: Any) -> None:
        super().__init__()
        self.temperature = cfg.temperature
        self.projection = nn.Linear(width, cfg.head_dim)
        self.embeddings = nn.Parameter(torch.rand(units, cfg.head_dim))  # as fairseq's label_embs_concat

    def forward(self, states: Tensor) -> Tensor:
        """(F, D) to (F, K), at least float32."""
        projected, embeddings = at_least_float32(self.projection(states)), at_least_float32(self.embeddings)
        with torch.autocast(states.device.type, enabled=False):
            return F.normalize(projected, dim=-1) @ F.normalize(embeddings, dim=-1).t() / self.temperature


class LinearHead(nn.Linear):
    """Logits by a linear map.

    Args:
        width, units, cfg: see :class:`CosineHead`.
    """

    def __init__(self, width: int, units: int, cfg: Any) -> None:
        super().__init__(width, units)

    def forward(self, states: Tensor) -> Tensor:
        """(F, D) to (F, K), at least float32."""
        return at_least_float32(super().forward(states))
