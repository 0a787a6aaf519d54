"""Several processes train like one: gradients, parameters, gates and data, with torchrun and fairseq-hydra-train."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from messages import says
from runs import logged, script, train

from skill_fairseq.checkpoints import save_encoder

pytestmark = pytest.mark.slow

RECORD = """
import os, torch
import fairseq_cli.train, fairseq_cli.hydra_train, skill_fairseq

class Trainer(fairseq_cli.train.Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.updates, self.drawn = [], []
        bank = self.get_model().speech_encoder.gates
        draw = bank.draw
        bank.draw = lambda **how: (drawn := draw(**how), self.drawn.append(drawn.z.detach().clone()))[0]

    def begin_epoch(self, epoch):
        self.epoch = epoch
        super().begin_epoch(epoch)

    def train_step(self, samples, raise_oom=False):
        ids = [sample["id"].tolist() if sample else [] for sample in samples]
        self.drawn.clear()
        result = super().train_step(samples, raise_oom)
        state = {**self.get_model().state_dict(), **self.get_criterion().state_dict()}
        state = {name: tensor.clone() for name, tensor in state.items()}
        gates = torch.stack(self.drawn)
        assert len(gates) == len(ids), 'one draw a forward'
        self.updates.append({"epoch": self.epoch, "ids": ids, "grads": self.grads, "state": state, "gates": gates})
        torch.save(self.updates, "rank" + os.environ["RANK"] + ".pt")
        return result

    def clip_grad_norm(self, *args, **kwargs):
        named = [*self.get_model().named_parameters(), *self.get_criterion().named_parameters()]
        self.grads = {name: p.grad.clone() for name, p in named if p.requires_grad}
        return super().clip_grad_norm(*args, **kwargs)

fairseq_cli.train.Trainer = Trainer
"""
TAMPER = """
class Tampering(Trainer):
    def begin_valid_epoch(self, epoch):
        if os.environ["RANK"] == "1" and self.get_num_updates() >= 2:
            self.get_criterion().constraint.lambda1.data += LAMBDA1
            gates = dict(self.get_model().speech_encoder.named_gates())
            gates["transformer.layers.1.ffn.gate"].log_alpha.data[7] += GATE
        super().begin_valid_epoch(epoch)

fairseq_cli.train.Trainer = Tampering
"""
RUN = "fairseq_cli.hydra_train.cli_main()\n"

COMMON = [
    "common.log_format=json",
    "common.log_interval=1",
    "distributed_training.distributed_backend=gloo",
    "criterion.groups=[[0],[1,2],[3]]",
    "criterion.target_sparsity=0.5",
    "criterion.sparsity_warmup=2",
    "model.conv_drop_rate=0.3",
    "model.head_drop_rate=0.3",
    "model.ffn_drop_rate=0.7",
]
UPDATES, EQUAL, SAMPLES = 3, 8, 8000
# Rates are so low that rounding cannot grow: Adam would make a full step for a gradient that is 0 up to rounding.
SLOW = [
    f"optimization.max_update={UPDATES}",
    "dataset.validate_interval_updates=3",
    "dataset.max_tokens_valid=20000",
    *(f"optimizer.groups.{group}.lr_scheduler.warmup_updates=1" for group in ("default", "gates", "multipliers")),
    "optimization.lr=[1e-7]",
    "optimizer.groups.gates.lr_float=1e-7",
    "optimizer.groups.multipliers.lr_float=0.2",
]
WAYS = {  # processes, update_freq, what else
    "one": (1, 1, ()),
    "accumulated": (1, 2, ()),
    "two": (2, 1, ()),
    "two, accumulated": (2, 2, ()),
    "two, no_c10d": (2, 1, ("distributed_training.ddp_backend=no_c10d",)),
    "two, accumulated, pytorch_ddp": (2, 2, ("distributed_training.ddp_backend=pytorch_ddp",)),
    "two, per rank": (2, 1, ("model.gate_sampling=per_rank",)),
    "one, bf16": (1, 1, ("common.bf16=true", "common.fp16_no_flatten_grads=true")),
    "two, bf16": (2, 1, ("common.bf16=true", "common.fp16_no_flatten_grads=true")),
}
EXACT = [way for way in WAYS if way not in ("one", "two, per rank") and "bf16" not in way]
Update = dict[str, Any]


def record(
    folder: Path, *overrides: str, processes: int = 1, source: str = RECORD + RUN
) -> tuple[list[list[Update]], str]:
    """Every rank's updates, and the log."""
    world = f"distributed_training.distributed_world_size={processes}"
    log = train(folder, "distill", *COMMON, *overrides, world, launcher=script(folder, source, processes))
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(processes)], log


