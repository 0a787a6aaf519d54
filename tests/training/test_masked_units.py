"""Runs on masked units: killed, with two processes, and in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from disturbed import LOGGED, Run, same_outcome
from runs import run, script

from skill_fairseq.checkpoints import load_encoder
from skill_fairseq.files import content_sha256
from skill_fairseq.labels.codebook import Codebook

SETTINGS = [
    *LOGGED,
    "dataset.max_tokens=40000",
    "dataset.disable_validation=true",
    "checkpoint.save_interval_updates=3",
    "optimization.max_update=10",
    "criterion.objectives.units.head_dim=8",
    "criterion.objectives.units.mask_length=3",
    "model.encoder_layers=2",
    # All randomness is on: crops, masks, dropout.
    "task.max_sample_size=9000",
    "task.crop_multiple=1",
    "model.dropout=0.1",
    "model.attention_dropout=0.1",
    "model.encoder_layerdrop=0.2",
]
pytestmark = [pytest.mark.slow, pytest.mark.nightly]

MODES = {"float32": [], "bf16": ["common.bf16=true"]}
EQUAL, SAMPLES = 8, 8000
RECORD = """
import os, torch
import fairseq_cli.train, fairseq_cli.hydra_train, skill_fairseq

class Trainer(fairseq_cli.train.Trainer):
    updates = []

    def train_step(self, samples, raise_oom=False):
        result = super().train_step(samples, raise_oom)
        (masked,) = samples[0]["masked"].values()
        named = dict([*self.get_model().named_parameters(), *self.get_criterion().named_parameters()])
        state = {name: p.detach().clone() for name, p in named.items()}
        masks = dict(zip(samples[0]["id"].tolist(), masked))
        self.updates.append({"grads": self.grads, "state": state, "masks": masks})
        torch.save(self.updates, "rank" + os.environ["RANK"] + ".pt")
        return result

    def clip_grad_norm(self, *args, **kwargs):
        named = [*self.get_model().named_parameters(), *self.get_criterion().named_parameters()]
        self.grads = {name: p.grad.clone() for name, p in named if p.requires_grad}
        return super().clip_grad_norm(*args, **kwargs)

fairseq_cli.train.Trainer = Trainer
fairseq_cli.hydra_train.cli_main()
"""


@pytest.fixture(scope="module")
def units(teacher_file: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The override that names a codebook of eight states of the teacher's layer 2."""
    torch.manual_seed(0)
    with torch.no_grad():
        states = load_encoder(teacher_file)(torch.randn(4, 16000)).hidden_states[2].flatten(0, 1)
    book = Codebook(states[:: len(states) // 8][None, :8], states.std(0), 2, "t", content_sha256(teacher_file))
    path = tmp_path_factory.mktemp("units") / "codebook.safetensors"
    book.save(path)
    return f"criterion.objectives.units.codebooks={path}"


@pytest.fixture(scope="module")
def start(data: list[str], units: str) -> Callable[[Path, str], Run]:
    config = ("distill", "tiny_masked_units", SETTINGS)
    return lambda folder, mode: Run(folder, *data, units, *MODES[mode], config=config)


@pytest.fixture(scope="module")
def straight(start: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """The undisturbed run, by precision."""
    made: dict[str, Run] = {}

    def get(mode: str) -> Run:
        if mode not in made:
            made[mode] = start(tmp_path_factory.mktemp(mode), mode).finish()
            assert sorted(made[mode].updates()) == list(range(1, 11))
        return made[mode]

    return get


@pytest.mark.parametrize("mode", MODES)
def test_a_kill_changes_nothing(start: Any, straight: Any, mode: str, tmp_path: Path) -> None:
    killed = start(tmp_path, mode).start()
    killed.wait_for(lambda: killed.last_update() >= 5)
    killed.kill()
    killed.finish()
    assert killed.log().count("Loaded checkpoint") == 1
    same_outcome(killed, straight(mode))
    saved = killed.checkpoint()
    assert len(saved["cfg"]["criterion"]["objectives"]["units"]["codebooks_sha256"]) == 1


def test_bfloat16_learns_what_float32_does(straight: Any) -> None:
    """The same masks and units; losses within bfloat16's three digits; weights kept in float32."""
    whole, half = (straight(mode) for mode in MODES)
    for update, expected in whole.updates().items():
        assert half.updates()[update]["units_loss"] == pytest.approx(expected["units_loss"], rel=0.02)
    for part in ("model", "criterion"):
        trained = {name: w for name, w in half.checkpoint()[part].items() if w.dim() == 2}
        assert trained and all(w.dtype == torch.float32 for w in trained.values())
        assert any(not torch.equal(w, w.bfloat16().float()) for w in trained.values())


def test_two_processes_are_one(small: Any, teacher_file: Path, units: str, tmp_path: Path) -> None:
    """Gradients of three updates, for one batch or its halves: masks belong to the utterance, on any rank."""
    audio = small.write_speech(tmp_path / "audio", {"train": [SAMPLES / 16000] * EQUAL, "valid": [0.5]})
    found = {}
    for processes in (1, 2):
        overrides = [
            *(f"task.data={audio}", f"task.teacher={teacher_file}", units, "common.log_format=json"),
            *("hydra.run.dir=.", "checkpoint.save_dir=.", "checkpoint.no_save=true", "model.encoder_layers=2"),
            *("dataset.disable_validation=true", "optimization.max_update=3", "optimization.lr=[1e-7]"),
            *("criterion.objectives.units.head_dim=8", "criterion.objectives.units.mask_length=3"),
            f"dataset.max_tokens={EQUAL * SAMPLES // processes}",
            f"distributed_training.distributed_world_size={processes}",
            "distributed_training.distributed_backend=gloo",
        ]
        folder = tmp_path / str(processes)
        config = Path(__file__).resolve().parents[2] / "config" / "distill"
        launcher = script(folder, RECORD, processes)
        run([*launcher, "--config-dir", str(config), "--config-name", "tiny_masked_units", *overrides], folder)
        found[processes] = [torch.load(folder / f"rank{rank}.pt") for rank in range(processes)]
    (whole,), ranks = found[1], found[2]
    assert len(whole) == 3 and all(grad.abs().max() > 0 for grad in whole[0]["grads"].values())
    for one, *both in zip(whole, *ranks):
        masks = {i: mask for each in both for i, mask in each["masks"].items()}
        assert masks.keys() == one["masks"].keys() == set(range(EQUAL))
        assert all(torch.equal(masks[i], mask) for i, mask in one["masks"].items())
        assert len({tuple(mask.tolist()) for mask in masks.values()}) > 1
        largest = max(grad.abs().max() for grad in one["grads"].values())
        for each in both:
            assert each["grads"].keys() == one["grads"].keys()
            for name, grad in one["grads"].items():
                off = (each["grads"][name] - grad).abs().max() / largest
                assert off < 1e-5, f"{name}: off by {off:.1e} of the largest gradient"
        assert all(torch.equal(both[0]["state"][name], both[1]["state"][name]) for name in both[0]["state"])
