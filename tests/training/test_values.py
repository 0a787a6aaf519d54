"""Unusable numbers are refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from messages import says

from skill_fairseq.training.values import check_values

CFG: dict[str, Any] = {
    "criterion": {"l1_weight": 1.0, "groups": [[0], [1]], "groups_file": None},
    "model": {"dropout": 0.1, "checkpoint_activations": False, "seed": 1},
    "optimization": {"lr": [0.001], "update_freq": [1], "clip_norm": 10.0, "max_update": 10},
    "optimizer": {"groups": {"default": {"lr_float": 0.001}, "gates": {"lr_float": None, "lr": [0.02]}}},
    "checkpoint": {"save_interval": 10**40},  # not looked at
}


def changed(**values: Any) -> dict[str, Any]:
    cfg = copy.deepcopy(CFG)
    for name, value in values.items():
        *path, last = name.split("__")
        block = cfg
        for part in path:
            block = block[part]
        block[last] = value
    return cfg


def test_ordinary_values_pass() -> None:
    check_values(CFG)
    check_values(changed(optimization__lr=[0.02]))  # the rate of another group
    check_values(changed(optimization__lr=[0.25]))  # fairseq's default, so it was not set
    check_values({**CFG, "optimizer": {"_name": "adam", "adam_betas": "(0.9,0.98)"}})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e308])
@pytest.mark.parametrize("field", ["criterion.l1_weight", "model.dropout", "optimizer.groups.gates.lr_float"])
def test_numbers_that_are_not_finite_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=says(field, value, "finite")):
        check_values(changed(**{field.replace(".", "__"): value}))


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("optimization__lr", [float("nan")], ["optimization.lr[0]", "nan"]),
        ("optimization__lr", [-0.1], ["optimization.lr[0]", -0.1, "at least 0"]),
        ("optimization__update_freq", [0], ["optimization.update_freq[0]: 0", "at least 1"]),
        ("optimization__clip_norm", -1.0, ["optimization.clip_norm", -1.0, "at least 0"]),
        (
            "optimizer__groups__gates__lr_float",
            ".nan",
            ["optimizer.groups.gates.lr_float", "'.nan'", "number"],
        ),
        ("optimization__max_update", -1, ["optimization.max_update", -1, "at least 0"]),
    ],
)
def test_ranges(field: str, value: Any, named: list) -> None:
    with pytest.raises(ValueError, match=says(*named)):
        check_values(changed(**{field: value}))


def test_a_learning_rate_that_no_group_has_is_refused() -> None:
    remedy = "optimizer.groups.default.lr_float=0.3"
    with pytest.raises(ValueError, match=says("optimization.lr", "[0.3]", 0.001, 0.02, remedy)):
        check_values(changed(optimization__lr=[0.3]))
