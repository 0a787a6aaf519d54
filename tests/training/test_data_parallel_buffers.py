"""The data-parallel wrapper sums gradients of each dtype in that dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import nn

from skill_fairseq.training.data_parallel import DistributedByType

pytestmark = pytest.mark.slow


class Mixed(nn.Module):
    """Half-precision weights first, as in a student, then float32 gates."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 5, dtype=torch.float16))
        self.gates = nn.Parameter(torch.ones(7))
        self.multiplier = nn.Parameter(torch.ones(()))


def _reduce(rank: int, file: str, results: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    module = Mixed()
    wrapped = DistributedByType(module, torch.distributed.group.WORLD)
    for update in range(2):
        scale = (rank + 1) * (update + 1)
        module.weight.grad = torch.full((6, 5), scale, dtype=torch.float16)
        module.gates.grad = torch.linspace(1e-9, 1e6, 7) * scale  # float16's range is 6e-8 to 65,504
        module.multiplier.grad = torch.tensor(1 / 3) * scale
        with wrapped.no_sync():
            wrapped.all_reduce_grads()  # an accumulated batch: nothing is summed
        assert module.multiplier.grad == torch.tensor(1 / 3) * scale
        wrapped.all_reduce_grads()
    results.put((rank, {name: p.grad.tolist() for name, p in module.named_parameters()}))
    torch.distributed.destroy_process_group()


def test_each_type_in_itself(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (str(tmp_path / "meet"), results)
    processes = [context.Process(target=_reduce, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    mean = 3.0  # of 2 and 4
    for grads in found.values():
        assert grads["weight"] == [[mean] * 5] * 6
        assert grads["gates"] == pytest.approx((torch.linspace(1e-9, 1e6, 7) * mean).tolist(), rel=1e-6)
        assert grads["multiplier"] == pytest.approx(mean / 3, rel=1e-7)
