"""Half precision loses nothing at a restart, and passes on float32 weights."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from disturbed import Run, same_outcome
from fairseq.optim import FP16Optimizer
from messages import says
from omegaconf import OmegaConf
from runs import ENVIRONMENT
from torch import nn

from skill_fairseq.checkpoints import load_encoder
from skill_fairseq.models.student_init import initial_student
from skill_fairseq.training.half_precision import MasterWeights, check_memory_efficient
from tests.conftest import student_config

MODES = {
    "bf16": ["common.bf16=true"],
    "fp16": ["common.fp16=true", "common.fp16_no_flatten_grads=true"],
    "lean-bf16": ["common.bf16=true", "common.memory_efficient_bf16=true"],
    "lean-fp16": ["common.fp16=true", "common.memory_efficient_fp16=true"],
}
SHORT = ["dataset.max_tokens=16000", "dataset.disable_validation=true"]
SCALE = ["common.fp16_init_scale=16", "common.fp16_scale_window=10"]  # it doubles every 10 updates

FORKS = """
import json, os, re, signal, sys, time
import fairseq_cli.hydra_train, skill_fairseq, soundfile, torch._dynamo  # importing takes longer than training

def start(folder, arguments):
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.chdir(folder)
        log = os.open("log0", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv[1:] = arguments
        fairseq_cli.hydra_train.cli_main()
        status = 0
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)

def last_update(folder):
    try:
        return int(re.findall(r'"num_updates": "(\\d+)"', open(folder + "/log0").read())[-1])
    except (OSError, IndexError):
        return 0

def run(folder, arguments, kills):
    for update in kills:
        child = start(folder, arguments)
        while last_update(folder) < update:
            time.sleep(0.01)
            assert os.waitpid(child, os.WNOHANG) == (0, 0), folder
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert os.waitpid(start(folder, arguments), 0)[1] == 0, folder

runners = []
for job in json.loads(sys.argv[1]):
    runners.append(os.fork())
    if not runners[-1]:
        status = 1
        try:
            run(*job)
            status = 0
        finally:
            os._exit(status)
assert [os.waitpid(runner, 0)[1] for runner in runners] == [0] * len(runners)
"""


@pytest.fixture(scope="module")
def pairs(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Run, Run]]:
    """For each mode a run of 40 updates, and one killed three times (once without float32 weights)."""
    folder = tmp_path_factory.mktemp("half")
    made: dict[str, tuple[Run, Run]] = {}
    jobs = []
    for mode, overrides in MODES.items():
        one, two = (Run(folder / f"{mode}{i}", *data, *overrides, *SHORT, *SCALE) for i in (1, 2))
        kills = [13] if mode.startswith("lean") else [5, 13, 25]
        jobs += [(str(one.folder), one.command[1:], []), (str(two.folder), two.command[1:], kills)]
        made[mode] = one, two
    result = subprocess.run(
        [sys.executable, "-c", FORKS, json.dumps(jobs)], env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )
    logs = "\n".join(run.log()[-3000:] for pair in made.values() for run in pair if not run.last_update() == 40)
    assert result.returncode == 0, result.stderr[-3000:] + logs
    return made


@pytest.mark.faults(
    "a process is killed (SIGKILL, a node goes down)",
    "the same command resumes from the last checkpoint; the result is identical, bit for bit",
)
@pytest.mark.nightly
@pytest.mark.parametrize("mode", MODES)
def test_kills_change_nothing(pairs: Any, mode: str) -> None:
    straight, killed = pairs[mode]
    assert killed.log().count("Loaded checkpoint") == (1 if mode.startswith("lean") else 3)
    assert sorted(straight.updates()) == list(range(1, 41))
    same_outcome(killed, straight)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["bf16", "fp16"])
def test_whoever_reads_the_checkpoint_gets_float32_weights(pairs: Any, mode: str) -> None:
    """skill-shrink and skill-export through load_encoder, stage 2 through model.init_from."""
    run = pairs[mode][0]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[mode]
    path, saved = run.folder / "checkpoint_last.pt", run.checkpoint()
    for part in ("model", "criterion"):
        trained = {name: w for name, w in saved[part].items() if w.dim() == 2 and "mask_emb" not in name}
        assert len(trained) > (20 if part == "model" else 0)
        for name, weight in trained.items():
            assert weight.dtype == torch.float32 and not torch.equal(weight, weight.to(dtype).float()), name
    encoder = load_encoder(path)
    for name, weight in encoder.state_dict().items():
        assert torch.equal(weight, saved["model"][f"speech_encoder.{name}"]), name
    small = initial_student(student_config(path))
    untouched = "transformer.layer_norm.weight"
    assert torch.equal(small.state_dict()[untouched], saved["model"][f"speech_encoder.{untouched}"])


def half_optimizer(module: nn.Module, flat: bool) -> FP16Optimizer:
    adam = {"_name": "adam", "adam_betas": "(0.9,0.999)", "adam_eps": 1e-8, "weight_decay": 0.0, "lr": [0.1]}
    adam.update(use_old_adam=True, fp16_adam_stats=False, tpu=False)
    common = {"bf16": False, "fp16_no_flatten_grads": not flat, "fp16_init_scale": 1, "fp16_scale_window": 10}
    common.update(fp16_scale_tolerance=0.0, threshold_loss_scale=None, min_loss_scale=1e-4)
    cfg = OmegaConf.create({"optimizer": adam, "common": common})
    return FP16Optimizer.build_optimizer(cfg, list(module.parameters()))


@pytest.mark.parametrize("flat", [False, True])
def test_masters_start_before_the_cast_and_survive_a_round_trip(flat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the place of fairseq's flat copy
    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), nn.Module()
    exact = copy.deepcopy(model.state_dict())
    masters = MasterWeights(model, criterion)
    model.half()
    optimizer = half_optimizer(model, flat)
    masters.restore(optimizer)
    saved: dict[str, Any] = {"model": model.state_dict()}
    masters.fill(saved, optimizer)
    assert list(saved["model"]) == list(exact)
    assert all(torch.equal(saved["model"][name], exact[name]) for name in exact)

    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.37)
    optimizer._needs_sync = True
    optimizer.step()
    masters.fill(saved, optimizer)
    learnt = copy.deepcopy(saved["model"])
    assert not any(torch.equal(learnt[name], exact[name]) for name in exact)
    other = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    again = MasterWeights(other, criterion)
    other.half()
    with again.listening():
        other.load_state_dict(learnt)
    optimizer = half_optimizer(other, flat)
    again.restore(optimizer)
    saved = {"model": other.state_dict()}
    again.fill(saved, optimizer)
    assert all(torch.equal(saved["model"][name], learnt[name]) for name in learnt)
    assert all(torch.equal(weight, learnt[name].half()) for name, weight in other.state_dict().items())


def test_memory_efficient_says_what_it_costs_and_needs_its_precision() -> None:
    off = dict.fromkeys(("fp16", "bf16", "memory_efficient_fp16", "memory_efficient_bf16"), False)
    assert check_memory_efficient(OmegaConf.create(off)) == ""
    lean = OmegaConf.create({**off, "memory_efficient_bf16": True, "bf16": True})
    assert "common.memory_efficient_bf16" in check_memory_efficient(lean) and "lost" in check_memory_efficient(lean)
    lean.bf16, lean.fp16 = False, True
    with pytest.raises(ValueError, match=says("common.memory_efficient_bf16: true", "common.bf16=true")):
        check_memory_efficient(lean)
