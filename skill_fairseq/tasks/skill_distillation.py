"""The distillation task: speech without labels, and the teacher's answer to it."""

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
        whole = cfg._get_parent()  # fairseq reads task.data there too, and saves it; this is a copy of its task
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
        self.maskings: List[SpanMasking] = []  # of all objectives
        self.losses: List[Tuple[Tensor, List[str]]] = []  # of the present update, with the files of each batch
        self.frames_of_weight_1: Optional[float] = None  # in the present update
        self._constraint: Optional[Constraint] = None
        self._model: Any = None
        self._ranges: Optional[Ranges] = None
        self._training_data: Optional[SpeechDataset] = None

    @property
    def teachers(self) -> List[FrozenTeacher]:
        """The teachers, loaded when first asked for: a checkpoint loads without them.

        Raises:
            ValueError, FileNotFoundError: no teacher is given, or one is not usable.
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
        """Hash of each teacher's file or folder, by which a run that goes on knows them again; None without one."""
        return ", ".join(content_sha256(file) for file in several(self.cfg.teacher)) or None

    def check_mask_embedding(self, index: int, field: str) -> None:
        """Refuses a teacher that cannot be heard with masked frames.

        Args:
            index: which of the teachers, from 0.
            field: the objective that wants it, for the message.

        Raises:
            ValueError: its file holds no mask embedding; names it and the remedy.
        """
        if self.teachers[index].encoder.mask_embedding is None:
            raise ValueError(
                f"task.teacher: {several(self.cfg.teacher)[index]} holds no mask embedding, but {field} asks what the "
                "teacher makes of masked frames; give a pre-trained checkpoint that holds one (fairseq's mask_emb, "
                "transformers' masked_spec_embed), or let that teacher hear everything: with the objective layers by "
                f"{field}.unmasked_frames=whole"
            )

    def check_made_with(self, index: int, made: Sequence[Tuple[str, str, str]], field: str) -> None:
        """Refuses a teacher for which what an objective has read was not made.

        Args:
            index: which of the teachers, from 0.
            made: files, and the name and SHA-256 of the teacher that each was made with.
            field: the objective that has read them, for the message.

        Raises:
            ValueError: the teacher's file is another one; names both and the remedy.
        """
        teacher = several(self.cfg.teacher)[index]
        found = content_sha256(teacher)
        for file, name, wanted in made:
            if wanted != found:
                raise ValueError(
                    f"{field}: {file} was made with {name} of SHA-256 {wanted}, but task.teacher is {teacher} of "
                    f"{found}; give that teacher, or make the file again with this one (skill-labels --teacher)"
                )

    def _check_waveforms(self, encoder: SpeechEncoder, what: str) -> None:
        """Refuses an encoder that expects other waveforms than the task gives it."""
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
                f"{least}; null crops to the shortest utterance of a batch alone"
            )

    def load_dataset(self, split: str, task_cfg: Any = None, **kwargs: Any) -> None:
        """Reads ``<data>/<split>.tsv``. Validation hears the same every time: its loss is comparable between epochs.

        Raises:
            FileNotFoundError, ValueError: the manifest cannot be used, or a field of the task; names the field.
        """
        check_task_fields(self.cfg)
        cropped = [name for name, target in self.targets.items() if target.is_sequence and not self.cfg.enable_padding]
        if cropped:
            raise ValueError(
                f"task.targets.{cropped[0]}: the units of whole utterances, but task.enable_padding=false crops those "
                "of a batch to the shortest; set task.enable_padding=true"
            )
        train = split == "train" or "data_selector" in kwargs  # which fairseq gives only with dataset.train_subset
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
        """fairseq's, with as many training batches on every rank, none of them empty.

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
        """Builds the student; in training its shape and weights come from :func:`initial_student`.

        The shape and every default are written into ``cfg``, which fairseq saves: a checkpoint's config alone
        rebuilds the model.
        """
        encoder = None
        self.nested = bool(getattr(cfg, "nested", False))
        if not from_checkpoint:
            check_task_fields(self.cfg)
            check_student_fields(cfg)
        if not from_checkpoint and getattr(cfg, "init_from", None):
            update_fields(cfg, {"init_from": from_shell(several(cfg.init_from)[0])})  # of ${task.teacher} the first
            encoder = initial_student(cfg)
            self._check_waveforms(encoder, f"model.init_from={cfg.init_from}")
            update_fields(cfg, fairseq_fields(encoder.config))
        for name in ("normalize", "sample_rate"):  # a student without a file, or one saved before it held the rate
            if getattr(cfg, name, None) is None:
                update_fields(cfg, {name: self.cfg[name]})
        model = super().build_model(cfg, from_checkpoint)
        if encoder is not None:
            # Gates keep the start that the model's config gave them, unless they hold an order.
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
        """fairseq's; what objectives choose (groups of a file, null until the teacher is known) is written into
        ``cfg``, which fairseq saves."""
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
            if criterion.cfg.target is not None:  # with the latency table itself where a file was named
                update_fields(cfg, {"target": plain(criterion.cfg.target)})
            if criterion.cfg.elastic is not None:  # which the sparsity of the largest size follows from
                update_fields(cfg, {"target_sparsity": criterion.cfg.target_sparsity})
            self.maskings = criterion.maskings
            if self._model is not None:
                self._model.train_for(criterion.student_taps)
        self._group_parameters(criterion)
        return criterion

    def _group_parameters(self, criterion: Any) -> None:
        """Gives parameters their groups of the optimizer, heads and adapters before biases; gates have theirs."""
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

    def begin_valid_epoch(self, epoch: int, model: Any) -> None:
        """Makes sure that gates and multipliers are still equal on all ranks.

        Raises:
            RuntimeError: they are not; names the rank, the quantity and the values.
        """
        super().begin_valid_epoch(epoch, model)
        check_ranks(model.speech_encoder, self._constraint)

    def batch_weight(self, frames: int) -> float:
        """The weight of a training batch among those of an update: in proportion to its frames, so that any way of
        dividing audio over batches and ranks gives the gradients of one large batch.

        What counts as 1 is the same for all of an update, and otherwise free. It keeps weights near 1, for half
        precision: with one process the update's first batch (one batch an update has the weight 1), with several the
        mean batch of the epoch, which all know (batches of one size have the weight 1).
        """
        if self.frames_of_weight_1 is None:
            several = torch.distributed.is_available() and torch.distributed.is_initialized()
            self.frames_of_weight_1 = frames
            if several and torch.distributed.get_world_size() > 1:
                assert self._training_data is not None and self.student_config is not None
                data = self._training_data
                if data.mean_frames is None:  # once an epoch
                    data.mean_frames = float(self.student_config.num_output_frames(data.heard).sum()) / data.num_batches
                self.frames_of_weight_1 = data.mean_frames
        return frames / self.frames_of_weight_1

    def train_step(
        self, sample: Any, model: Any, criterion: Any, optimizer: Any, update_num: int, ignore_grad: bool = False
    ) -> Any:
        """fairseq's, remembering the update for the sparsity target, and each loss with its files."""
        self.num_updates = update_num
        if self._ranges is not None:
            self._ranges.watch(False if ignore_grad else None)
        loss, sample_size, log = super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad)
        if not ignore_grad:
            self.losses.append((log["loss"], sample["files"]))
        return loss, sample_size, log
