"""TF32: what may use it, and what stays float32. The settings are visible without a GPU."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from skill_fairseq.modules import conv_stack
from skill_fairseq.modules.hard_concrete import GPU_MULTIPLE, multiple_on, open_units
from skill_fairseq.modules.tf32 import allow_tf32, exact_products
from tests.conftest import random_encoder

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_both_kinds_of_product_follow() -> None:
    for allowed in (True, False):
        allow_tf32(allowed)
        assert torch.backends.cuda.matmul.allow_tf32 is allowed
        assert torch.backends.cudnn.allow_tf32 is allowed


def test_exact_products_whatever_is_allowed() -> None:
    allow_tf32(True)
    with pytest.raises(KeyError), exact_products(GPU):
        assert not torch.backends.cuda.matmul.allow_tf32
        raise KeyError
    assert torch.backends.cuda.matmul.allow_tf32
    with exact_products(CPU):
        assert torch.backends.cuda.matmul.allow_tf32  # irrelevant on a CPU
    allow_tf32(False)
    with exact_products(GPU):
        assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_threads_do_not_take_over_each_others_setting() -> None:
    allow_tf32(True)

    def work() -> None:
        for _ in range(300):
            with exact_products(GPU):
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.backends.cuda.matmul.allow_tf32


def test_the_first_convolution_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[str] = []

    @contextlib.contextmanager
    def noted(device: torch.device) -> Iterator[None]:
        inside.append("in")
        yield
        inside.append("out")

    monkeypatch.setattr(conv_stack, "exact_products", noted)
    for name in ("bmm", "baddbmm"):
        product = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, f=product, **k: (inside.append("product"), f(*a, **k))[1])
    random_encoder(encoder_layers=1).feature_extractor(torch.randn(1, 4000))
    assert inside == ["in", "product", "out"]


@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize("field", [True, False, None])
def test_the_tasks_field_acts_on_gpus_alone(field: Any, cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from fairseq.trainer import Trainer

    from skill_fairseq.tasks.skill_distillation import SkillDistillationConfig
    from skill_fairseq.training import trainer

    assert SkillDistillationConfig().tf32 is True

    class Far(Exception):
        """The constructor got as far as this test needs."""

    def stop(*_: Any) -> None:
        raise Far

    monkeypatch.setattr(Trainer, "__init__", lambda self, *_: setattr(self, "cuda", cuda))
    monkeypatch.setattr(trainer, "check_backend", lambda *_: None)
    monkeypatch.setattr(trainer, "check_memory_efficient", lambda *_: None)
    monkeypatch.setattr(trainer.SkillTrainer, "_on_first_rank", stop)
    found: list[bool] = []
    monkeypatch.setattr(trainer, "allow_tf32", found.append)
    task = SimpleNamespace() if field is None else SimpleNamespace(tf32=field)  # another task has no such field
    cfg = SimpleNamespace(
        task=task,
        common=SimpleNamespace(fp16=False, bf16=False),
        distributed_training=SimpleNamespace(ddp_backend="legacy_ddp"),
        optimization=SimpleNamespace(use_bmuf=False),
    )
    with pytest.raises(Far):
        trainer.SkillTrainer(cfg, None, torch.nn.Identity(), None)
    assert found == ([field] if cuda and field is not None else [])


def test_widths_are_whole_tiles_on_a_gpu_alone() -> None:
    assert [multiple_on(CPU, own) for own in (1, 8, 16)] == [1, 8, 16]
    assert [multiple_on(GPU, own) for own in (1, 8, 16, 128)] == [1, GPU_MULTIPLE, GPU_MULTIPLE, 128]
    is_open = torch.zeros(512, dtype=torch.bool)
    is_open[::5] = True  # 103 of them
    index = open_units(is_open, multiple_on(GPU, 8))
    assert index is not None and len(index) == 128 and is_open[index].sum() == 103
    is_open[:400] = True
    assert open_units(is_open, multiple_on(GPU, 8)).numel() == 448  # type: ignore[union-attr]
    is_open[:460] = True
    assert open_units(is_open, multiple_on(GPU, 8)) is None  # slicing does not pay: all, times 0
    assert open_units(torch.ones(48, dtype=torch.bool), multiple_on(GPU, 16)) is None
