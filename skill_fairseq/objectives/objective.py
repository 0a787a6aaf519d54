"""The base class of objectives, and their registry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Callable, Dict, Optional, Tuple

from torch import Tensor, nn

from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.taps import Tap

OBJECTIVES: Dict[str, Tuple[type, type]] = {}
"""Name -> (subclass of :class:`Objective`, dataclass of its config)."""


class Objective(nn.Module):
    """A loss between states of a student and of its teacher.

    Its parameters (projections, prediction heads) are trained and saved with the criterion; the student does not hold
    them. Subclasses set ``student_taps`` and ``teacher_taps``, and implement :meth:`forward`::

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
        cfg: its config; null values that it chooses are filled in.
        student, teachers: shapes of the encoders.
        field: path of its config, for messages: ``criterion``, or ``criterion.objectives.NAME``.

    Attributes:
        student_taps: the states that it needs of the student.
        teacher_taps: the states that it needs of the teachers; ``Tap.teacher`` says of which. Empty if it needs only
            labels.
        made_with: files that it read and that are valid for one teacher only: for the teacher's number, each file and
            the name and SHA-256 of that teacher. The task refuses any other.
        any_rate: whether the student's frames may be longer than the teacher's (``model.time_reduction``).
        supervised: class attribute: it needs no teacher, and its constructor also takes the task's labels, see
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
        self.made_with: Dict[int, Sequence[Tuple[str, str, str]]] = {}

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        padding_mask: Optional[Tensor] = None,
        sample: Optional[Mapping[str, Any]] = None,
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        """Args:
            student: one tensor per tap of ``student_taps``, with gradients.
            teacher: one float32 tensor per tap of ``teacher_taps``, without gradients.
            padding_mask: (B, T) bool of the student's frames, True = padding, or None.
            sample: the batch from the task's dataset, with labels if it has any.

        Returns:
            the loss, a scalar mean over all frames outside the padding; and the values to log, by name: scalars, which
            are averaged over frames, and pairs (2,) of a sum and a count, which are logged as their quotient.
        """
        raise NotImplementedError

    def settings(self, cfg: Mapping[str, Any]) -> Dict[str, Any]:
        """The settings that give its parameters their meaning; a run that starts from them must have the same.

        Args:
            cfg: config of this objective in this run or an earlier one; fields may be missing.

        Returns:
            comparable values by field name, without the fields that ``cfg`` lacks.
        """
        return {}


def choose_normalization(cfg: Any, teachers: Sequence[EncoderConfig]) -> None:
    """Fills in ``cfg.normalize_states`` where it is null: true if a teacher has pre-LayerNorm layers.

    In those (HuBERT and WavLM Large) nothing bounds the residual stream: states differ in size by orders of magnitude,
    and a distance between them would outweigh the size constraint.
    """
    if cfg.normalize_states is None:
        cfg.normalize_states = any(teacher.layer_norm_first for teacher in teachers)


def the_teacher(teachers: Sequence[EncoderConfig], field: str) -> EncoderConfig:
    """The teacher of an objective that takes exactly one.

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
