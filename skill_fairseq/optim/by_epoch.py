"""Learning rates that change per epoch, as in OS-KDFT's first scripts (arXiv:2305.17394)."""

import math
from dataclasses import dataclass, field
from typing import Any, Dict, List

from fairseq.dataclass import FairseqDataclass
from fairseq.optim.lr_scheduler import FairseqLRScheduler, register_lr_scheduler
from omegaconf import II


@dataclass
class ByEpochConfig(FairseqDataclass):
    """A cosine over epochs, or a ramp and an exponential decay under it."""

    epochs: int = field(default=100, metadata={"help": "epochs until the cosine ends"})
    final_share: float = field(default=0.01, metadata={"help": "rate at the cosine's end, as a fraction of lr"})
    ramp_epochs: int = field(
        default=0,
        metadata={"help": "multiply the cosine by epoch / ramp_epochs, and decay from this epoch on; 0: no ramp"},
    )
    decay: float = field(default=0.93, metadata={"help": "factor per epoch from epoch ramp_epochs"})
    fresh_optimizer: bool = field(
        default=False, metadata={"help": "reset the optimizer's moving averages at the start of every epoch"}
    )
    lr: List[float] = II("optimization.lr")


@register_lr_scheduler("by_epoch", dataclass=ByEpochConfig)
class ByEpoch(FairseqLRScheduler):
    """Multiplies the peak rate by :func:`epoch_factor`.

    Args:
        cfg: schedule.
        optimizer: the optimizer whose rate to set.

    Raises:
        ValueError: a field is not usable; names it.
    """

    def __init__(self, cfg: ByEpochConfig, optimizer: Any) -> None:
        super().__init__(cfg, optimizer)
        for name, least, most in (("final_share", 0.0, 1.0), ("decay", 0.0, 1.0)):
            value = getattr(cfg, name)
            if not least <= value <= most:
                raise ValueError(f"lr_scheduler.{name}: {value}; expected a number from {least:g} to {most:g}")
        for name, first in (("epochs", 1), ("ramp_epochs", 0)):
            value = getattr(cfg, name)
            if value < first:
                raise ValueError(f"lr_scheduler.{name}: {value}; expected a whole number of at least {first}")
        if len(cfg.lr) > 1:
            raise ValueError(f"lr_scheduler.lr: {list(cfg.lr)}; expected one rate, the schedule's highest")
        self.epoch = 0  # the current one
        self.step_begin_epoch(1)

    def step_begin_epoch(self, epoch: int) -> None:
        """Sets the rate of this epoch, counted from 1. A run that resumes inside an epoch calls this again for it."""
        if self.cfg.fresh_optimizer and epoch != self.epoch:
            self.optimizer.optimizer.state.clear()
        self.epoch = epoch
        cfg = self.cfg
        self.optimizer.set_lr(cfg.lr[0] * epoch_factor(epoch, cfg.epochs, cfg.final_share, cfg.ramp_epochs, cfg.decay))

    def state_dict(self) -> Dict[str, Any]:
        """fairseq's state with the current epoch."""
        return {**super().state_dict(), "epoch": self.epoch}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """See :meth:`state_dict`."""
        super().load_state_dict(state_dict)
        self.epoch = state_dict.get("epoch", self.epoch)  # another scheduler's has none


def epoch_factor(epoch: int, epochs: int, final_share: float, ramp_epochs: int = 0, decay: float = 1.0) -> float:
    """Factor of the peak rate in an epoch.

    With C(e) = final_share + (1 - final_share) (1 + cos(pi (e - 1) / epochs)) / 2: C(e) without a ramp; with a ramp of
    R epochs, C(e) e / R for e < R, and from R the rate of epoch R - 1 times ``decay`` per epoch.

    Args:
        epoch: e, from 1.
        epochs: length of the cosine, epochs.
        final_share: C at its end.
        ramp_epochs: R; 0 for none.
        decay: factor per epoch.
    """

    def cosine(e: int) -> float:
        return final_share + (1 - final_share) * (1 + math.cos(math.pi * min(e - 1, epochs) / epochs)) / 2

    if not ramp_epochs:
        return cosine(epoch)
    last = min(epoch, max(ramp_epochs - 1, 1))
    return cosine(last) * min(last / ramp_epochs, 1.0) * decay ** (epoch - last)
