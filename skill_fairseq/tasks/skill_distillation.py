"""The distillation task: speech without labels, and the teacher's answer to it."""

import logging
import os
from dataclasses import dataclass, field
from typing import Any, Dict, Optional

import numpy as np
import torch
from fairseq.data import FileAudioDataset
from fairseq.dataclass import ChoiceEnum
from fairseq.tasks import register_task
from fairseq.tasks.audio_pretraining import AudioPretrainingConfig, AudioPretrainingTask
from omegaconf import OmegaConf, open_dict

from skill_fairseq.audio.manifest import check_manifest, load_audio, read_manifest
from skill_fairseq.checkpoints import load_encoder
from skill_fairseq.checkpoints.safe_load import plain
from skill_fairseq.criterions.skill_group_kd import read_groups
from skill_fairseq.distillation.teacher import FrozenTeacher
from skill_fairseq.models.skill_student import initial_student
from skill_fairseq.models.wavlm import fairseq_fields
from skill_fairseq.modules.config import EncoderConfig

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
    crop_multiple: int = field(
        default=1,
        metadata={"help": "crop training batches to a multiple of so many samples: fewer shapes, fewer kernels"},
    )


class SpeechDataset(FileAudioDataset):
    """fairseq's manifest dataset with checked audio and batches that differ from epoch to epoch.

    A relative root in the manifest is relative to the manifest's folder. Training batches (``pad=False``) are
    cropped to their shortest utterance.

    Args:
        manifest_path: fairseq manifest.
        crop_multiple: see :class:`SkillDistillationConfig`.
        kwargs: of :class:`FileAudioDataset`.

    Raises:
        FileNotFoundError, ValueError: the manifest or files in it are missing, or no utterance is long enough.
    """

    def __init__(self, manifest_path: str, crop_multiple: int = 1, **kwargs: Any) -> None:
        manifest = read_manifest(manifest_path)
        check_manifest(manifest)
        super().__init__(manifest_path=manifest_path, **kwargs)
        if not len(self.sizes):
            raise ValueError(
                f"{manifest_path}: no utterance has task.min_sample_size={self.min_sample_size} samples; the longest "
                f"has {max(manifest.sizes)}. Lower task.min_sample_size"
            )
        self.root_dir = str(manifest.root)
        self.crop_multiple = crop_multiple
        self.epoch = 1

    def __getitem__(self, index: int) -> Dict[str, Any]:
        name = self.fnames[index]
        name = self.text_compressor.decompress(name if isinstance(name, (str, bytes)) else name.as_py())
        wave = load_audio(os.path.join(self.root_dir, name), self.sample_rate)
        return {"id": index, "source": self.postprocess(wave, self.sample_rate)}

    def collater(self, samples: Any) -> Dict[str, Any]:
        """fairseq's, except that padding of equal lengths is no padding and that crops come in few lengths.

        ``source_bits`` is the source (B, N) again, float32 read as int32: fairseq rounds every float32 tensor of a
        batch to the student's precision, which would change what the teacher hears.
        """
        if not self.pad and samples:
            shortest = min(min(len(s["source"]) for s in samples), self.max_sample_size)
            length = max(shortest - shortest % self.crop_multiple, min(shortest, self.crop_multiple))
            samples = [{**s, "source": self.crop_to_max_size(s["source"], length)} for s in samples]
        batch = super().collater(samples)
        if batch and self.pad and not batch["net_input"]["padding_mask"].any():
            batch["net_input"]["padding_mask"] = None
        if batch:
            batch["source_bits"] = batch["net_input"]["source"].view(torch.int32)
        return batch

    @property
    def can_reuse_epoch_itr_across_epochs(self) -> bool:
        """No: every epoch makes its batches anew."""
        return False

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch's batches."""
        super().set_epoch(epoch)
        self.epoch = epoch

    def ordered_indices(self) -> np.ndarray:
        """Utterances of like length side by side, in an order that depends on fairseq's seed and the epoch."""
        if not self.shuffle:
            return np.arange(len(self))
        # fairseq seeds numpy with the same number in every epoch.
        random = np.random.default_rng([np.random.randint(2**31), self.epoch])
        sizes = np.minimum(self.sizes, self.max_sample_size) * random.uniform(0.95, 1.05, len(self))
        return np.argsort(-sizes, kind="stable")

    def batch_by_size(self, indices: np.ndarray, max_tokens: Optional[int] = None, **limits: Any) -> Any:
        """fairseq's, which stops at an utterance above ``max_tokens``; whole ones in validation get through."""
        if self.pad and max_tokens is not None and len(indices):
            max_tokens = max(max_tokens, max(int(self.num_tokens(index)) for index in indices))
        return super().batch_by_size(indices, max_tokens, **limits)


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

    @property
    def teacher(self) -> FrozenTeacher:
        """The teacher, loaded when first asked for: a checkpoint loads without it.

        Raises:
            ValueError, FileNotFoundError: no teacher is given, or it is not usable.
        """
        if self._teacher is None:
            if not self.cfg.teacher:
                raise ValueError("task.teacher: not set; expected a teacher file or folder, for example WavLM-Base+.pt")
            encoder = load_encoder(self.cfg.teacher)
            if encoder.normalize != self.cfg.normalize:
                raise ValueError(
                    f"task.normalize: {self.cfg.normalize}, but the teacher {self.cfg.teacher} was trained with "
                    f"{encoder.normalize}; set task.normalize={str(encoder.normalize).lower()}"
                )
            dtype = str(getattr(self.cfg.teacher_dtype, "name", self.cfg.teacher_dtype))
            self._teacher = FrozenTeacher(encoder, dtype, self.cfg.teacher_compile)
        return self._teacher

    def load_dataset(self, split: str, task_cfg: Any = None, **kwargs: Any) -> None:
        """Reads ``<data>/<split>.tsv``. Validation sees whole utterances: its loss is comparable between epochs."""
        train = split == "train"
        self.datasets[split] = SpeechDataset(
            os.path.join(self.cfg.data, f"{split}.tsv"),
            crop_multiple=self.cfg.crop_multiple if train else 1,
            sample_rate=self.cfg.sample_rate,
            max_sample_size=self.cfg.max_sample_size if train else None,
            min_sample_size=self.cfg.min_sample_size if train else 0,
            shuffle=train,
            pad=not train,
            normalize=self.cfg.normalize,
        )

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        """Builds the student; in training its shape and weights come from ``model.init_from``.

        The shape and every default are written into ``cfg``, which fairseq saves: a checkpoint's config alone
        rebuilds the model.
        """
        encoder = None
        if not from_checkpoint and getattr(cfg, "init_from", None):
            encoder = initial_student(cfg)
            _update(cfg, fairseq_fields(encoder.config))
        model = super().build_model(cfg, from_checkpoint)
        if encoder is not None:
            # Gates keep the start that the model's config gave them.
            state = {k: v for k, v in encoder.state_dict().items() if not k.endswith(("log_alpha", "kept_override"))}
            model.speech_encoder.load_state_dict(state, strict=False)
        if not from_checkpoint:
            _update(cfg, dict(OmegaConf.to_container(model.cfg, resolve=True, enum_to_str=True)))  # type: ignore
        self.student_config = model.speech_encoder.config
        return model

    def build_criterion(self, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        """fairseq's; groups that stand in a file are written into ``cfg``, which fairseq saves."""
        if getattr(cfg, "groups_file", None):
            _update(cfg, {"groups": plain(read_groups(cfg)), "groups_file": None})
        return super().build_criterion(cfg, *args, **kwargs)

    def train_step(
        self, sample: Any, model: Any, criterion: Any, optimizer: Any, update_num: int, ignore_grad: bool = False
    ) -> Any:
        """fairseq's, remembering the update for the sparsity target."""
        self.num_updates = update_num
        return super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad)


def _update(cfg: Any, values: Dict[str, Any]) -> None:
    if isinstance(cfg, dict) or OmegaConf.is_config(cfg):
        with open_dict(cfg):
            for name, value in values.items():
                cfg[name] = value
    else:
        for name, value in values.items():
            setattr(cfg, name, value)
