"""The distillation task: reads speech and holds the frozen teachers."""

import logging
import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from fairseq.tasks import register_task
from fairseq.tasks.audio_pretraining import AudioPretrainingTask
from omegaconf import OmegaConf
from torch import Tensor

from skill_fairseq.checkpoints import load_encoder
from skill_fairseq.checkpoints.safe_load import plain
from skill_fairseq.criterions.distillation import DistillationCriterion
from skill_fairseq.files import content_sha256, named
from skill_fairseq.labels.targets import Target, read_targets, settings
from skill_fairseq.models.student_fields import check_student_fields
from skill_fairseq.models.student_init import initial_student
from skill_fairseq.models.wavlm import fairseq_fields
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.fake_quantize import Ranges
from skill_fairseq.modules.taps import SpanMasking
from skill_fairseq.objectives.teacher import FrozenTeacher, check_alike
from skill_fairseq.pruning.agreement import check_ranks
from skill_fairseq.pruning.targets import Constraint
from skill_fairseq.tasks.fields import (
    SkillDistillationConfig,
    check_task_fields,
    check_teachers,
    several,
    update_fields,
)
from skill_fairseq.tasks.speech_dataset import SpeechDataset
from skill_fairseq.training.paths import from_shell

logger = logging.getLogger(__name__)


