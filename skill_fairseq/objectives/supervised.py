"""Base class of objectives that learn from labels, and pooling over time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Dict, Optional

import torch
from torch import Tensor, nn

from skill_fairseq.labels.targets import NONE, Target
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.taps import Tap
from skill_fairseq.objectives.groups import is_sequence
from skill_fairseq.objectives.loss import at_least_float32
from skill_fairseq.objectives.objective import Objective, choose_normalization


@dataclass
class SupervisedConfig:
    """Labels and student layers."""

    target: Optional[str] = field(default=None, metadata={"help": "name of the labels, one of task.targets"})
    layers: Any = field(
        default="last",
        metadata={
            "help": "the student's layers: last, all (from 0), or a list; several are summed with learned weights, "
            "initialised from U(0, 1)"
        },
    )
    normalize_states: Optional[bool] = field(
        default=None,
        metadata={"help": "layer-normalise every state first; null: only for students with pre-LayerNorm layers"},
    )


class Supervised(Objective):
    """An objective that learns from labels and needs no teacher.

    Subclasses set ``sequences`` to the kind of labels they take. Utterances without a label do not count.

    Args:
        cfg: a :class:`SupervisedConfig`; null fields are filled in.
        student, teachers, field: see :class:`Objective`.
        targets: labels of the task by name.

    Raises:
        ValueError: the target does not exist or is of the wrong kind, or layers are not usable; names the field.

    Attributes:
        target: the labels.
    """

    any_rate = True
    supervised = True
    sequences = False

    def __init__(
        self,
        cfg: Any,
        student: EncoderConfig,
        teachers: Sequence[EncoderConfig],
        field: str,
        targets: Mapping[str, Target],
    ) -> None:
        super().__init__(cfg, student, teachers, field)
        self.cfg = cfg
        if cfg.target not in targets:
            known = ", ".join(targets) or "none; set task.targets, as in {speaker: {column: speaker}}"
            raise ValueError(f"{field}.target: {cfg.target}; expected one of the labels of task.targets: {known}")
        self.target = targets[cfg.target]
        if self.target.is_sequence != self.sequences:
            raise ValueError(
                f"{field}.target: {cfg.target} is {'a sequence of units' if self.target.is_sequence else 'a class'} of "
                f"an utterance; expected {'units, from a file such as ltr' if self.sequences else 'classes'}"
            )
        layers, last = cfg.layers, student.encoder_layers
        if isinstance(layers, str):
            layers = {"last": [last], "all": list(range(last + 1))}.get(layers)
        if not is_sequence(layers) or not layers or any(type(i) is not int or not 0 <= i <= last for i in layers):
            raise ValueError(f"{field}.layers: {cfg.layers}; expected last, all, or a list of layers from 0 to {last}")
        cfg.layers = list(layers)
        choose_normalization(cfg, [student])
        self.student_taps = [Tap((layer,), normalize=cfg.normalize_states) for layer in cfg.layers]
        self.layer_weights = nn.Parameter(torch.rand(len(layers))) if len(layers) > 1 else None

    def states(self, student: Sequence[Tensor]) -> Tensor:
        """(B, T, D), the weighted sum of the (B, T, D) states of ``student_taps``."""
        if self.layer_weights is None:
            return student[0]
        return weighted_sum(student, self.layer_weights)

    def labels(self, sample: Optional[Mapping[str, Any]]) -> Tensor:
        """Labels of a batch, int64: (B,) classes or (B, U) units, -1 for padding and for no label.

        Raises:
            ValueError: the batch has none of this kind.
        """
        found = ((sample or {}).get("targets") or {}).get(self.target.name)
        if found is None:
            raise ValueError(f"sample: no targets named {self.target.name}; expected those of task.targets")
        return found

    def settings(self, cfg: Mapping[str, Any]) -> Dict[str, Any]:
        """See :class:`Objective`."""
        return {n: list(v) if is_sequence(v) else v for n, v in cfg.items() if n in ("layers", "normalize_states")}


def weighted_sum(states: Sequence[Tensor], weights: Tensor) -> Tensor:
    """sum over l of w_l h_l, of states (B, T, D) and weights (L,)."""
    return torch.stack([weight * state for weight, state in zip(weights, states)]).sum(0)


def pool(states: Tensor, padding_mask: Optional[Tensor] = None, deviation: bool = False) -> Tensor:
    """Statistics over time, in at least float32.

    Args:
        states: (B, T, D).
        padding_mask: (B, T) bool, True = padding, or None.
        deviation: also the standard deviation (unbiased; 0 for a single frame).

    Returns:
        (B, D) means, or (B, 2 D) means and deviations.
    """
    states = at_least_float32(states)
    if padding_mask is None:
        padding_mask = states.new_zeros(states.shape[:2], dtype=torch.bool)
    states = states.masked_fill(padding_mask.unsqueeze(-1), 0.0)
    count = (~padding_mask).sum(1, keepdim=True).clamp(min=1).to(states.dtype)
    mean = states.sum(1) / count
    if not deviation:
        return mean
    centred = (states - mean.unsqueeze(1)).masked_fill(padding_mask.unsqueeze(-1), 0.0)
    variance = centred.square().sum(1) / (count - 1).clamp(min=1)
    return torch.cat([mean, variance.clamp(min=1e-10).sqrt()], 1)


def labelled(labels: Tensor) -> Tensor:
    """(B,) bool: which utterances have a label, from (B,) classes or (B, U) units."""
    return (labels if labels.dim() == 1 else labels[:, :1].flatten()) != NONE
