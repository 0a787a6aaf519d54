"""SKILL: similarity-aware distillation and structured pruning of speech encoders, a fairseq plugin.

If fairseq is installed, importing this package registers the task ``skill_distillation``, the models ``wavlm`` and
``skill_student`` and the criterions ``distillation`` and ``skill_group_kd``, and gives ``fairseq-hydra-train`` its
trainer. If fairseq is missing or broken, encoders still load and run.
"""

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from skill_fairseq.pruning import shrink

if TYPE_CHECKING:
    from skill_fairseq.checkpoints import load_encoder

__all__ = ["load_encoder", "shrink"]
__version__ = "0.3.0"


def __getattr__(name: str) -> Any:
    if name == "load_encoder":  # imported on demand: reading files needs safetensors, pruning only torch
        from skill_fairseq.checkpoints import load_encoder

        return load_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _register() -> None:
    """Registers everything with fairseq.

    Raises:
        ImportError: fairseq is broken and the program uses it; otherwise encoders still load.
    """
    asked = "fairseq" in sys.modules or "fairseq_cli" in sys.modules
    try:
        import skill_fairseq.criterions.distillation
        import skill_fairseq.criterions.skill_group_kd
        import skill_fairseq.models.skill_student
        import skill_fairseq.models.wavlm
        import skill_fairseq.optim.by_epoch
        import skill_fairseq.optim.linear_warmup_decay
        import skill_fairseq.tasks.skill_distillation  # noqa: F401
    except Exception as error:  # old packages on a new Python raise almost anything
        if not asked:
            return
        raise ImportError(
            f"fairseq is installed, but cannot be used: {type(error).__name__}: {error}. Training needs fairseq "
            "0.12.2, hydra-core 1.0.7, omegaconf 2.0.6 and the start-up hook (SKILL_FAIRSEQ_HOOK must not be 0): "
            "reinstall skill_fairseq in this environment"
        ) from error
    if "fairseq_cli.train" in sys.modules:  # this is a training run
        from skill_fairseq.training.register import register_trainer

        register_trainer()


if find_spec("fairseq") is not None:
    _register()
