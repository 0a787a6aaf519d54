"""The distillation task: speech without labels, and the teacher's answer to it."""

import logging
import os
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple

import torch
from fairseq.dataclass import ChoiceEnum
from fairseq.tasks import register_task
from fairseq.tasks.audio_pretraining import AudioPretrainingConfig, AudioPretrainingTask
from omegaconf import OmegaConf, open_dict
from torch import Tensor

from skill_fairseq.checkpoints import load_encoder
from skill_fairseq.checkpoints.safe_load import plain
from skill_fairseq.criterions.skill_group_kd import read_groups
from skill_fairseq.distillation.teacher import FrozenTeacher
from skill_fairseq.files import content_sha256, named
from skill_fairseq.models.skill_student import initial_student
from skill_fairseq.models.wavlm import fairseq_fields
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.pruning.agreement import check_ranks
from skill_fairseq.pruning.lagrangian import SizeConstraint
from skill_fairseq.tasks.speech_dataset import SpeechDataset

logger = logging.getLogger(__name__)


@dataclass
class SkillDistillationConfig(AudioPretrainingConfig):
    """fairseq's audio task and what distillation adds."""

    teacher: Optional[str] = field(
        default=None, metadata={"help": "teacher file or folder, of any kind that skill_fairseq.load_encoder knows"}
    )
    teacher_dtype: ChoiceEnum(["fp32", "bf16", "fp16"]) = field(  # type: ignore[valid-type]
        default="fp32", metadata={"help": "precision that the teacher runs in, whatever the student's"}
    )
    teacher_compile: bool = field(
        default=False, metadata={"help": "run the teacher's layers through torch.compile (minutes at the start)"}
    )
    max_valid_sample_size: Optional[int] = field(
        default=960000,
        metadata={
            "help": "validation hears so many samples of a recording, from its beginning (960000: 60 s at 16 kHz); the "
            "log names longer ones; null: all of every recording"
        },
    )
    tf32: bool = field(
        default=True,
        metadata={
            "help": "float32 matrix products in TF32 (11 bits) on GPUs from Ampere on, as torch does convolutions; the "
            "first convolution, gates, sizes and losses stay float32; no effect on CPUs, in bf16 or fp16"
        },
    )
    crop_multiple: int = field(
        default=1,
        metadata={"help": "crop training batches to a multiple of so many samples: fewer shapes, fewer kernels"},
    )
    check_all_files: bool = field(
        default=False,
        metadata={"help": "look for every file of the manifests before training; false: for 1,000 of each"},
    )
    max_unreadable_files: int = field(
        default=100,
        metadata={"help": "files of an epoch that may turn out unreadable: they are skipped; one more ends the run"},
    )
    max_skipped_updates: int = field(
        default=10,
        metadata={"help": "updates in a row that may be skipped for a loss or gradients that are NaN or infinite"},
    )


