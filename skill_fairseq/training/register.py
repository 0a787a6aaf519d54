"""Installs the trainer in ``fairseq-hydra-train`` and ``fairseq-train``."""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any, List, Optional, Tuple

import torch
from fairseq import checkpoint_utils
from fairseq.data import iterators
from fairseq.models import distributed_fairseq_model
from fairseq.optim.amp_optimizer import AMPOptimizer
from fairseq.trainer import Trainer

from skill_fairseq.messages import require_linux
from skill_fairseq.training.checkpoint_files import WholeCopies
from skill_fairseq.training.data_parallel import DistributedAnywhere, DistributedByType, refusing
from skill_fairseq.training.loading import shield_workers
from skill_fairseq.training.preemption import preemption
from skill_fairseq.training.trainer import SkillTrainer

logger = logging.getLogger(__name__)

Validated = Tuple[List[Optional[float]], bool]


def register_trainer() -> None:
    """Called when a training program imports the user dir.

    Raises:
        OSError: this is not Linux.
    """
    require_linux("training with skill_fairseq")
    program: Any = sys.modules["fairseq_cli.train"]
    if program.Trainer is not Trainer:  # already installed, or the program has its own
        return
    program.Trainer = SkillTrainer
    program.validate_and_save = _stopping(program.validate_and_save)
    program.fsdp_enable_wrap = refusing(program.fsdp_enable_wrap)
    checkpoint_utils.PathManager = WholeCopies
    distributed_fairseq_model.LegacyDistributedDataParallel = DistributedByType
    distributed_fairseq_model.DistributedDataParallel = DistributedAnywhere
    shield_workers(iterators)
    give_amp_one_optimizer()


def give_amp_one_optimizer() -> None:
    """``common.amp``: passes calls to fairseq's optimizer, not to the torch optimizer inside it.

    With ``composite``: "AttributeError: 'CompositeOptimizer' object has no attribute 'param_groups'", and at the first
    checkpoint "... no attribute '_optimizer_state_dict_pre_hooks'". With all others there is no error, but gradients
    are divided by the loss scale twice, and soon vanish against Adam's epsilon: torch's scaler remembers unscaled
    optimizers by object, and gets torch's optimizer to unscale but fairseq's to step.
    """
    AMPOptimizer.optimizer = property(lambda self: self.fp32_optimizer, AMPOptimizer.optimizer.fset)


def _stopping(validate_and_save: Any) -> Any:
    """Like fairseq's ``validate_and_save``, which is called after every update, but also stops a preempted run."""

    def validate_save_and_stop(
        cfg: Any, trainer: Trainer, task: Any, epoch_itr: Any, valid_subsets: List[str], end_of_epoch: bool
    ) -> Validated:
        result: Validated = validate_and_save(cfg, trainer, task, epoch_itr, valid_subsets, end_of_epoch)
        if not isinstance(trainer, SkillTrainer):
            _say_whose(type(trainer).__name__)
        elif result[1]:
            trainer.end()
        elif trainer.preempted:
            checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, epoch_itr, None)
            if torch.distributed.is_initialized():
                torch.distributed.barrier()  # a rank that exits early would kill the rank that writes
            preemption.leave(trainer.data_parallel_rank)
        return result

    return validate_save_and_stop


@functools.cache  # once
def _say_whose(trainer: str) -> None:
    logger.warning(
        f"{trainer} (as with common.model_parallel_size > 1) replaces skill_fairseq's trainer: signals, damaged "
        "checkpoints, unreadable files and losses that are not finite are handled as in stock fairseq"
    )
