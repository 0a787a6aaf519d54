"""Checks that gates and multipliers are equal on all processes of a run, as data-parallel training requires."""

from __future__ import annotations

from typing import Dict, Optional, Sequence

import torch
from torch import Tensor

from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.pruning.costs import PARAMETERS
from skill_fairseq.pruning.expected import expected_sparsity
from skill_fairseq.pruning.targets import Constraint

TOLERANCE = 1e-5
"""Relative difference that counts as rounding. Ranks with the same gradients do not differ at all."""


@torch.no_grad()
def shared_quantities(encoder: SpeechEncoder, constraint: Optional[Constraint] = None) -> Dict[str, Tensor]:
    """The values that must be equal on every rank, by name, each (n,) float64 on the CPU; empty without gates and
    constraint."""
    found: Dict[str, Tensor] = {}
    if encoder.gates is not None:
        values = encoder.gates.log_alpha.detach().cpu()
        found.update({f"log_alpha of {name}": values[gate.part] for name, gate in encoder.named_gates()})
    if constraint is not None:
        found.update(constraint.named_parameters())  # multipliers
    if encoder.gates is not None:  # follows from the above, but is good to see
        found["expected sparsity"] = torch.tensor(
            expected_sparsity(encoder, cost=constraint.cost if constraint else PARAMETERS)
        )
    return {name: value.detach().reshape(-1).cpu().double() for name, value in found.items()}


def gather(mine: Tensor, device: torch.device) -> Tensor:
    """Gathers every rank's (n,) float64 into (ranks, n) on the CPU; all ranks must call it, with the same n.

    Args:
        device: device that the process group's backend needs: CUDA for nccl, CPU for gloo.
    """
    mine = mine.to(device)
    found = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(found, mine)
    return torch.stack(found).cpu()


def check_agreement(names: Sequence[str], by_rank: Tensor) -> None:
    """Compares every rank with the first, with tolerance ``TOLERANCE`` times the larger of 1 and the first rank's
    value.

    Args:
        names: n quantities.
        by_rank: (ranks, n) float64, their values.

    Raises:
        RuntimeError: names the quantity, the rank and both values.
    """
    # Not (a > b): NaN must count as a difference.
    wrong = ~((by_rank - by_rank[0]).abs() <= TOLERANCE * by_rank[0].abs().clamp(min=1.0))
    if wrong.any():
        column = int(wrong.any(0).nonzero()[0])
        rank = int(wrong[:, column].nonzero()[-1])
        raise RuntimeError(
            f"{names[column]}: {by_rank[rank, column].item()} on rank {rank}, {by_rank[0, column].item()} on rank 0; "
            "expected equal values on all ranks, otherwise each trains a different student. Run the same command again "
            "to resume from the last checkpoint, which all ranks share; if it happens again, check "
            "distributed_training.ddp_backend and the device of that rank"
        )


def check_ranks(encoder: SpeechEncoder, constraint: Optional[Constraint] = None) -> None:
    """Checks that gates and multipliers are equal on all ranks; all ranks must call it. Does nothing for one process.

    Raises:
        RuntimeError: on every rank, if they are not.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if torch.distributed.get_world_size() == 1:
        return
    quantities = shared_quantities(encoder, constraint)
    if quantities:
        names = [
            f"{name}[{i}]" if len(values) > 1 else name
            for name, values in quantities.items()
            for i in range(len(values))
        ]
        check_agreement(names, gather(torch.cat(list(quantities.values())), next(encoder.parameters()).device))