@pytest.fixture(scope="module")
def equal(small: Any, teacher_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Eight training utterances of equal length, so that halves of a batch are equal; five of various lengths to
    validate."""
    lengths = {"train": [SAMPLES / 16000] * EQUAL, "valid": [0.4, 0.9, 0.6, 1.1, 0.8]}
    return [
        f"task.data={small.write_speech(tmp_path_factory.mktemp('equal'), lengths)}",
        f"task.teacher={teacher_file}",
    ]


@pytest.fixture(scope="module")
def ways(equal: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[list[Update]], str]]:
    """The same three updates in every setup."""
    found = {}
    for name, (processes, accumulated, changes) in WAYS.items():
        batch = EQUAL * SAMPLES // (processes * accumulated)
        size = (f"dataset.max_tokens={batch}", f"optimization.update_freq=[{accumulated}]")
        folder = tmp_path_factory.mktemp("way")
        found[name] = record(folder, *equal, *SLOW, *size, *changes, processes=processes)
    return found


def test_two_ranks_shift_their_gates_alike(equal: list[str], tmp_path: Path) -> None:
    fast = (
        "criterion.constraint=exact",
        "optimizer.groups.gates.lr_float=0.1",
        f"dataset.max_tokens={EQUAL * SAMPLES // 2}",
    )
    ranks, log = record(tmp_path, *equal, *SLOW, *fast, processes=2)
    name = next(name for name in ranks[0][0]["state"] if name.endswith("log_alpha"))
    for first, second in zip(*ranks):
        assert first["ids"] != second["ids"] and torch.equal(first["state"][name], second["state"][name])
    assert not torch.equal(ranks[0][0]["state"][name], ranks[0][-1]["state"][name])
    assert [entry["expected_sparsity"] for entry in logged(log, "train_inner")][-1] == 0.5


@pytest.mark.parametrize("way", EXACT)
def test_gradients_are_those_of_one_process_with_the_whole_batch(ways: dict, way: str) -> None:
    (whole,), _ = ways["one"]
    processes, accumulated, _ = WAYS[way]
    for rank, updates in enumerate(ways[way][0]):
        assert len(updates) == len(whole) == UPDATES
        for update, expected in zip(updates, whole):
            assert [len(ids) for ids in update["ids"]] == [EQUAL // (processes * accumulated)] * accumulated
            assert set(update["grads"]) == set(expected["grads"])
            largest = max(grad.abs().max() for grad in expected["grads"].values())
            for name, grad in expected["grads"].items():
                off = (update["grads"][name] - grad).abs().max() / largest
                assert off < 1e-5, f"{name} on rank {rank}: off by {off:.1e} of the largest gradient"
    for part in ("log_alpha", "lambda1", "projections.0.weight", "fc1.weight"):  # it compares something
        assert all(g.abs().max() > 0 for name, g in whole[1]["grads"].items() if name.endswith(part)), part


def test_gates_are_those_of_the_update_on_every_rank_and_in_every_batch(ways: dict) -> None:
    (whole,), _ = ways["one"]
    assert not torch.equal(whole[0]["gates"], whole[1]["gates"])
    assert 0.1 < (whole[0]["gates"] == 0).float().mean() < 0.6
    for way in ("one", *EXACT):
        for updates in ways[way][0]:
            for update, expected in zip(updates, whole):
                for row in update["gates"]:
                    # log_alpha itself differs by rounding.
                    assert torch.allclose(row, expected["gates"][0], atol=1e-5)


def test_gradients_of_gates_and_multipliers_are_summed_in_float32_in_a_half_precision_run(ways: dict) -> None:
    """The multipliers' gradient is the excess sparsity: accurate to float32, and to three digits in bfloat16."""
    (whole,), _ = ways["one, bf16"]
    for updates in ways["two, bf16"][0]:
        for update, expected in zip(updates, whole):
            for name in ("constraint.lambda1", "constraint.lambda2"):
                grad = expected["grads"][name]
                assert grad.dtype == update["grads"][name].dtype == torch.float32
                assert (update["grads"][name] - grad).abs() <= 1e-6 * grad.abs(), name
            gates = [entry["grads"]["speech_encoder.gates.log_alpha"] for entry in (update, expected)]
            assert gates[0].dtype == torch.float32
            # More than three digits: those that bfloat16 would round are present.
            assert (gates[0] != gates[0].bfloat16().float()).float().mean() > 0.3
            assert (gates[0] - gates[1]).norm() < 0.05 * gates[1].norm()


def test_ranks_may_draw_gates_of_their_own(ways: dict) -> None:
    (first, second), _ = ways["two, per rank"]
    for one, two in zip(first, second):
        differ = ((one["gates"] > 0) != (two["gates"] > 0)).float().mean()
        assert 0.1 < differ < 0.6
        for name in one["grads"]:
            assert torch.equal(one["grads"][name], two["grads"][name]), name


def test_validation_is_the_same_on_any_number_of_processes(ways: dict) -> None:
    """In three batches, one of which is alone on its rank."""
    entries = {way: logged(log, "valid")[-1] for way, (_, log) in ways.items()}
    for way, entry in entries.items():
        for name in ("distillation_loss", "l1_g0", "cos_g2", "expected_sparsity", "lambda1"):
            one = entries["one, bf16" if "bf16" in way else "one"]
            assert entry[name] == pytest.approx(one[name], abs=1e-4), (way, name)


def test_gradients_of_unequal_batches_are_weighed_by_their_frames(
    small: Any, teacher_file: Path, tmp_path: Path
) -> None:
    """A rank with four utterances of 24 frames and one with two of 12, against a single process for each."""
    audio = small.write_speech(tmp_path / "audio", {"train": [0.5] * 4 + [0.25] * 2})
    _, *lines = (audio / "train.tsv").read_text().splitlines()
    grads, gates = {}, []
    for name, part in {"long": lines[:4], "short": lines[4:], "both": lines}.items():
        (tmp_path / name / "data").mkdir(parents=True)
        for split in ("train", "valid"):
            (tmp_path / name / "data" / f"{split}.tsv").write_text("\n".join([str(audio), *part, ""]))
        where = [f"task.data={tmp_path / name / 'data'}", f"task.teacher={teacher_file}", "dataset.max_tokens=32000"]
        once = ["optimization.max_update=2", "dataset.disable_validation=true", "checkpoint.no_save=true"]
        processes = 2 if name == "both" else 1
        ranks, log = record(tmp_path / name / "run", *where, *SLOW, *once, processes=processes)
        first = [updates[0] for updates in ranks]
        batches = [len(ids) for update in first for ids in update["ids"]]
        assert sorted(batches) == ([len(part)] if processes == 1 else [2, 4])
        grads[name] = [update["grads"] for update in first]
        gates += [update["gates"] for update in first]
        grads[name].append(logged(log, "train_inner")[0]["distillation_loss"])
    assert all(torch.equal(z, gates[0]) for z in gates[1:])
    (long, long_loss), (short, short_loss) = grads["long"], grads["short"]
    share = 4 * 24 / (4 * 24 + 2 * 12)
    *ranks, loss = grads["both"]
    assert loss == pytest.approx(share * long_loss + (1 - share) * short_loss, abs=2e-4)
    assert abs(long_loss - short_loss) > 0.005
    largest = max(grad.abs().max() for grad in long.values())
    for found in ranks:
        for name, grad in found.items():
            expected = share * long[name] + (1 - share) * short[name]
            assert (grad - expected).abs().max() < 1e-5 * largest, name
        assert found["constraint.lambda1"].item() == pytest.approx(long["constraint.lambda1"].item(), rel=1e-5)


def test_pytorch_ddp_bears_parameters_that_no_loss_reaches(small: Any, tmp_path: Path) -> None:
    """A pre-LayerNorm student's last norm, layers above the deepest group, and sublayers whose gate is closed."""
    save_encoder(small.random_encoder(**small.LARGE_STYLE), tmp_path / "teacher.safetensors")
    data = small.write_speech(tmp_path / "data", {"train": [0.4] * 12, "valid": [0.5]})
    settings = [
        f"task.data={data}",
        f"task.teacher={tmp_path / 'teacher.safetensors'}",
        "criterion.groups=[[0],[2]]",
        "model.pruning_units=[ffn,attention_layers,ffn_layers]",
        "model.layer_drop_rate=0.5",
        "dataset.max_tokens=12800",
        "optimization.max_update=3",
        "dataset.disable_validation=true",
        "checkpoint.no_save=true",
    ]
    found = []
    for backend in ("legacy_ddp", "pytorch_ddp"):
        choice = f"distributed_training.ddp_backend={backend}"
        found.append(record(tmp_path / backend, *settings, *SLOW[3:], choice, processes=2)[0])
    for legacy, torchs in zip(*found):
        assert len(legacy) == len(torchs) == 3
        assert any((update["gates"] == 0).any() for update in legacy)
        for one, two in zip(legacy, torchs):
            assert set(one["grads"]) == set(two["grads"])
            assert not [name for name in one["grads"] if "transformer.layers.2." in name and "log_alpha" not in name]
            largest = max(grad.abs().max() for grad in one["grads"].values())
            for name, grad in one["grads"].items():
                assert (two["grads"][name] - grad).abs().max() < 1e-5 * largest, name


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("distributed_training.ddp_backend=fully_sharded", "ddp_backend: fully_sharded, .*expected legacy_ddp"),
        ("distributed_training.ddp_backend=slowmo", "ddp_backend: slowmo, .*expected legacy_ddp"),
        ("optimization.use_bmuf=true", "optimization.use_bmuf: true, .*leave it out"),
    ],
)
def test_backends_that_cannot_train_one_student_are_refused(
    equal: list[str], tmp_path: Path, override: str, value: str
) -> None:
    log = train(tmp_path, "distill", *COMMON, *equal, *SLOW, override, fails=True)
    assert re.search(f"ValueError: .*{value}", log)
    assert "begin training epoch" not in log


