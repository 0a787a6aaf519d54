"""Reading numbers from fairseq's log."""

from __future__ import annotations

import math
from pathlib import Path

from skill_fairseq.reporting.training_log import parse_log, read_log, series
from skill_fairseq.reporting.training_section import terms

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
    found = parse_log(SIMPLE.splitlines())
    assert [entry["num_updates"] for entry in found["train_inner"]] == [10, 30]
    first = found["train_inner"][0]
    assert (first["distillation_loss"], first["expected_sparsity"], first["lambda1"]) == (-0.892, 2.1e-05, -0.0226)
    assert first["wps"] == 719671 and first["train_wall"] == 2 and first["gnorm"] == math.inf
    assert found["train"] == [{"distillation_loss": -0.8, "train_wall": 5, "num_updates": 24, "wall": 9}]
    assert found["valid"] == [{"loss": -0.71, "distillation_loss": -0.71, "num_updates": 30}]


def test_json_format() -> None:
    found = parse_log(JSON.splitlines())
    (first,) = found["train_inner"]
    assert math.isnan(first.pop("gnorm"))
    assert first == {"update": 0.083, "distillation_loss": -0.8, "num_updates": 1}
    assert found["valid"] == [{"distillation_loss": -0.7, "num_updates": 4, "bsz": 2}]
    assert found["train"][0]["train_wall"] == 1 and found["train"][0]["num_updates"] == 12


def test_fairseq_train_without_hydra() -> None:
    assert parse_log(PLAIN.splitlines())["train_inner"] == [{"loss": 1.5, "num_updates": 5}]


def test_after_an_interruption_the_later_numbers_stay() -> None:
    line = "[t][train_inner][INFO] - epoch 001: 1 / 9 loss={}, num_updates={}\n"
    before = "".join(line.format(update, update) for update in (10, 20, 30))
    after = "".join(line.format(update + 0.5, update) for update in (20, 40))
    found = parse_log((before + after).splitlines())["train_inner"]
    assert [(e["num_updates"], e["loss"]) for e in found] == [(10, 10), (20, 20.5), (40, 40.5)]


def test_series_skips_entries_without_the_name_or_a_finite_number() -> None:
    entries = parse_log(SIMPLE.splitlines())["train_inner"]
    assert series(entries, "l1_g0") == ([10.0], [0.1056]) and series(entries, "expected_sparsity")[1] == [2.1e-05, 0.5]
    assert series(entries, "gnorm") == ([], [])


def test_what_is_no_entry_is_passed_over() -> None:
    """An update that is not a number, lists instead of numbers, endlessly nested JSON, a line of a megabyte."""
    start = "[t][train_inner][INFO] - "
    deep = '{"num_updates": ' * 5000
    lines = ["epoch 1: loss=1, num_updates=nan", '{"num_updates": [1]}', deep, "num_updates=1 " + "a" * 1_000_000]
    assert parse_log(start + line for line in lines) == {"train_inner": [], "train": [], "valid": []}
    assert parse_log([start + '{"num_updates": "3", "loss": [1], "b": null}'])["train_inner"] == [{"num_updates": 3}]


def test_long_words_cost_no_more_than_short_ones() -> None:
    """Parts of a word of n letters are not tried as names: n^2 steps, here 10^10, would take forever."""
    line = "[t][train_inner][INFO] - num_updates=1 " + "a" * 99_000
    assert len(parse_log([line] * 20)["train_inner"]) == 1


def test_the_log_of_a_folder(tmp_path: Path) -> None:
    """Other files are not read: submit.sh keeps the output of all steps as logs/*.log, and copies may be anywhere."""
    nothing = {"train_inner": [], "train": [], "valid": []}
    assert read_log(tmp_path) == nothing
    (tmp_path / "stage1.log").write_text(PLAIN)
    assert read_log(tmp_path) == nothing
    (tmp_path / "log").write_text(SIMPLE)
    (tmp_path / "hydra_train.log").write_text("nothing here\n")
    assert len(read_log(tmp_path)["train_inner"]) == 2


def test_distances_are_found_by_objective_and_pair() -> None:
    names = ["l1_g0", "l1_g1", "cos_g0", "skill_l1_g0", "predict_mse_s2_t12", "predict_mse_s2_t4", "predict_loss"]
    entries = [{"num_updates": 1.0, **{name: 0.5 for name in names}}]
    assert terms(entries) == {
        ("", "l1"): {"group 0": "l1_g0", "group 1": "l1_g1"},
        ("skill", "l1"): {"group 0": "skill_l1_g0"},
        ("predict", "mse"): {"layer 2 to 12": "predict_mse_s2_t12", "layer 2 to 4": "predict_mse_s2_t4"},
    }
