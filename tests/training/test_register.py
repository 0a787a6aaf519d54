"""What the trainer is put into, and what is left to stock fairseq."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from disturbed import Run

OTHER_TRAINER = """
import fairseq.trainer, fairseq_cli.train, fairseq_cli.hydra_train, skill_fairseq

class MegatronTrainer(fairseq.trainer.Trainer):
    pass

fairseq_cli.train.Trainer = MegatronTrainer
fairseq_cli.hydra_train.cli_main()
"""


@pytest.mark.slow
def test_another_trainer_of_fairseq_trains_as_in_stock_fairseq(data: list[str], tmp_path: Path) -> None:
    """In the place of the one for ``common.model_parallel_size`` > 1, which needs megatron."""
    (tmp_path / "program.py").write_text(OTHER_TRAINER)
    few = ["optimization.max_update=6", "checkpoint.save_interval_updates=2"]
    run = Run(tmp_path, *data, *few, program=(sys.executable, "program.py")).finish()
    assert sorted(run.updates()) == [1, 2, 3, 4, 5, 6]
    assert run.checkpoint()["optimizer_history"][-1]["num_updates"] == 6
    assert run.log().count("MegatronTrainer trains (as with common.model_parallel_size > 1)") == 1