@register_task("skill_distillation", dataclass=SkillDistillationConfig)
class SkillDistillationTask(AudioPretrainingTask):
    """Distils a teacher into a student, in both stages.

    Args:
        cfg: task config.
    """

    cfg: SkillDistillationConfig

    def __init__(self, cfg: SkillDistillationConfig) -> None:
        super().__init__(cfg)
        self._teacher: Optional[FrozenTeacher] = None
        self.student_config: Optional[EncoderConfig] = None
        self.num_updates = 0
        self.losses: List[Tuple[Tensor, List[str]]] = []  # of the present update, with the files of each batch
        self.frames_of_weight_1: Optional[float] = None  # in the present update
        self._constraint: Optional[SizeConstraint] = None
        self._model: Any = None
        self._training_data: Optional[SpeechDataset] = None

    @property
    def teacher(self) -> FrozenTeacher:
        """The teacher, loaded when first asked for: a checkpoint loads without it.

        Raises:
            ValueError, FileNotFoundError: no teacher is given, or it is not usable.
        """
        if self._teacher is None:
            if not self.cfg.teacher:
                raise ValueError("task.teacher: not set; expected a teacher file or folder, for example WavLM-Base+.pt")
            with named("task.teacher"):
                encoder = load_encoder(self.cfg.teacher)
            if encoder.normalize != self.cfg.normalize:
                raise ValueError(
                    f"task.normalize: {self.cfg.normalize}, but the teacher {self.cfg.teacher} was trained with "
                    f"{encoder.normalize}; set task.normalize={str(encoder.normalize).lower()}"
                )
            dtype = str(getattr(self.cfg.teacher_dtype, "name", self.cfg.teacher_dtype))
            self._teacher = FrozenTeacher(encoder, dtype, self.cfg.teacher_compile)
        return self._teacher

    def teacher_sha256(self) -> str:
        """Hash of the teacher's file or folder, by which a run that goes on knows it again."""
        return content_sha256(self.cfg.teacher or "")

    def load_dataset(self, split: str, task_cfg: Any = None, **kwargs: Any) -> None:
        """Reads ``<data>/<split>.tsv``. Validation hears the same every time: its loss is comparable between epochs.

        Raises:
            ValueError: ``task.max_valid_sample_size`` is not positive.
        """
        if self.cfg.max_valid_sample_size is not None and self.cfg.max_valid_sample_size < 1:
            raise ValueError(
                f"task.max_valid_sample_size: {self.cfg.max_valid_sample_size}; expected a positive number of samples, "
                "or null for no limit"
            )
        train = split == "train"
        self.datasets[split] = SpeechDataset(
            os.path.join(self.cfg.data, f"{split}.tsv"),
            crop_multiple=self.cfg.crop_multiple if train else 1,
            check_all_files=self.cfg.check_all_files,
            sample_rate=self.cfg.sample_rate,
            max_sample_size=self.cfg.max_sample_size if train else None,
            min_sample_size=self.cfg.min_sample_size if train else 0,
            most_samples=None if train else self.cfg.max_valid_sample_size,
            shuffle=train,
            pad=not train,
            normalize=self.cfg.normalize,
        )

    def get_batch_iterator(self, dataset: Any, *args: Any, num_shards: int = 1, **kwargs: Any) -> Any:
        """fairseq's, with as many training batches on every rank, none of them empty.

        Raises:
            ValueError: there are too few utterances for the number of ranks.
        """
        if isinstance(dataset, SpeechDataset):
            dataset.num_shards = num_shards
            if not dataset.pad:
                self._training_data = dataset
        return super().get_batch_iterator(dataset, *args, num_shards=num_shards, **kwargs)

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        """Builds the student; in training its shape and weights come from ``model.init_from``.

        The shape and every default are written into ``cfg``, which fairseq saves: a checkpoint's config alone
        rebuilds the model.
        """
        encoder = None
        if not from_checkpoint and getattr(cfg, "init_from", None):
            with named("model.init_from"):
                encoder = initial_student(cfg)
            _update(cfg, fairseq_fields(encoder.config))
        model = super().build_model(cfg, from_checkpoint)
        if encoder is not None:
            # Gates keep the start that the model's config gave them.
            state = {k: v for k, v in encoder.state_dict().items() if not k.startswith("gates.")}
            model.speech_encoder.load_state_dict(state, strict=False)
        if not from_checkpoint:
            _update(cfg, dict(OmegaConf.to_container(model.cfg, resolve=True, enum_to_str=True)))  # type: ignore
        self.student_config = model.speech_encoder.config
        self._model = model
        return model

    def build_criterion(self, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        """fairseq's; groups that stand in a file are written into ``cfg``, which fairseq saves."""
        if getattr(cfg, "groups_file", None):
            _update(cfg, {"groups": plain(read_groups(cfg)), "groups_file": None})
        criterion = super().build_criterion(cfg, *args, **kwargs)
        self._constraint = getattr(criterion, "constraint", None)
        if self._model is not None and hasattr(criterion, "deepest_layer"):
            self._model.train_up_to(criterion.deepest_layer)
        return criterion

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
        mean batch of the epoch, which all know.
        """
        if self.frames_of_weight_1 is None:
            several = torch.distributed.is_available() and torch.distributed.is_initialized()
            self.frames_of_weight_1 = frames
            if several and torch.distributed.get_world_size() > 1:
                assert self._training_data is not None and self.student_config is not None
                self.frames_of_weight_1 = self.student_config.num_frames(int(self._training_data.batch_samples))
        return frames / self.frames_of_weight_1

    def train_step(
        self, sample: Any, model: Any, criterion: Any, optimizer: Any, update_num: int, ignore_grad: bool = False
    ) -> Any:
        """fairseq's, remembering the update for the sparsity target, and each loss with its files."""
        self.num_updates = update_num
        loss, sample_size, log = super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad)
        if not ignore_grad:
            self.losses.append((log["loss"], sample["files"]))
        return loss, sample_size, log


def _update(cfg: Any, values: Dict[str, Any]) -> None:
    if isinstance(cfg, dict) or OmegaConf.is_config(cfg):
        with open_dict(cfg):
            for name, value in values.items():
                cfg[name] = value
    else:
        for name, value in values.items():
            setattr(cfg, name, value)