@register_task("skill_distillation", dataclass=SkillDistillationConfig)
class SkillDistillationTask(AudioPretrainingTask):
    """Distils a teacher into a student, in both stages.

    Args:
        cfg: task config.
    """

    cfg: SkillDistillationConfig

    def __init__(self, cfg: SkillDistillationConfig) -> None:
        super().__init__(cfg)
        whole = cfg._get_parent()  # fairseq also reads and saves task.data there; cfg is a copy
        check_teachers(cfg.teacher)
        for name in ("data", "teacher"):
            if cfg.get(name):
                cfg[name] = from_shell(cfg[name])
                if whole is not None and "task" in whole:
                    whole.task[name] = cfg[name]
        self.targets: Dict[str, Target] = {}
        if cfg.targets:
            train = whole.dataset.train_subset if whole is not None and "dataset" in whole else "train"
            self.targets = read_targets(plain(cfg.targets), Path(cfg.data) / f"{train}.tsv")
            for config in (cfg, *((whole.task,) if whole is not None and "task" in whole else ())):
                update_fields(config, {"targets": settings(self.targets)})
        self._teachers: Optional[List[FrozenTeacher]] = None
        self.student_config: Optional[EncoderConfig] = None
        self.nested = False  # whether the student's gates only hold an order
        self.num_updates = 0
        self.epoch = 1
        self.maskings: List[SpanMasking] = []  # of all objectives
        self.losses: List[Tuple[Tensor, List[str]]] = []  # of the current update, with the files of each batch
        self.frames_of_weight_1: Optional[float] = None  # in the current update
        self._constraint: Optional[Constraint] = None
        self._model: Any = None
        self._ranges: Optional[Ranges] = None
        self._training_data: Optional[SpeechDataset] = None

    @property
    def teachers(self) -> List[FrozenTeacher]:
        """The teachers, loaded on first use, so that checkpoints load without them.

        Raises:
            ValueError, FileNotFoundError: there is no teacher, or one is not usable.
        """
        if self._teachers is None:
            files, encoders = several(self.cfg.teacher), []
            if not files:
                raise ValueError("task.teacher: not set; expected a teacher file or folder, for example WavLM-Base+.pt")
            for file in files:
                with named("task.teacher"):
                    encoders.append(load_encoder(file))
            check_alike([encoder.config for encoder in encoders], files)
            self._check_waveforms(encoders[0], f"the teacher {files[0]}")
            dtype = str(getattr(self.cfg.teacher_dtype, "name", self.cfg.teacher_dtype))
            self._teachers = [FrozenTeacher(encoder, dtype, self.cfg.teacher_compile) for encoder in encoders]
        return self._teachers

    def teacher_sha256(self) -> Optional[str]:
        """Hash of each teacher's file or folder, with which a resumed run recognises them; None without a teacher."""
        return ", ".join(content_sha256(file) for file in several(self.cfg.teacher)) or None

    def check_mask_embedding(self, index: int, field: str) -> None:
        """Refuses a teacher that cannot run with masked frames.

        Args:
            index: the teacher's number, from 0.
            field: the objective that needs it, for the message.

        Raises:
            ValueError: its file has no mask embedding; names it and the remedy.
        """
        if self.teachers[index].encoder.mask_embedding is None:
            raise ValueError(
                f"task.teacher: {several(self.cfg.teacher)[index]} has no mask embedding, but {field} runs the teacher "
                "on masked frames; give a pre-trained checkpoint that has one (fairseq's mask_emb, transformers' "
                "masked_spec_embed), or run that teacher on whole utterances: with the objective layers, set "
                f"{field}.unmasked_frames=whole"
            )

    def check_made_with(self, index: int, made: Sequence[Tuple[str, str, str]], field: str) -> None:
        """Refuses a teacher if an objective's files were made with another one.

        Args:
            index: the teacher's number, from 0.
            made: files, with the name and SHA-256 of the teacher that each was made with.
            field: the objective that read them, for the message.

        Raises:
            ValueError: the teacher's file differs; names both and the remedy.
        """
        teacher = several(self.cfg.teacher)[index]
        found = content_sha256(teacher)
        for file, name, wanted in made:
            if wanted != found:
                raise ValueError(
                    f"{field}: {file} was made with {name} of SHA-256 {wanted}, but task.teacher is {teacher} of "
                    f"{found}; use that teacher, or make the file again with this one (skill-labels --teacher)"
                )

    def _check_waveforms(self, encoder: SpeechEncoder, what: str) -> None:
        """Refuses an encoder that expects other waveforms than the task provides."""
        for name in ("normalize", "sample_rate"):
            wanted, found = getattr(encoder.config, name), self.cfg[name]
            if wanted != found:
                raise ValueError(
                    f"task.{name}: {found}, but {what} was trained with {wanted}; set task.{name}={str(wanted).lower()}"
                    + (", and give audio of that rate" if name == "sample_rate" else "")
                )

    def _check_lengths(self, student: EncoderConfig) -> None:
        least = student.receptive_field
        if self.cfg.max_sample_size is not None and self.cfg.max_sample_size < least:
            raise ValueError(
                f"task.max_sample_size: {self.cfg.max_sample_size} samples; the student's convolutions need at least "
                f"{least}; null crops only to the shortest utterance of a batch"
            )

    def load_dataset(self, split: str, task_cfg: Any = None, **kwargs: Any) -> None:
        """Reads ``<data>/<split>.tsv``. Validation uses the same audio every time, so its loss is comparable between
        epochs.

        Raises:
            FileNotFoundError, ValueError: the manifest or a field of the task cannot be used; names it.
        """
        check_task_fields(self.cfg)
        cropped = [name for name, target in self.targets.items() if target.is_sequence and not self.cfg.enable_padding]
        if cropped:
            raise ValueError(
                f"task.targets.{cropped[0]}: units need whole utterances, but task.enable_padding=false crops "
                "batches to their shortest; set task.enable_padding=true"
            )
        train = split == "train" or "data_selector" in kwargs  # fairseq passes it only with dataset.train_subset
        with named("dataset.train_subset" if train else "dataset.valid_subset"):
            self.datasets[split] = SpeechDataset(
                os.path.join(self.cfg.data, f"{split}.tsv"),
                crop_multiple=self.cfg.crop_multiple if train else 1,
                check_all_files=self.cfg.check_all_files,
                sample_rate=self.cfg.sample_rate,
                max_sample_size=self.cfg.max_sample_size if train else None,
                min_sample_size=self.cfg.min_sample_size if train else 0,
                most_samples=None if train else self.cfg.max_valid_sample_size,
                num_buckets=self.cfg.num_batch_buckets if train else 0,
                shuffle=train,
                pad=not train or self.cfg.enable_padding,
                normalize=self.cfg.normalize,
                targets=list(self.targets.values()),
            )

    def get_batch_iterator(self, dataset: Any, *args: Any, num_shards: int = 1, **kwargs: Any) -> Any:
        """Like fairseq's, but every rank gets equally many training batches, none of them empty.

        Raises:
            ValueError: there are too few utterances for the number of ranks.
        """
        if isinstance(dataset, SpeechDataset):
            dataset.num_shards = num_shards
            dataset.masking = self.maskings, self.student_config
            if not dataset.pad:
                self._training_data = dataset
        return super().get_batch_iterator(dataset, *args, num_shards=num_shards, **kwargs)

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        """Builds the student; in training, :func:`initial_student` gives its shape and weights.

        Writes the shape and every default into ``cfg``, which fairseq saves, so a checkpoint's config is enough to
        rebuild the model.
        """
        encoder = None
        self.nested = bool(getattr(cfg, "nested", False))
        if not from_checkpoint:
            check_task_fields(self.cfg)
            check_student_fields(cfg)
        if not from_checkpoint and getattr(cfg, "init_from", None):
            update_fields(cfg, {"init_from": from_shell(several(cfg.init_from)[0])})  # the first of ${task.teacher}
            encoder = initial_student(cfg)
            self._check_waveforms(encoder, f"model.init_from={cfg.init_from}")
            update_fields(cfg, fairseq_fields(encoder.config))
        for name in ("normalize", "sample_rate"):  # no file, or one from before the rate was saved
            if getattr(cfg, name, None) is None:
                update_fields(cfg, {name: self.cfg[name]})
        model = super().build_model(cfg, from_checkpoint)
        if encoder is not None:
            # Gates keep the config's initial values, unless they hold an order.
            state = {k: v for k, v in encoder.state_dict().items() if self.nested or not k.startswith("gates.")}
            model.speech_encoder.load_state_dict(state, strict=False)
            if encoder.mask_embedding is not None:
                model.mask_emb.data.copy_(encoder.mask_embedding)
        self.student_config = model.speech_encoder.config
        self._check_lengths(model.speech_encoder.config)
        if not from_checkpoint:
            update_fields(cfg, dict(OmegaConf.to_container(model.cfg, resolve=True, enum_to_str=True)))  # type: ignore
            update_fields(cfg, fairseq_fields(self.student_config))
        self._model, self._ranges = model, Ranges(model)
        return model

    def build_criterion(self, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        """Like fairseq's; writes the fields that objectives fill in (groups of a file, values that depend on the
        teacher) into ``cfg``, which fairseq saves."""
        objectives: Any = getattr(cfg, "objectives", None)
        for part in [cfg, *(objectives.values() if OmegaConf.is_dict(objectives) else ())]:
            for name in ("groups_file", "init_from", "codebooks"):
                if getattr(part, name, None):
                    update_fields(part, {name: from_shell(part[name])})
        target: Any = getattr(cfg, "target", None)
        if OmegaConf.is_dict(target) and "table" in target and isinstance(target["table"], str):
            update_fields(target, {"table": from_shell(target["table"])})
        criterion = super().build_criterion(cfg, *args, **kwargs)
        self._constraint = getattr(criterion, "constraint", None)
        if isinstance(criterion, DistillationCriterion):
            update_fields(cfg, criterion.chosen())
            if criterion.cfg.target is not None:  # with the latency table itself if a file was named
                update_fields(cfg, {"target": plain(criterion.cfg.target)})
            if criterion.cfg.elastic is not None:  # it determines the sparsity of the largest size
                update_fields(cfg, {"target_sparsity": criterion.cfg.target_sparsity})
            self.maskings = criterion.maskings
            if self._model is not None:
                self._model.train_for(criterion.student_taps)
        self._group_parameters(criterion)
        return criterion

    def _group_parameters(self, criterion: Any) -> None:
        """Assigns parameters to optimizer groups, heads and adapters before biases; gates have their own."""
        for module, part, whole in (
            (criterion, "heads", self.cfg.separate_heads),
            (self._model, "adapters", self.cfg.separate_adapters),
        ):
            for name, parameter in module.named_parameters() if module is not None else ():
                if hasattr(parameter, "param_group"):
                    continue
                if whole and (part == "heads" or ".adapter." in name):
                    parameter.param_group = part
                elif self.cfg.separate_biases and "bias" in name.rpartition(".")[2]:
                    parameter.param_group = "biases"

    def begin_epoch(self, epoch: int, model: Any) -> None:
        """Remembers the epoch, counted from 1, for weights that change with it."""
        super().begin_epoch(epoch, model)
        self.epoch = epoch

    def begin_valid_epoch(self, epoch: int, model: Any) -> None:
        """Checks that gates and multipliers are still equal on all ranks.

        Raises:
            RuntimeError: they are not; names the rank, the quantity and the values.
        """
        super().begin_valid_epoch(epoch, model)
        check_ranks(model.speech_encoder, self._constraint)

    def batch_weight(self, frames: int) -> float:
        """The weight of a training batch within its update. It is proportional to the batch's frames, so any division
        of the audio over batches and ranks gives the gradients of one large batch.

        The unit is arbitrary but constant within an update. It keeps weights near 1, for half precision: one process
        uses the update's first batch (a single batch per update has weight 1), several use the epoch's mean batch,
        which all ranks know (batches of equal size have weight 1).
        """
        if self.frames_of_weight_1 is None:
            several = torch.distributed.is_available() and torch.distributed.is_initialized()
            self.frames_of_weight_1 = frames
            if several and torch.distributed.get_world_size() > 1:
                assert self._training_data is not None and self.student_config is not None
                data = self._training_data
                if data.mean_frames is None:  # once per epoch
                    data.mean_frames = float(self.student_config.num_output_frames(data.heard).sum()) / data.num_batches
                self.frames_of_weight_1 = data.mean_frames
        return frames / self.frames_of_weight_1

    def train_step(
        self, sample: Any, model: Any, criterion: Any, optimizer: Any, update_num: int, ignore_grad: bool = False
    ) -> Any:
        """Like fairseq's; also records the update for the sparsity target, and each loss with its files."""
        self.num_updates = update_num
        if self._ranges is not None:
            self._ranges.watch(False if ignore_grad else None)
        loss, sample_size, log = super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad)
        if not ignore_grad:
            self.losses.append((log["loss"], sample["files"]))
        return loss, sample_size, log
