"""Training at lower precision: 50 updates of stage 1 in every fairseq mode, compared with float32.

On a CPU ``common.amp`` does nothing, because its autocast and gradient scaler are CUDA's. Here torch's CPU counterparts
replace them; all else is fairseq's.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import skill_fairseq
from skill_fairseq.audio.manifest import load_audio, read_manifest
from skill_fairseq.checkpoints import load_encoder
from skill_fairseq.checkpoints.safe_load import load_torch_file
from skill_fairseq.modules.attention_core import attend
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.positional_conv import PositionalConv
from skill_fairseq.modules.taps import Tap
from skill_fairseq.objectives.teacher import FrozenTeacher
from tests.conftest import LARGE_STYLE, random_encoder, waves

pytestmark = pytest.mark.skipif(
    not hasattr(torch, "get_autocast_dtype"), reason="torch < 2.4 lacks half-precision kernels and a scaler for the CPU"
)

PACKAGE = Path(skill_fairseq.__file__).parent
UPDATES = 50

TRAIN = """
import functools, json, os, sys
sys.path.insert(0, sys.argv[1])
import _skill_fairseq_hook
_skill_fairseq_hook.install()
import torch, fairseq_cli.train, fairseq_cli.hydra_train, skill_fairseq

KEPT = ("log_alpha", "lambda1", "lambda2")

class Trainer(fairseq_cli.train.Trainer):
    record = []

    def train_step(self, samples, raise_oom=False):
        teacher, heard = self.task.teachers[0], []
        whole = type(teacher).tap

        def tap(source, *args):
            heard.append([str(source.dtype), source.double().sum().item()])
            return whole(teacher, source, *args)

        teacher.tap = tap
        logged = super().train_step(samples, raise_oom)
        named = [*self.get_model().named_parameters(), *self.get_criterion().named_parameters()]
        self.record.append({
            "logged": {k: float(v) for k, v in logged.items() if isinstance(v, (int, float, torch.Tensor))},
            "heard": heard,
            "kept": sorted({str(p.dtype) for n, p in named if n.endswith(KEPT)}),
            "others": sorted({str(p.dtype) for n, p in named if not n.endswith(KEPT)}),
            "teacher": sorted({str(p.dtype) for p in teacher.encoder.parameters()}),
            "finite": all(bool(p.isfinite().all()) for _, p in named),
            "log_alpha": [x for n, p in named if n.endswith("log_alpha") for x in p.tolist()],
            "ascent": [p.grad.item() for p in self.optimizer.optimizer.optimizers["multipliers"].params],
        })
        return logged

fairseq_cli.train.Trainer = Trainer
for name, arguments in json.loads(sys.argv[2]).items():
    if os.fork():  # importing takes longer than training
        assert os.wait()[1] == 0, name
        continue
    status = 1
    try:
        os.mkdir(name)
        os.chdir(name)
        if name.startswith("amp"):
            dtype = getattr(torch, name[4:])
            torch.cuda.amp.autocast = lambda enabled: torch.autocast("cpu", dtype, enabled)
            torch.cuda.amp.GradScaler = functools.partial(torch.amp.GradScaler, "cpu")
        sys.argv[1:] = arguments
        fairseq_cli.hydra_train.cli_main()
        json.dump(Trainer.record, open("record.json", "w"))
        status = 0
    finally:
        sys.stdout.flush()
        os._exit(status)
