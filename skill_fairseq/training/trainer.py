"""fairseq's trainer, made fault-tolerant for clusters."""

from __future__ import annotations

import contextlib
import logging
import math
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from fairseq import metrics
from fairseq.distributed import utils as distributed_utils
from fairseq.trainer import Trainer
from omegaconf import OmegaConf, open_dict
from torch import Tensor

from skill_fairseq.messages import printable
from skill_fairseq.modules.fake_quantize import Ranges
from skill_fairseq.modules.host import numbers, to_host
from skill_fairseq.modules.tf32 import allow_tf32
from skill_fairseq.pruning.elastic import NestedSizes
from skill_fairseq.pruning.exact import ExactConstraint
from skill_fairseq.pruning.reach import check_reach, log_sparsity
from skill_fairseq.training.changed_settings import warn_of_another_teacher, warn_of_changes
from skill_fairseq.training.checkpoint_files import newest_whole_checkpoint, writing
from skill_fairseq.training.data_parallel import check_backend
from skill_fairseq.training.epoch_batches import KEY as BATCHES
from skill_fairseq.training.epoch_batches import fingerprint, skips_to_next_epoch
from skill_fairseq.training.half_precision import (
    MasterWeights,
    check_memory_efficient,
    load_moments_exactly,
    load_scaler_state,
    scaler_state,
)
from skill_fairseq.training.preemption import preemption
from skill_fairseq.training.run_lock import lock_run, unlock_run
from skill_fairseq.training.values import check_values

logger = logging.getLogger(__name__)


def _without_messages(batch: Dict[str, Any]) -> Dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "unreadable"}


class UpdateSkipped(Exception):
    """The gradients of this update are not usable."""


