"""The distillation task's config and its checks."""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

from fairseq.dataclass import ChoiceEnum
from fairseq.tasks.audio_pretraining import AudioPretrainingConfig
from omegaconf import OmegaConf, open_dict

from skill_fairseq.checkpoints.safe_load import plain
from skill_fairseq.objectives.groups import is_sequence


@dataclass
class SkillDistillationConfig(AudioPretrainingConfig):
    """fairseq's audio task with the fields of distillation."""

    teacher: Optional[Any] = field(
        default=None,
        metadata={
            "help": "teacher file or folder, of any kind that skill_fairseq.load_encoder knows, or a list of them; in "
            "criterion.groups 1/4 is layer 4 of the second"
        },
    )
    teacher_dtype: ChoiceEnum(["fp32", "bf16", "fp16"]) = field(  # type: ignore[valid-type]
        default="fp32", metadata={"help": "precision of the teacher, independent of the student's"}
    )
    teacher_compile: bool = field(
        default=False, metadata={"help": "run the teacher's layers through torch.compile (takes minutes at the start)"}
    )
    max_valid_sample_size: Optional[int] = field(
        default=960000,
        metadata={
            "help": "samples of each recording to validate on, from its start (960000: 60 s at 16 kHz); the log names "
            "longer ones; null: whole recordings"
        },
    )
    tf32: bool = field(
        default=True,
        metadata={
            "help": "float32 matrix products in TF32 (11 bits) on Ampere and later GPUs, as torch does convolutions; "
            "the first convolution, gates, sizes and losses stay float32; no effect on CPUs, in bf16 or fp16"
        },
    )
    targets: Optional[Any] = field(
        default=None,
        metadata={
            "help": "labels beside the manifests, by names of your choice: {speaker: {column: speaker}, letters: "
            "{file: ltr}}. A file that ends in tsv (default: labels.tsv) is a table with the header utterance and "
            "other columns (default: label); an empty field is no label. Any other file holds units of dict.FILE.txt, "
            "separated by spaces. classes and counts come from the training set and are saved"
        },
    )
    separate_biases: bool = field(
        default=False,
        metadata={
            "help": "put biases of student and heads into the optimizer's group 'biases', for example without weight "
            "decay; needs optimizer._name=composite"
        },
    )
    separate_heads: bool = field(
        default=False,
        metadata={
            "help": "put the objectives' parameters into the optimizer's group 'heads', with its own learning rate; "
            "needs optimizer._name=composite"
        },
    )
    separate_adapters: bool = field(
        default=False,
        metadata={"help": "put the adapters' parameters into the group 'adapters'; needs optimizer._name=composite"},
    )
    crop_multiple: int = field(
        default=1,
        metadata={"help": "crop training batches to a multiple of this many samples: fewer shapes, fewer kernels"},
    )
    check_all_files: bool = field(
        default=False,
        metadata={"help": "check that every file of the manifests exists before training; false: check 1,000 of each"},
    )
    max_unreadable_files: int = field(
        default=100,
        metadata={"help": "unreadable files to skip per epoch; one more ends the run"},
    )
    max_skipped_updates: int = field(
        default=10,
        metadata={"help": "consecutive updates to skip for a NaN or infinite loss or gradient; one more ends the run"},
    )


NOT_HERE = (
    *("labels", "binarized_dataset", "precompute_mask_indices", "inferred_w2v_config", "tpu"),
    "text_compression_level",
)
"""Fields of fairseq's audio task that distillation does not support; values are refused."""


def several(value: Any) -> List[str]:
    """A path or a list of paths as a list; empty for None."""
    return list(value) if is_sequence(value) else [value] if value else []


def check_teachers(value: Any) -> None:
    """Refuses what is neither a path nor a list of paths.

    Raises:
        ValueError: names the field and the value.
    """
    files = [None] if is_sequence(value) and not value else several(value)
    if any(not file or isinstance(file, bool) or not isinstance(file, (str, int)) for file in files):
        raise ValueError(f"task.teacher: {plain(value)}; expected a path, or a list of paths such as [A.pt,B.pt]")


def check_task_fields(cfg: Any) -> None:
    """Refuses, before training, fields that have no effect or are out of range.

    Raises:
        ValueError: names the field, its value and the expectation.
    """
    for name in NOT_HERE:
        if getattr(cfg, name, None) not in (None, False, "none"):
            raise ValueError(f"task.{name}: {cfg[name]} does nothing in distillation; leave it out")
    for name, least in (
        *(("sample_rate", 1), ("max_sample_size", 1), ("min_sample_size", 0), ("crop_multiple", 1)),
        ("max_valid_sample_size", 1),
        *(("num_batch_buckets", 0), ("max_unreadable_files", 0), ("max_skipped_updates", 0)),
    ):
        value = getattr(cfg, name, None)
        if value is not None and value < least:
            raise ValueError(f"task.{name}: {value}; expected a whole number of at least {least}")
    if cfg.enable_padding and cfg.crop_multiple > 1:
        raise ValueError(
            f"task.crop_multiple: {cfg.crop_multiple} with task.enable_padding, which does not crop to the shortest; "
            "set only one of them"
        )


def update_fields(cfg: Any, values: Dict[str, Any]) -> None:
    """Writes into any kind of config: hydra's, a dictionary or a namespace."""
    if isinstance(cfg, dict) or OmegaConf.is_config(cfg):
        with open_dict(cfg):
            for name, value in values.items():
                cfg[name] = value
    else:
        for name, value in values.items():
            setattr(cfg, name, value)
