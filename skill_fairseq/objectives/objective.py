"""What every objective has: what it asks of student and teacher, its parameters, its loss; and their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Callable, Dict, Optional, Tuple

from torch import Tensor, nn

from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.taps import Tap

OBJECTIVES: Dict[str, Tuple[type, type]] = {}
"""By name: subclass of :class:`Objective`, and the dataclass of its config."""


class Objective(nn.Module):
    """A loss between what a student and its teacher compute.

    Its parameters (projections, prediction heads) are trained and saved with the criterion, and no part of the student.
    Subclasses set ``student_taps`` and ``teacher_taps``, and implement :meth:`forward`::

        @register_objective("last_layer", LastLayerConfig)
        class LastLayer(Objective):
            def __init__(self, cfg, student, teachers, field):
                super().__init__(cfg, student, teachers, field)
                self.student_taps = [Tap((student.encoder_layers,))]
                self.teacher_taps = [Tap((teachers[0].encoder_layers,))]
                self.head = nn.Linear(student.encoder_embed_dim, teachers[0].encoder_embed_dim)

            def forward(self, student, teacher, padding_mask=None, sample=None):
                states = [self.head(student[0]), teacher[0]]
                if padding_mask is not None:
                    states = without_padding(states, padding_mask)
                return F.mse_loss(*states), {}

    Args:
        cfg: its config; values that it chooses itself are written there.
        student, teachers: shapes of the encoders.
        field: where its config stands, for messages: ``criterion``, or ``criterion.objectives.NAME``.

    Attributes:
        student_taps: what it asks of the student.
        teacher_taps: what it asks of the teachers, each tap of that which ``Tap.teacher`` says; nothing where it needs
            labels alone.
        any_rate: whether it takes a student whose frames are longer than the teacher's (``model.time_reduction``).
        supervised: of a class: it needs no teacher, and its constructor takes the task's labels as well, see
            :class:`~skill_fairseq.objectives.supervised.Supervised`.
    """

    any_rate = False
    supervised = False

    def __init__(
        self, cfg: Any, student: EncoderConfig, teachers: Sequence[EncoderConfig], field: str = "criterion"
    ) -> None:
        super().__init__()
        self.student_taps: Sequence[Tap] = ()
        self.teacher_taps: Sequence[Tap] = ()

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        padding_mask: Optional[Tensor] = None,
        sample: Optional[Mapping[str, Any]] = None,
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        """Args:
            student: a tensor for each of ``student_taps``, with gradients.
            teacher: a tensor for each of ``teacher_taps``, float32, without.
            padding_mask: (B, T) bool of the student's frames, True = padding, or None.
            sample: the batch as the task's dataset made it, with labels where it has some.

        Returns:
            the loss, a scalar, a mean over all frames outside the padding; and what to log, by name: scalars, of which
            means over frames are logged, and pairs (2,) of a sum and a count, of which the quotient is.
        """
        raise NotImplementedError

    def settings(self, cfg: Mapping[str, Any]) -> Dict[str, Any]:
        """What the meaning of its parameters depends on: a run that starts from them must have the same.

        Args:
            cfg: config of this objective in this run or an earlier one; fields may be missing.

        Returns:
            comparable values by name of the field, those that ``cfg`` does not have left out.
        """
        return {}


def choose_normalization(cfg: Any, teachers: Sequence[EncoderConfig]) -> None:
    """Fills in ``cfg.normalize_states`` where it is null: yes where a teacher's layers begin with their LayerNorm.

    There (HuBERT and WavLM Large) nothing bounds what layers add up: their states differ in size by orders of
    magnitude, and a distance between them would outweigh the size constraint.
    """
    if cfg.normalize_states is None:
        cfg.normalize_states = any(teacher.layer_norm_first for teacher in teachers)


def the_teacher(teachers: Sequence[EncoderConfig], field: str) -> EncoderConfig:
    """The one teacher of an objective that takes no more.

    Raises:
        ValueError: there are several.
    """
    if len(teachers) > 1:
        raise ValueError(f"{field}: task.teacher has {len(teachers)} teachers, and this objective takes one; give one")
    return teachers[0]


def register_objective(name: str, dataclass: type) -> Callable[[type], type]:
    """A decorator that gives an objective a name for configs.

    Args:
        name: the config's ``_name``.
        dataclass: its fields, all with defaults; omegaconf reads them.

    Raises:
        ValueError: the name is taken.
    """

    def register(cls: type) -> type:
        if name in OBJECTIVES:
            raise ValueError(f"objective {name!r} is registered twice: {OBJECTIVES[name][0].__name__}, {cls.__name__}")
        OBJECTIVES[name] = cls, dataclass
        return cls

    return register
