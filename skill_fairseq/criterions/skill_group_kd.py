"""SKILL's criterion: the fields of its one objective and of the size constraint in one config."""

from dataclasses import dataclass
from typing import Any, Dict, List, Sequence

from fairseq.criterions import register_criterion

from skill_fairseq.checkpoints.safe_load import plain
from skill_fairseq.criterions.distillation import DistillationCriterion
from skill_fairseq.criterions.size_constraint import SizeConstraintConfig
from skill_fairseq.criterions.terms import Term
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.objectives import groups
from skill_fairseq.objectives.group_means import GroupMeans, GroupMeansConfig
from skill_fairseq.objectives.groups import parse_groups  # noqa: F401


@dataclass
class SkillGroupKDConfig(SizeConstraintConfig, GroupMeansConfig):
    """Groups, loss and size constraint."""


def read_groups(cfg: SkillGroupKDConfig) -> Any:
    """The unchecked groups of a config or its file, see :func:`skill_fairseq.objectives.groups.read_groups`."""
    return groups.read_groups(cfg.groups, cfg.groups_file, "criterion")


@register_criterion("skill_group_kd", dataclass=SkillGroupKDConfig)
class SkillGroupKDCriterion(DistillationCriterion):
    """:class:`DistillationCriterion` with :class:`GroupMeans` as its only objective.

    Attributes:
        projections: the objective; checkpoints name its projections ``projections.projections.N``.
    """

    unsupervised = "criterion.groups"

    def needs_teacher(self) -> bool:
        """It does."""
        return True

    def build_terms(self, student: EncoderConfig, teachers: Sequence[EncoderConfig]) -> List[Term]:
        """The only term; its values are logged without a prefix."""
        self.projections = GroupMeans(self.cfg, student, teachers)
        return [Term(self.projections, 1.0, self.cfg, "projections", "criterion", "")]

    def chosen(self) -> Dict[str, Any]:
        """See :class:`DistillationCriterion`."""
        names = ("groups", "groups_file", "normalize_states")
        return {name: plain(self.cfg[name]) for name in names}
