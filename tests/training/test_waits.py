"""How often a training step makes the host wait for the device, from the responsible calls on CPU tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from runs import script, train

from skill_fairseq.modules.host import WAITS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        tuple(map(int, torch.__version__.split(".")[:2])) < (2, 0), reason="torch < 2.0 has no modes for all operators"
    ),
]

COUNT = """
import collections, json, os, sys, torch
import fairseq_cli.train, fairseq_cli.hydra_train, skill_fairseq
from torch.utils._python_dispatch import TorchDispatchMode
from skill_fairseq.modules import gate_bank, host
from skill_fairseq.training import trainer as training

torch.set_num_threads(1)
named = collections.Counter()

def to_host(tensor, wait, original=host.to_host):
    named[wait] += 1
    return original(tensor, wait)

host.to_host = gate_bank.to_host = training.to_host = to_host

WAITING = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2"}

def where(name):
    # The operator, and the function of this package or of fairseq that calls it.
    frame = sys._getframe(2)
    while not any(part in frame.f_code.co_filename for part in ("skill_fairseq", "/fairseq/")):
        frame = frame.f_back
    return os.path.basename(frame.f_code.co_filename) + " " + frame.f_code.co_name + ": " + name

ON_THE_HOST = (
    "gate_bank.py",
    "hard_concrete.py",
    "encoder.py states: ",
    "trainer.py clip_grad_norm: ",
)

class Waits(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        masks = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        # The bank's and the trainer's work on what to_host gave; a mask is asked for its padding on CPUs alone.
        if (name in WAITING or masks) and not where(name).startswith(ON_THE_HOST):
            self.found[where(name)] += 1
        return function(*args, **(kwargs or {}))

class Trainer(fairseq_cli.train.Trainer):
    counted = {"train": [], "valid": []}

    def count(self, split, step):
        named.clear()
        mode = Waits()
        with mode:
            result = step()
        self.counted[split].append({"operators": dict(mode.found), "named": dict(named)})
        json.dump(self.counted, open("rank" + os.environ["RANK"] + ".json", "w"))
        return result

    def train_step(self, samples, raise_oom=False):
        return self.count("train", lambda: super(Trainer, self).train_step(samples, raise_oom))

    def valid_step(self, sample, raise_oom=False):
        return self.count("valid", lambda: super(Trainer, self).valid_step(sample, raise_oom))

fairseq_cli.train.Trainer = Trainer
fairseq_cli.hydra_train.cli_main()
"""
SETTINGS = [
    "criterion.groups=[[0],[1,2],[3]]",
    "criterion.target_sparsity=0.5",
    "optimization.max_update=4",
    *(f"optimizer.groups.{group}.lr_scheduler.warmup_updates=1" for group in ("default", "gates", "multipliers")),
    "dataset.max_tokens=40000",
    "dataset.validate_interval_updates=4",
    "model.conv_drop_rate=0.3",
    "model.ffn_drop_rate=0.7",
    "model.attention_dropout=0.0",  # blockwise attention, only for CPUs, fetches the seed of its dropout
    "distributed_training.distributed_backend=gloo",
]


@pytest.mark.nightly
@pytest.mark.parametrize("processes", [1, 2])
def test_waits_of_a_step(processes: int, speech: Path, teacher_file: Path, tmp_path: Path) -> None:
    data = [f"task.data={speech}", f"task.teacher={teacher_file}"]
    world = f"distributed_training.distributed_world_size={processes}"
    train(tmp_path, "distill", *data, world, *SETTINGS, launcher=script(tmp_path, COUNT, processes))
    # fairseq's own: two checks for a finite norm, on one rank and on all, and a number already on the host.
    theirs = {
        "trainer.py train_step: _local_scalar_dense": processes,
        "trainer.py _reduce_and_log_stats: _local_scalar_dense": 1,
    }
    ours = {"open gates": 1, "losses": 1, "norm": 1, "statistics": 1}
    for rank in range(processes):
        counted = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert len(counted["train"]) == 4 and counted["valid"]
        for step in counted["train"]:
            assert step["named"] == ours and set(ours) == set(WAITS)
            assert step["operators"] == theirs
        for step in counted["valid"]:
            assert step["named"] == {"open gates": 2, "statistics": 1, **({"losses": 1} if processes > 1 else {})}
            assert step["operators"] == {}  # nothing is padded
