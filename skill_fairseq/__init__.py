"""SKILL: similarity-aware distillation and structured pruning of speech encoders, a fairseq plugin.

Importing it registers, where fairseq is installed, the task ``skill_distillation``, the models ``wavlm`` and
``skill_student`` and the criterion ``skill_group_kd``, and gives ``fairseq-hydra-train`` its trainer. Without fairseq,
encoders still load and run.
"""

import sys
from importlib.util import find_spec

from skill_fairseq.checkpoints import load_encoder
from skill_fairseq.pruning.shrink import shrink

__all__ = ["load_encoder", "shrink"]
__version__ = "0.2.0"

if find_spec("fairseq") is not None:
    import skill_fairseq.criterions.skill_group_kd
    import skill_fairseq.models.skill_student
    import skill_fairseq.models.wavlm
    import skill_fairseq.optim.linear_warmup_decay
    import skill_fairseq.tasks.skill_distillation  # noqa: F401

    if "fairseq_cli.train" in sys.modules:  # this is a training run
        from skill_fairseq.training.register import register_trainer

        register_trainer()
