"""Where the trainer is installed, and where stock fairseq stays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from disturbed import Run
from runs import ENVIRONMENT

OTHER_TRAINER = """
import fairseq.trainer, fairseq_cli.train, fairseq_cli.hydra_train, skill_fairseq

class MegatronTrainer(fairseq.trainer.Trainer):
    pass

fairseq_cli.train.Trainer = MegatronTrainer
fairseq_cli.hydra_train.cli_main()
"""


@pytest.mark.slow
def test_another_trainer_of_fairseq_trains_as_in_stock_fairseq(data: list[str], tmp_path: Path) -> None:
    """Instead of the one for ``common.model_parallel_size`` > 1, which needs megatron."""
    (tmp_path / "program.py").write_text(OTHER_TRAINER)
    few = ["optimization.max_update=6", "checkpoint.save_interval_updates=2"]
    run = Run(tmp_path, *data, *few, program=(sys.executable, "program.py")).finish()
    assert sorted(run.updates()) == [1, 2, 3, 4, 5, 6]
    assert run.checkpoint()["optimizer_history"][-1]["num_updates"] == 6
    assert run.log().count("MegatronTrainer (as with common.model_parallel_size > 1) replaces") == 1


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="torch < 2.3 has no gradient scaler for the CPU")
@pytest.mark.parametrize("patched", [True, False])
def test_amp_unscales_gradients_once(patched: bool) -> None:
    """Gradients well above Adam's epsilon, but far below it after a second division by the scale."""
    code = f"""
import torch
from fairseq.optim import amp_optimizer
if {patched}:
    from skill_fairseq.training.register import give_amp_one_optimizer
    give_amp_one_optimizer()
from fairseq.dataclass.configs import FairseqConfig
from fairseq.optim.adam import FairseqAdamConfig
from omegaconf import OmegaConf

cfg = OmegaConf.structured(FairseqConfig)
cfg.optimizer = OmegaConf.merge(OmegaConf.structured(FairseqAdamConfig), {{"_name": "adam", "lr": [0.1]}})
weight = torch.nn.Parameter(torch.ones(2))
optimizer = amp_optimizer.AMPOptimizer.build_optimizer(cfg, [weight])
optimizer._grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
optimizer.backward((weight * 1e-4).sum())
optimizer.clip_grad_norm(0.0)
optimizer.step()
print(round(1 - weight[0].item(), 2))
"""
    result = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert result.stdout.split()[-1:] == ["0.1" if patched else "0.0"], result.stderr
