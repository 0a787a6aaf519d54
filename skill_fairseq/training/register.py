"""Puts the trainer into ``fairseq-hydra-train`` and ``fairseq-train``."""

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
    """Called when the user dir is imported by a program that trains.

    Raises:
        OSError: this is not Linux.
    """
    require_linux("training with skill_fairseq")
    program: Any = sys.modules["fairseq_cli.train"]
    if program.Trainer is not Trainer:  # it is there already, or the program has its own
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
    """``common.amp``: hand on to fairseq's optimizer, not to the torch optimizer inside it.

    With ``composite``: "AttributeError: 'CompositeOptimizer' object has no attribute 'param_groups'", and at the
    first checkpoint "... no attribute '_optimizer_state_dict_pre_hooks'". With all others no error, but gradients
    are divided by the loss scale twice, and soon are nothing beside Adam's epsilon: torch's scaler remembers by
    object what it has unscaled, and was handed torch's optimizer to unscale, fairseq's to step.
    """
    AMPOptimizer.optimizer = property(lambda self: self.fp32_optimizer, AMPOptimizer.optimizer.fset)


def _stopping(validate_and_save: Any) -> Any:
    """fairseq's ``validate_and_save``, called after every update, which also stops a preempted run."""

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
                torch.distributed.barrier()  # a rank that exits early would end the rank that writes
            preemption.leave(trainer.data_parallel_rank)
        return result

    return validate_save_and_stop


@functools.cache  # once
def _say_whose(trainer: str) -> None:
    logger.warning(
        f"{trainer} trains (as with common.model_parallel_size > 1), not skill_fairseq's trainer: signals, damaged "
        "checkpoints, unreadable files and losses that are not finite are as in stock fairseq"
    )