"""
MODES = {
    "fp32": [],
    "bf16": ["common.bf16=true", "common.fp16_no_flatten_grads=true"],
    "fp16": ["common.fp16=true", "common.fp16_no_flatten_grads=true", "common.fp16_init_scale=1024"],
    "fp16-lean": ["common.fp16=true", "common.memory_efficient_fp16=true"],
    "amp-bfloat16": ["common.amp=true"],
    "amp-float16": ["common.amp=true"],
}
TOLERANCE = {"bf16": 0.02, "fp16": 0.01, "fp16-lean": 0.01, "amp-bfloat16": 0.02, "amp-float16": 0.005}
"""Of the distillation loss, mean difference over mean; about twice what was measured."""


@pytest.fixture(scope="module")
def runs(
    speech: Path, teacher_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, list[dict[str, Any]]]]:
    """Each run's folder and the records of its updates."""
    folder = tmp_path_factory.mktemp("runs")
    rates = {"default": 0.001, "gates": 0.2, "multipliers": 0.5}
    common = [
        *("--config-dir", str(PACKAGE.parent / "config" / "distill"), "--config-name", "tiny"),
        *(f"task.data={speech}", f"task.teacher={teacher_file}", "criterion.groups=[[0],[1,2],[3]]"),
        *("hydra.run.dir=.", "checkpoint.save_dir=.", "dataset.max_tokens=20000", "dataset.disable_validation=true"),
        *(f"optimization.max_update={UPDATES}", "criterion.sparsity_warmup=10", "criterion.target_sparsity=0.5"),
        *(f"optimizer.groups.{group}.lr_float={rate}" for group, rate in rates.items()),
        f"optimization.lr=[{rates['default']}]",
        *(f"optimizer.groups.{group}.lr_scheduler.warmup_updates=5" for group in rates),
    ]
    environment = {**os.environ, "SKILL_FAIRSEQ_USER_DIR": str(PACKAGE), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    arguments = json.dumps({name: [*common, *overrides] for name, overrides in MODES.items()})
    result = subprocess.run(
        [sys.executable, "-c", TRAIN, str(PACKAGE / "hook"), arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-5000:]
    return {name: (folder / name, json.loads((folder / name / "record.json").read_text())) for name in MODES}


def curve(record: list[dict[str, Any]], name: str) -> Tensor:
    return torch.tensor([update["logged"][name] for update in record], dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(TOLERANCE))
def test_fifty_updates_stay_beside_float32(runs: dict, mode: str) -> None:
    """Single updates may differ more, because a gate that opens a little earlier changes that update's student."""
    wanted, found = runs["fp32"][1], runs[mode][1]
    assert len(found) == len(wanted) == UPDATES
    assert all(update["finite"] for update in found)
    loss = curve(wanted, "distillation_loss")
    assert (loss - curve(found, "distillation_loss")).abs().mean() < TOLERANCE[mode] * loss.abs().mean()
    assert curve(wanted, "expected_sparsity")[-1] > 0.05  # there is something to compare
    for name, tolerance in (("expected_sparsity", 0.003), ("lambda1", 0.01), ("lambda2", 0.01)):
        assert (curve(wanted, name) - curve(found, name)).abs().max() < tolerance, name
    gates = [torch.tensor(record[-1]["log_alpha"]) for record in (wanted, found)]
    assert (gates[0] - gates[1]).abs().mean() < 0.25 and gates[0].std() > 1.5


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(MODES))
def test_gates_and_multipliers_are_float32(runs: dict, mode: str) -> None:
    folder, record = runs[mode]
    weights = {"bf16": "torch.bfloat16", "fp16": "torch.float16", "fp16-lean": "torch.float16"}.get(
        mode, "torch.float32"
    )
    for update in record:
        assert update["kept"] == ["torch.float32"] and update["others"] == [weights]
    checkpoint = load_torch_file(folder / "checkpoint_last.pt")
    log_alpha = [v.flatten() for k, v in checkpoint["model"].items() if k.endswith("log_alpha")]
    assert torch.cat(log_alpha).tolist() == record[-1]["log_alpha"]
    assert {v.dtype for k, v in checkpoint["criterion"].items() if "lambda" in k} == {torch.float32}
    student = load_encoder(folder / "checkpoint_last.pt")
    assert {p.dtype for p in student.parameters()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(MODES))
def test_multipliers_ascend_on_unscaled_gradients(runs: dict, mode: str) -> None:
    """At the step the gradient is the analytic one, (t - s) and its square, for any loss scale."""
    for update in runs[mode][1]:
        excess = update["logged"]["expected_sparsity"] - update["logged"]["target_sparsity"]
        assert update["ascent"] == pytest.approx([-excess, -(excess**2)], abs=1e-4)  # the log has four digits


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(TOLERANCE))
def test_the_teacher_keeps_its_precision_and_hears_the_same(runs: dict, mode: str) -> None:
    for mine, other in zip(runs[mode][1], runs["fp32"][1]):
        assert mine["teacher"] == ["torch.float32"]
        assert mine["heard"] == other["heard"] and len(mine["heard"]) == 1


