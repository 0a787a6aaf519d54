"""Prediction of the teacher's units, for masked frames as in HuBERT (arXiv:2106.07447) or for all frames.

DiceHuBERT (arXiv:2507.02911) trains a student this way. The units do not come from label files: each batch assigns the
frozen teacher's states to centroids, so any crop of the audio works.
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
    """Units, heads and weights of frames."""

    codebooks: Optional[Any] = field(
        default=None, metadata={"help": "file, or list of files, that skill-labels --units kmeans wrote"}
    )
    codebooks_sha256: Optional[Any] = field(
        default=None, metadata={"help": "SHA-256 of the files; null: filled in and saved with the run"}
    )
    teacher: int = field(default=0, metadata={"help": "number of the teacher that the codebooks belong to, from 0"})
    student_layer: Optional[int] = field(
        default=None, metadata={"help": "layer of the student that predicts the units; null: the last one"}
    )
    head: str = field(
        default="cosine",
        metadata={
            "help": "cosine: logits are cosines of a linear map to head_dim features with an embedding of each unit, "
            "divided by the temperature; linear: a linear map to the logits"
        },
    )
    head_dim: int = field(default=256, metadata={"help": "width of the cosine head; HuBERT's final_dim"})
    temperature: float = field(default=0.1, metadata={"help": "temperature of the cosine head; HuBERT's logit_temp"})
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
    """Loss = sum over codebooks of the mean over frames of w_t * cross-entropy of the teacher's unit at frame t.

    w_t is ``masked_weight`` or ``unmasked_weight``. Where nothing is masked, with ``mask_prob: 0`` and in validation,
    every frame has ``masked_weight``. The mean is over all frames, including those of weight 0; HuBERT divides the
    same sum by the number of masked frames.

    Args:
        cfg: a :class:`MaskedUnitsConfig`; layer and hashes are filled in.
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
                f"{field}.teacher: {cfg.teacher}; expected a number below {len(teachers)}, the length of task.teacher"
            )
        self._read_codebooks(teachers[cfg.teacher], field)
        if cfg.student_layer is None:
            cfg.student_layer = student.encoder_layers
        if not 0 <= cfg.student_layer <= student.encoder_layers:
            raise ValueError(
                f"{field}.student_layer: {cfg.student_layer}; expected a layer from 0 to {student.encoder_layers}"
            )
        # With pre-LayerNorm layers HuBERT predicts after a final LayerNorm; here the head holds its affine part.
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
        """Loads the files. They are not buffers, because half precision would round them."""
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
                    f"{field}.codebooks: {file} is for layer {book.layer} of width {width} of {book.teacher}, but the "
                    f"teacher has {teacher.encoder_layers} layers of width {teacher.encoder_embed_dim}; give that "
                    "teacher, or make a codebook of this one with skill-labels"
                )
        found = [sha256(file) for file in files]
        wanted = cfg.codebooks_sha256
        if wanted is not None and (list(wanted) if is_sequence(wanted) else [wanted]) != found:
            raise ValueError(
                f"{field}.codebooks_sha256: {wanted}, but {files} have {found}; give the files that the run "
                "started with, or null"
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
        """See :class:`Objective`; logs ``accuracy``, the share of correctly predicted units over all codebooks and
        frames with a weight above 0."""
        shape, masked = student[0].shape[:2], masked_frames(sample, self.masking)
        weights = torch.full(shape, self.cfg.masked_weight, device=student[0].device)
        if masked is not None:
            weights = weights.masked_fill(~masked, self.cfg.unmasked_weight)
        counted = torch.ones_like(weights, dtype=torch.bool) if padding_mask is None else ~padding_mask
        chosen = (counted & (weights > 0)).flatten().nonzero().flatten()
        if not len(chosen):  # the loss is 0, and every parameter still gets a gradient
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
        """Units (F,) of the chosen frames of (B, T, D), for each codebook of a file."""
        return tuple(book.assign(states.flatten(0, 1)[chosen]).unbind(-1))

    def settings(self, cfg: Mapping[str, Any]) -> Dict[str, Any]:
        """See :class:`Objective`."""
        names = ("codebooks_sha256", "student_layer", "head", "temperature")
        return {n: list(v) if is_sequence(v) else v for n, v in cfg.items() if n in names and v is not None}


class CosineHead(nn.Module):
    """HuBERT's head: logits cos(A s, e_k) / temperature, with a linear map A and an embedding e_k of each unit.

    Args:
        width: D, width of the states.
        units: K, number of units.
        cfg: a config with ``head_dim`` and ``temperature``.
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
    """Logits from a linear map.

    Args:
        width, units, cfg: see :class:`CosineHead`.
    """

    def __init__(self, width: int, units: int, cfg: Any) -> None:
        super().__init__(width, units)

    def forward(self, states: Tensor) -> Tensor:
        """(F, D) to (F, K), at least float32."""
        return at_least_float32(super().forward(states))
