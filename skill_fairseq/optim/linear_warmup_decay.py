"""A learning-rate schedule: linear warm-up, then linear (DPHuBERT, DistilHuBERT) or cosine (STaR) decay to 0."""

from dataclasses import dataclass, field
from typing import Any, List

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.optim.lr_scheduler import FairseqLRScheduler, register_lr_scheduler
from omegaconf import II

from skill_fairseq.pruning.lagrangian import linear_warmup_decay, updates_of


@dataclass
class LinearWarmupDecayConfig(FairseqDataclass):
    """Warm-up, length and peak of the schedule."""

    warmup_updates: float = field(
        default=15000, metadata={"help": "updates until the peak, or a fraction of all updates, such as 0.3"}
    )
    total_num_update: int = field(
        default=II("optimization.max_update"), metadata={"help": "update at which the rate reaches 0"}
    )
    decay: ChoiceEnum(["linear", "cosine"]) = field(  # type: ignore[valid-type]
        default="linear", metadata={"help": "how the rate falls after the warm-up"}
    )
    lr: List[float] = II("optimization.lr")


@register_lr_scheduler("linear_warmup_decay", dataclass=LinearWarmupDecayConfig)
class LinearWarmupDecay(FairseqLRScheduler):
    """Multiplies the peak rate by :func:`linear_warmup_decay`.

    fairseq's ``polynomial_decay`` is one update late: its first update has a rate of 0.

    Args:
        cfg: schedule.
        optimizer: the optimizer whose rate to set.
    """

    def __init__(self, cfg: LinearWarmupDecayConfig, optimizer: Any) -> None:
        super().__init__(cfg, optimizer)
        self.warmup = updates_of(cfg.warmup_updates, cfg.total_num_update, "lr_scheduler.warmup_updates")
        if cfg.total_num_update <= self.warmup:
            raise ValueError(
                f"lr_scheduler.warmup_updates: {self.warmup} is not below the {cfg.total_num_update} updates of "
                "the run (optimization.max_update); lower it or raise the other"
            )
        self.step_update(0)

    def step_update(self, num_updates: int) -> float:
        """Sets the rate for the update with this index, from 0."""
        factor = linear_warmup_decay(num_updates, self.warmup, self.cfg.total_num_update, self.cfg.decay)
        self.optimizer.set_lr(self.cfg.lr[0] * factor)
        return self.optimizer.get_lr()