MIXED = [
    "dataset.max_tokens=25000",
    "optimization.max_update=100",
    "optimization.max_epoch=3",
    "dataset.validate_interval=1",
    "dataset.validate_interval_updates=0",
    "checkpoint.save_interval_updates=3",
    "checkpoint.keep_interval_updates=-1",
    "task.max_sample_size=16000",
    "task.crop_multiple=1000",
]


@pytest.fixture(scope="module")
def mixed_data(small: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 training utterances, which give an odd number of batches."""
    lengths = [0.3 + 0.07 * i for i in range(13)]
    return small.write_speech(tmp_path_factory.mktemp("mixed"), {"train": lengths, "valid": [0.5, 0.7, 1.1]})


@pytest.fixture(scope="module")
def mixed(
    mixed_data: Path, teacher_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[list[Update]], str, Path]:
    """Three epochs on two ranks."""
    folder = tmp_path_factory.mktemp("mixed_run")
    where = [f"task.data={mixed_data}", f"task.teacher={teacher_file}"]
    return (*record(folder, *where, *MIXED, processes=2), folder)


def by_epoch(updates: list[Update]) -> dict[int, list[list[int]]]:
    """The batches of every epoch."""
    found: dict[int, list[list[int]]] = {}
    for update in updates:
        found.setdefault(update["epoch"], []).extend(update["ids"])
    return found


def test_ranks_hold_equal_parameters_after_every_update_of_several_epochs(mixed: tuple, teacher_file: Path) -> None:
    first, second = mixed[0]
    assert len(first) == len(second) >= 9 and first[-1]["epoch"] == 3
    for one, two in zip(first, second):
        assert set(one["state"]) == set(two["state"])
        for name, tensor in one["state"].items():
            assert torch.equal(tensor, two["state"][name]), name
    changed = [n for n, tensor in first[0]["state"].items() if not torch.equal(tensor, first[-1]["state"][n])]
    assert {"constraint.lambda1", "projections.projections.0.weight"} <= set(changed)
    assert any(name.endswith("log_alpha") for name in changed)
    entries = logged(mixed[1], "train_inner")
    assert [e["num_updates"] for e in entries] == list(range(1, len(first) + 1))
    assert entries[0]["bsz"] == sum(len(ids) for updates in (first, second) for ids in updates[0]["ids"])


def test_every_utterance_is_seen_once_an_epoch_and_no_rank_idles(mixed: tuple, mixed_data: Path, small: Any) -> None:
    task = small.make_task(mixed_data, max_sample_size=16000, crop_multiple=1000, min_sample_size=4000)
    task.load_dataset("train")
    first, second = (by_epoch(updates) for updates in mixed[0])
    orders = []
    for epoch in (1, 2, 3):
        unsplit = len(task.get_batch_iterator(task.dataset("train"), max_tokens=25000, epoch=epoch).frozen_batches)
        batches = [batch for pair in zip(first[epoch], second[epoch]) for batch in pair]
        assert unsplit % 2 == 1  # plain fairseq would have left a rank without
        assert len(first[epoch]) == len(second[epoch]) == (unsplit + 1) // 2
        assert all(batches)
        assert sorted(i for batch in batches for i in batch) == list(range(13))
        orders.append(batches)
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_resumed_in_the_middle_of_an_epoch_it_sees_the_rest_of_it(
    mixed: tuple, mixed_data: Path, teacher_file: Path, tmp_path: Path
) -> None:
    (saved,) = mixed[2].glob("checkpoint_1_3.pt")
    assert len(by_epoch(mixed[0][0])[1]) > 3
    (tmp_path / "checkpoint_last.pt").write_bytes(saved.read_bytes())
    where = [f"task.data={mixed_data}", f"task.teacher={teacher_file}", "optimization.max_epoch=2"]
    resumed, log = record(tmp_path, *MIXED, *where, processes=2)
    assert logged(log, "train_inner")[0]["num_updates"] == 4
    for before, after in zip(mixed[0], resumed):
        until_2 = [update["ids"] for update in before if update["epoch"] <= 2]
        assert [update["ids"] for update in after] == until_2[3:]
        for update, expected in zip(after, before[3:]):
            assert torch.equal(update["gates"][0] > 0, expected["gates"][0] > 0)


@pytest.mark.faults("more processes than utterances", "an error before training says what to change")
def test_more_processes_than_utterances_is_an_error_before_training(
    small: Any, teacher_file: Path, tmp_path: Path
) -> None:
    data = small.write_speech(tmp_path / "data", {"train": [0.5], "valid": [0.5]})
    where = [f"task.data={data}", f"task.teacher={teacher_file}", "distributed_training.distributed_world_size=2"]
    launcher = script(tmp_path / "run", RECORD + RUN, 2)
    log = train(tmp_path / "run", "distill", *COMMON, *SLOW, *where, launcher=launcher, fails=True)
    assert re.search(says("1 utterances", "1 batches", "2 processes"), log)
    assert not list((tmp_path / "run").glob("*.pt"))


@pytest.mark.parametrize(
    ("lambda1", "gate", "name"), [(0.25, 0.0, "lambda1"), (0.0, 0.25, "log_alpha of transformer.layers.1.ffn.gate[7]")]
)
@pytest.mark.faults(
    "gates or multipliers of the ranks drift apart",
    "the next validation ends the run and names the quantity, the rank and both values",
)
def test_validation_ends_a_run_whose_ranks_disagree(
    equal: list[str], tmp_path: Path, lambda1: float, gate: float, name: str
) -> None:
    fields = ["dataset.max_tokens=32000", "dataset.validate_interval_updates=1", "checkpoint.save_interval_updates=0"]
    world = "distributed_training.distributed_world_size=2"
    tamper = TAMPER.replace("LAMBDA1", str(lambda1)).replace("GATE", str(gate))
    launcher = script(tmp_path, RECORD + tamper + RUN, 2)
    log = train(tmp_path, "distill", *COMMON, *equal, *SLOW, *fields, world, launcher=launcher, fails=True)
    for rank in (0, 1):  # the first validation, with equal ranks, passed
        assert len(torch.load(tmp_path / f"rank{rank}.pt")) == 2
    found = re.search(rf"{re.escape(name)}: (\S+) on rank 1, (\S+) on rank 0", log)
    assert found and float(found[1]) - float(found[2]) == pytest.approx(0.25, abs=1e-6)