class SkillTrainer(Trainer):
    """Resumes from the newest undamaged checkpoint, skips bad data, and stops all ranks together.

    Events of one rank (a signal, an unreadable file, a loss that is not finite) travel with the statistics that fairseq
    sums over ranks in every update, so that all ranks act in the same update, without extra communication.

    The task's config sets the tolerance: ``max_unreadable_files`` per epoch and consecutive ``max_skipped_updates``.
    Tasks without these fields keep fairseq's behaviour: the first loss that is not finite ends the run.

    Attributes:
        preempted: whether a rank was asked to stop, equal on all ranks.
    """

    _dummy_batch: Any

    def __init__(self, cfg: Any, task: Any, model: Any, criterion: Any, quantizer: Any = None) -> None:
        if OmegaConf.is_config(cfg):
            plain: Any = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
            check_values(plain)
        check_backend(cfg.distributed_training, cfg.optimization.use_bmuf)
        self._constraint = getattr(criterion, "constraint", None)
        if isinstance(self._constraint, ExactConstraint):
            groups = getattr(cfg.optimizer, "groups", None)
            if groups and "multipliers" in groups:
                with open_dict(groups):  # fairseq refuses a group without parameters
                    del groups["multipliers"]
        lost = check_memory_efficient(cfg.common)
        sharded = cfg.distributed_training.ddp_backend == "fully_sharded"  # it keeps float32 weights itself
        cast = (cfg.common.fp16 or cfg.common.bf16) and not lost and not sharded
        self._masters = MasterWeights(model, criterion) if cast else None
        self._ranges = Ranges(model)
        super().__init__(cfg, task, model, criterion, quantizer)
        if self.cuda and getattr(cfg.task, "tf32", None) is not None:
            allow_tf32(bool(cfg.task.tf32))
        self._on_first_rank(lambda: lock_run(Path(cfg.checkpoint.save_dir)))
        if lost and self.data_parallel_rank == 0:
            logger.warning(lost)
        self._teacher = self._on_first_rank(task.teacher_sha256) if hasattr(task, "teacher_sha256") else None
        self._resumed: Optional[Dict[str, Any]] = None  # extra_state, until the iterator is made
        self._batches = ""  # fingerprint of the epoch's batches
        self.preempted = False
        self._skipped_in_a_row = 0
        self._unreadable = {"train": 0, "valid": 0}  # of all ranks, in this epoch
        self._unreadable_here = 0  # of this rank, in this step
        self._not_finite = False  # whether a loss of any rank is not finite
        self._empty = False  # whether no rank could read a file in this update
        self._logged: Dict[str, Dict[str, bool]] = {}  # names that a step logs, and whether they are tensors
        if self._constraint is not None and self.data_parallel_rank == 0:
            check_reach(cfg, model.speech_encoder, criterion)
        preemption.install()

    def end(self) -> None:
        """Called at the end of the run: logs the final size, and restores signal handlers."""
        constraint = None if isinstance(self._constraint, NestedSizes) else self._constraint
        if constraint is not None and self.data_parallel_rank == 0:
            log_sparsity(self.get_model().speech_encoder, constraint.targets)
        preemption.uninstall()
        unlock_run(Path(self.cfg.checkpoint.save_dir))

    def _on_first_rank(self, act: Callable[[], Any]) -> Any:
        """Runs ``act`` on rank 0 and returns its result, or raises its error, on every rank.

        Raises:
            ValueError: ``act`` raised it, or an OSError.
        """
        found: Tuple[Any, Optional[str]] = (None, None)
        if self.data_parallel_rank == 0:
            try:
                found = (act(), None)
            except (ValueError, OSError) as error:
                found = (None, str(error))
        if self.data_parallel_world_size > 1:
            found = distributed_utils.broadcast_object(
                found, src_rank=0, group=self.data_parallel_process_group, dist_device=self.device
            )
        if found[1] is not None:
            raise ValueError(found[1])
        return found[0]

    def load_checkpoint(self, filename: str, *args: Any, **kwargs: Any) -> Optional[Dict[str, Any]]:
        """Like fairseq's, but if ``checkpoint_last.pt`` is damaged, all ranks load the newest undamaged checkpoint.

        Logs settings that have changed since it was written.
        """
        last = Path(self.cfg.checkpoint.save_dir) / f"checkpoint_last{self.checkpoint_suffix}.pt"
        if Path(filename) != last or self.checkpoint_suffix:  # every rank has its own file
            return self._load(filename, *args, **kwargs)

        def newest() -> str:
            path = newest_whole_checkpoint(last)
            if OmegaConf.is_config(self.cfg):
                cfg: Any = OmegaConf.to_container(self.cfg, resolve=True, enum_to_str=True)  # in its saved form
                warn_of_changes(path, cfg)
            return str(path)

        return self._load(self._on_first_rank(newest), *args, **kwargs)

    def _load(
        self, filename: str, reset_optimizer: bool = False, *args: Any, **kwargs: Any
    ) -> Optional[Dict[str, Any]]:
        """Like fairseq's load_checkpoint, but restores the full state of half precision."""
        try:
            with contextlib.nullcontext() if self._masters is None else self._masters.listening():
                extra_state = super().load_checkpoint(filename, reset_optimizer, *args, **kwargs)
        except ValueError as error:
            if "parameter group" not in str(error):
                raise
            raise ValueError(
                f"{filename}: its optimizer state does not fit ({error}). Up to version 0.1 of skill_fairseq every "
                "vector of gates was a separate parameter, and weights without a loss were trained. Finish the run "
                "with the version that started it, or resume with new moments: checkpoint.reset_optimizer=true"
            ) from error
        if extra_state is not None:
            if self.data_parallel_rank == 0:
                warn_of_another_teacher(filename, extra_state.get("teacher_sha256"), self._teacher, self.cfg.task)
            if self._masters is not None:
                self._masters.restore(self.optimizer)
            if not reset_optimizer:
                load_scaler_state(self.optimizer, extra_state.get("loss_scaler", {}))
            if not self.cfg.checkpoint.reset_dataloader and filename != self.cfg.checkpoint.finetune_from_model:
                self._resumed = extra_state
        return self._unless_finished(extra_state)

    def _build_optimizer(self) -> None:
        """Like fairseq's, but float32 weights are those before the cast."""
        super()._build_optimizer()
        load_moments_exactly(self._optimizer)
        if self._masters is not None:
            self._masters.restore(self._optimizer)

    def state_dict(self) -> Dict[str, Any]:
        """Like fairseq's, but with float32 weights if the model is in half precision."""
        state: Dict[str, Any] = super().state_dict()
        if self._masters is not None:
            self._masters.fill(state, self.optimizer)
        state["extra_state"]["loss_scaler"] = scaler_state(self.optimizer)
        return state

    def get_train_iterator(self, epoch: int, *args: Any, **kwargs: Any) -> Any:
        """Like fairseq's, but for the next epoch if the run cannot resume in the checkpoint's epoch."""
        iterator = super().get_train_iterator(epoch, *args, **kwargs)
        resumed, self._resumed = self._resumed, None
        if resumed is not None and skips_to_next_epoch(resumed, iterator):
            iterator = super().get_train_iterator(epoch + 1, *args, **kwargs)
        self._batches = fingerprint(iterator)
        return iterator

    def _set_seed(self) -> None:
        """Also seeds numpy: layer drop and mask spans depend only on seed and update, like dropout."""
        super()._set_seed()
        np.random.seed((self.cfg.common.seed + self.get_num_updates()) % 2**32)

    def _unless_finished(self, extra_state: Optional[Dict[str, Any]]) -> Optional[Dict[str, Any]]:
        """Prevents one update too many, because fairseq checks max_update only after an update."""
        most = self.cfg.optimization.max_update
        if most and self.get_num_updates() >= most:
            logger.info(f"nothing to do: {self.get_num_updates()} of optimization.max_update={most} updates done")
            self.cfg.optimization.stop_min_lr = float("inf")  # the only condition that fairseq checks before
        return extra_state

    def save_checkpoint(self, filename: str, extra_state: Dict[str, Any]) -> None:
        """Like fairseq's, with errors that explain the cause.

        Raises:
            CheckpointNotWritten: the disk is full, for example.
        """
        with writing(filename):
            super().save_checkpoint(filename, {**extra_state, BATCHES: self._batches, "teacher_sha256": self._teacher})

    def begin_epoch(self, epoch: int) -> None:
        """Like fairseq's; resets the counts."""
        self._unreadable["train"] = 0
        super().begin_epoch(epoch)
        self._impose()

    def begin_valid_epoch(self, epoch: int) -> None:
        """Like fairseq's; resets the counts."""
        self._unreadable["valid"] = 0
        super().begin_valid_epoch(epoch)

    @metrics.aggregate("train")
    def train_step(self, samples: List[Dict[str, Any]], raise_oom: bool = False) -> Optional[Dict[str, Any]]:
        """Like fairseq's; also returns None for a skipped update.

        Raises:
            FloatingPointError: too many consecutive updates were skipped.
        """
        self._not_finite = False
        self.task.losses = []
        self.task.frames_of_weight_1 = None
        samples = [self._readable(sample) for sample in samples]
        self._empty = not any(samples)
        self._ranges.forget()
        samples = [sample for sample in samples if sample] or samples[:1]
        try:
            # The undecorated method, because fairseq's aggregator does not survive an exception.
            output = Trainer.train_step.__wrapped__(self, samples, raise_oom)  # type: ignore[attr-defined]
        except UpdateSkipped as reason:
            self.zero_grad()
            if getattr(self.optimizer, "scaler", self) is None and hasattr(self.optimizer, "_multiply_factor"):
                self.optimizer._multiply_factor = 1.0  # in bf16, fairseq's zero_grad keeps that of the skipped update
            self._skipped_in_a_row += 1
            update = self.get_num_updates() + 1
            self._check_weights(update, reason)
            logger.warning(f"update {update} is skipped: {reason}; {self._files(samples)}")
            if self._skipped_in_a_row > self._limit("max_skipped_updates"):
                raise FloatingPointError(
                    f"{self._skipped_in_a_row} updates in a row were skipped, the last because {reason}; "
                    f"task.max_skipped_updates allows {self._limit('max_skipped_updates')}. Check the files that the "
                    "log names, lower the learning rate, or train in bf16 or fp32"
                ) from None
            return None
        if output is not None:
            self._skipped_in_a_row = 0
            self._ranges.follow(self.get_num_updates() - 1, self.data_parallel_process_group)
        self._impose()
        return output

    def _impose(self) -> None:
        """Applies the constraint to the gates for the next update, and thus for checkpoints and validation."""
        if self._constraint is not None:
            encoder = self.get_model().speech_encoder
            self._constraint.impose(encoder, self.get_num_updates())
            if self._masters is not None:
                self._masters.follow(self.optimizer, encoder.gates.log_alpha)

    def _check_weights(self, update: int, reason: UpdateSkipped) -> None:
        """Raises FloatingPointError if weights are the cause, not an audio file: all further updates would fail."""
        teachers = [("teacher", teacher.encoder) for teacher in getattr(self.task, "_teachers", None) or ()]
        for whose, module in (("student", self.get_model()), ("criterion", self.get_criterion()), *teachers):
            for name, weight in module.named_parameters():
                if not torch.isfinite(weight).all():
                    raise FloatingPointError(
                        f"update {update}: {reason}, as the weight {name} of the {whose} is NaN or infinite; no audio "
                        "file is the cause. Resume from an older checkpoint, or start from an intact model file"
                    ) from None

    def clip_grad_norm(self, clip_norm: float) -> Any:
        """Like fairseq's, called after the gradients of all ranks were summed.

        Raises:
            UpdateSkipped: the gradients are not usable, and the task tolerates that.
        """
        if self.data_parallel_world_size == 1:
            not_finite = float(to_host(self._loss_here_not_finite(), "losses"))
            self._agree(self._unreadable_here, preemption.received is not None, not_finite)
        if self._empty:
            raise UpdateSkipped("none of its files could be read")
        tolerant = self._limit("max_skipped_updates") > 0
        if tolerant and self._not_finite:
            raise UpdateSkipped("a loss is NaN or infinite")
        norm = super().clip_grad_norm(clip_norm)
        scaled = self.cfg.common.fp16 or self.cfg.common.amp  # there the loss scale handles it
        if tolerant and not scaled and not to_host(torch.isfinite(torch.as_tensor(norm)).all(), "norm"):
            raise UpdateSkipped("gradients are NaN or infinite, though the losses are not")
        return norm

    def valid_step(self, sample: Dict[str, Any], raise_oom: bool = False) -> Any:
        """Like fairseq's."""
        output = super().valid_step(self._readable(sample), raise_oom)
        if self.data_parallel_world_size == 1:
            self._agree(self._unreadable_here, preemption.received is not None, False)
        return output

    def _aggregate_logging_outputs(
        self, logging_outputs: List[Dict[str, Any]], *extra_stats_to_sum: Any, ignore: bool = False
    ) -> Tuple[List[Dict[str, Any]], List[Any]]:
        """Like fairseq's sum over ranks, with four more numbers."""
        split = "train" if self.model.training else "valid"
        mine = (
            self._unreadable_here,
            int(preemption.received is not None),
            self._loss_here_not_finite() if split == "train" else 0,
            int(not self._empty),
        )
        if logging_outputs:
            self._logged[split] = {name: torch.is_tensor(value) for name, value in logging_outputs[0].items()}
        elif split in self._logged:  # out of memory: all ranks must sum tensors of the same shape
            zero = torch.zeros((), dtype=torch.float64, device=self.device)
            logging_outputs = [{name: zero if tensor else 0 for name, tensor in self._logged[split].items()}]
            ignore = True
        outputs, sums = super()._aggregate_logging_outputs(logging_outputs, *extra_stats_to_sum, *mine, ignore=ignore)
        theirs, ours = sums[: -len(mine)], sums[-len(mine) :]
        stacked = torch.stack([torch.as_tensor(s, device=self.device) for s in ours])
        unreadable, preempted, not_finite, readable = to_host(stacked, "losses").tolist()
        self._empty = readable == 0
        self._agree(unreadable, preempted, not_finite)
        return outputs, theirs

    def _reduce_and_log_stats(
        self, logging_outputs: List[Dict[str, Any]], sample_size: Any, grad_norm: Any = None
    ) -> Any:
        """Like fairseq's, but fetches all numbers from the device at once."""
        *outputs, own = numbers([*logging_outputs, {"size": sample_size, "norm": grad_norm}], "statistics")
        norm = None if own["norm"] is None else torch.tensor(own["norm"])  # fairseq expects a tensor
        return super()._reduce_and_log_stats(outputs, own["size"], norm)

    def _agree(self, unreadable: float, preempted: float, not_finite: float) -> None:
        """Applies the events of all ranks, in the same step on every rank."""
        split = "train" if self.model.training else "valid"
        self._unreadable_here = 0
        self._unreadable[split] += int(unreadable)
        self.preempted = self.preempted or preempted > 0
        self._not_finite = not_finite > 0
        most = self._limit("max_unreadable_files")
        if self._unreadable[split] > most:
            raise ValueError(
                f"{self._unreadable[split]} {split} files of this epoch could not be read; task.max_unreadable_files "
                f"allows {most}. The log names them: repair them, remove them from the manifest, or raise the limit"
            )

    def _readable(self, sample: Any) -> Any:
        """Removes the messages on unreadable files from the batch, and logs and counts them."""
        if not isinstance(sample, dict) or "unreadable" not in sample:
            return sample
        for message in sample["unreadable"]:
            logger.warning(f"file skipped: {printable(message)}")
        self._unreadable_here += len(sample["unreadable"])
        return _without_messages(sample)

    def _prepare_sample(self, sample: Any, is_dummy: bool = False) -> Any:
        """Like fairseq's, but any batch can be the dummy batch if the epoch's first cannot."""
        if self._dummy_batch is None and sample:
            self._dummy_batch = sample
        return super()._prepare_sample(sample, is_dummy)

    def reset_dummy_batch(self, batch: Any) -> None:
        """Like fairseq's, but a batch without readable files cannot be the dummy batch."""
        if isinstance(batch, dict):
            batch = _without_messages(batch)
        super().reset_dummy_batch(batch or self._dummy_batch)

    def _log_oom(self, exc: BaseException) -> None:
        super()._log_oom(exc)
        if self.model.training:
            name, where = "max_tokens", ""
            more = "; with optimization.update_freq=[2], two batches of half the size give the same update"
        else:
            name, where, more = "max_tokens_valid", " in validation", ""
        most = self.cfg.dataset[name]
        if most:
            logger.warning(
                f"out of memory{where}: lower dataset.{name}, now {most}, for example to {int(most * 0.8)}{more}"
            )

    def _loss_here_not_finite(self) -> Tensor:
        """Whether a loss of this rank in this update is not finite: 0 or 1, float64, on the losses' device."""
        losses = [loss for loss, _ in getattr(self.task, "losses", [])]
        bad = ~torch.isfinite(torch.stack(losses)).all() if losses else torch.zeros((), device=self.device)
        return bad.double()

    def _files(self, samples: Sequence[Dict[str, Any]]) -> str:
        losses = getattr(self.task, "losses", [])
        bad = [name for loss, files in losses if not math.isfinite(loss) for name in files]
        if bad:
            return f"files of the batch: {', '.join(bad)}"
        if self._not_finite:
            return "another rank names the files"
        names = [name for sample in samples for name in (sample or {}).get("files", [])]
        return f"files of this rank: {', '.join(names)}"

    def _limit(self, name: str) -> int:
        return int(getattr(self.cfg.task, name, None) or 0)