def states_and_gradients(encoder: SpeechEncoder, source: Tensor, autocast: torch.dtype | None = None) -> dict:
    """Hidden states, and gradients of a smooth loss of them, in float32."""
    assert encoder.gates is not None
    encoder.gates.generator = torch.Generator().manual_seed(5)
    encoder.zero_grad(set_to_none=True)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        out = encoder(source)
        states = [F.layer_norm(state.float(), state.shape[-1:]) for state in (*out.hidden_states, out.x)]
    weights = torch.Generator().manual_seed(3)
    sum((s * torch.randn(s.shape, generator=weights)).mean() for s in states).backward()  # type: ignore[union-attr]
    gates = [p for n, p in encoder.named_parameters() if n.endswith("log_alpha")]
    others = [p for n, p in encoder.named_parameters() if not n.endswith("log_alpha")]
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in [*gates, *others])
    assert {p.dtype for p in gates} == {torch.float32}
    result = {f"state {i}": state.detach() for i, state in enumerate(states)}
    for name, group in (("gates", gates), ("weights", others)):
        result[name] = torch.cat([p.grad.float().flatten() for p in group])  # type: ignore[union-attr]
    return result


@pytest.mark.parametrize("style", [{}, LARGE_STYLE], ids=["base", "large"])
@pytest.mark.parametrize("autocast", [False, True], ids=["cast", "autocast"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_every_sublayer_works_at_lower_precision(
    style: dict, autocast: bool, dtype: torch.dtype, tolerance: float
) -> None:
    """Forward and backward with sliced channels, heads and units; gradients are noisier than states."""
    units = ["conv", "heads", "ffn", "attention_layers", "ffn_layers"]
    encoder = random_encoder(pruning_units=units, **style).train()
    with torch.no_grad():
        for _, gate in encoder.named_gates():
            gate.log_alpha.normal_(1.0 if gate.num_units > 1 else 4.0, generator=torch.Generator().manual_seed(2))
    source = waves(8000)
    wanted = states_and_gradients(encoder, source)
    found = states_and_gradients(encoder if autocast else encoder.to(dtype), source, dtype if autocast else None)
    for name, exact in wanted.items():
        error = (found[name] - exact).norm() / exact.norm()
        assert 1e-6 < error < tolerance * (1 if name.startswith("state") else 2), name


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_a_constant_in_the_audio_does_not_cost_precision(dtype: torch.dtype, tolerance: float) -> None:
    """GroupNorm removes a constant; with 8 bits the rest would be noise."""
    source = 0.01 * waves(8000) + 0.05
    with torch.no_grad():
        wanted = random_encoder()(source, last_layer=0).x
        found = random_encoder().to(dtype)(source, last_layer=0).x.float()
    assert (found - wanted).norm() < tolerance * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_is_computed_in_float32_under_autocast(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 70, 8, generator=generator, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", dtype):
        found = attend(q, k, v)
    torch.testing.assert_close(found, attend(q, k, v), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_positional_weight_is_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    conv = PositionalConv(64, 16, 4).to(dtype)
    exact = copy.deepcopy(conv).double().weight()
    assert ((conv.weight() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps * 0.51 + 1e-7).all()


@pytest.mark.parametrize("dtype, tolerance", [("bf16", 0.01), ("fp16", 0.0012)])
def test_group_means_of_a_trained_teacher_at_lower_precision(dtype: str, tolerance: float) -> None:
    tiny = PACKAGE.parent / "examples" / "tiny"
    taps = [Tap(group, normalize=True) for group in ((0,), (1, 2), (3, 4))]
    exact = FrozenTeacher(load_encoder(tiny / "teacher" / "teacher.safetensors"))
    teacher = FrozenTeacher(load_encoder(tiny / "teacher" / "teacher.safetensors"), dtype)
    manifest = read_manifest(tiny / "data" / "train.tsv")
    for path in manifest.files[:5]:
        source = torch.as_tensor(load_audio(path, 16000))[None, :16000].float()
        wanted, found = exact.tap(source, None, taps), teacher.tap(source, None, taps)
        for mean, other in zip(found, wanted):
            assert mean.dtype == torch.float32
            assert 1e-5 < (mean - other).norm() / other.norm() < tolerance
