"""Numbers out of fairseq's log."""

from __future__ import annotations

from pathlib import Path

from skill_fairseq.reporting.training_log import parse_log, read_log, series

HYDRA = "[2026-11-25 04:10:10,193]"
SIMPLE = f"""{HYDRA}[fairseq_cli.train][INFO] - {{'_name': None, 'common': {{'log_interval': 10}}}}
{HYDRA}[train_inner][INFO] - epoch 001:     10 / 24 distillation_loss=-0.892, l1_g0=0.1056, expected_sparsity=2.1e-05, \
lambda1=-0.0226, wps=719671, num_updates=10, lr_default=0.00036, gnorm=inf, clip=0, train_wall=2, wall=3
{HYDRA}[train][INFO] - epoch 001 | distillation_loss -0.8 | train_wall 5 | num_updates 24 | wall 9
{HYDRA}[train_inner][INFO] - epoch 002:      6 / 24 distillation_loss=-0.9, expected_sparsity=0.5, num_updates=30
{HYDRA}[valid][INFO] - epoch 002 | valid on 'valid' subset | loss -0.71 | distillation_loss -0.71 | num_updates 30
"""
JSON = f"""{HYDRA}[train_inner][INFO] - {{"epoch": 1, "update": 0.083, "distillation_loss": "-0.8", \
"num_updates": "1", "gnorm": "nan"}}
{HYDRA}[valid][INFO] - {{"epoch": 1, "valid_distillation_loss": "-0.7", "valid_num_updates": "4", "valid_bsz": "2"}}
{HYDRA}[train][INFO] - {{"epoch": 1, "train_num_updates": "12", "train_train_wall": "1"}}
{HYDRA}[train_inner][INFO] - {{"epoch": 1, "distillation_lo
"""
PLAIN = "2026-11-25 04:10:10 | INFO | train_inner | epoch 001:  5 / 24 loss=1.5, num_updates=5\n"


def test_simple_format() -> None:
    found = parse_log(SIMPLE)
    assert [entry["num_updates"] for entry in found["train_inner"]] == [10, 30]
    first = found["train_inner"][0]
    assert (first["distillation_loss"], first["expected_sparsity"], first["lambda1"]) == (-0.892, 2.1e-05, -0.0226)
    assert first["wps"] == 719671 and first["train_wall"] == 2 and "gnorm" not in first
    assert found["train"] == [{"distillation_loss": -0.8, "train_wall": 5, "num_updates": 24, "wall": 9}]
    assert found["valid"] == [{"loss": -0.71, "distillation_loss": -0.71, "num_updates": 30}]


def test_json_format() -> None:
    found = parse_log(JSON)
    assert found["train_inner"] == [{"update": 0.083, "distillation_loss": -0.8, "num_updates": 1}]
    assert found["valid"] == [{"distillation_loss": -0.7, "num_updates": 4, "bsz": 2}]
    assert found["train"][0]["train_wall"] == 1 and found["train"][0]["num_updates"] == 12


def test_fairseq_train_without_hydra() -> None:
    assert parse_log(PLAIN)["train_inner"] == [{"loss": 1.5, "num_updates": 5}]


def test_after_an_interruption_the_later_numbers_stay() -> None:
    line = "[t][train_inner][INFO] - epoch 001: 1 / 9 loss={}, num_updates={}\n"
    before = "".join(line.format(update, update) for update in (10, 20, 30))
    after = "".join(line.format(update + 0.5, update) for update in (20, 40))
    found = parse_log(before + after)["train_inner"]
    assert [(e["num_updates"], e["loss"]) for e in found] == [(10, 10), (20, 20.5), (40, 40.5)]


def test_series_skips_entries_without_the_name() -> None:
    entries = parse_log(SIMPLE)["train_inner"]
    assert series(entries, "l1_g0") == ([10.0], [0.1056]) and series(entries, "expected_sparsity")[1] == [2.1e-05, 0.5]


def test_the_log_of_a_folder(tmp_path: Path) -> None:
    assert read_log(tmp_path) == {"train_inner": [], "train": [], "valid": []}
    (tmp_path / "other.log").write_text(PLAIN)
    assert read_log(tmp_path)["train_inner"][0]["loss"] == 1.5
    (tmp_path / "log").write_text(SIMPLE)
    (tmp_path / "hydra_train.log").write_text("nothing here\n")
    assert len(read_log(tmp_path)["train_inner"]) == 2
