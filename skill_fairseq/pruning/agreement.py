"""Whether all processes of a run hold the same gates and multipliers, as data-parallel training must keep them."""

from __future__ import annotations

from typing import Dict, List, Optional

import torch
from torch import Tensor

from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.pruning.expected import expected_parameters, full_parameters
from skill_fairseq.pruning.lagrangian import SizeConstraint

TOLERANCE = 1e-6
"""Relative difference that is still rounding. Ranks that get the same gradients do not differ at all."""


@torch.no_grad()
def shared_quantities(encoder: SpeechEncoder, constraint: Optional[SizeConstraint] = None) -> Dict[str, float]:
    """What must be equal on every rank, by name; empty without gates and constraint.

    A gate's ``log_alpha`` is summed up in one number, its mean with weights that rise from 1 to 2: no single unit
    can differ, and no two can be exchanged, without it.
    """
    found: Dict[str, float] = {}
    gates = dict(encoder.named_gates())
    if gates:
        found["expected sparsity"] = 1 - float(expected_parameters(encoder)) / full_parameters(encoder.config)
    if constraint is not None:
        found["lambda1"] = constraint.lambda1.item()
        found["lambda2"] = constraint.lambda2.item()
    for name, gate in gates.items():
        values = gate.log_alpha.detach().double().cpu()
        found[f"log_alpha of {name}"] = float((values * torch.linspace(1, 2, len(values), dtype=torch.float64)).mean())
    return found


def gather(values: List[float], device: torch.device) -> Tensor:
    """Every rank's values, (ranks, len(values)) float64 on the CPU; called by all ranks together.

    Args:
        values: as many on every rank.
        device: where the process group's backend wants its tensors: CUDA for nccl, CPU for gloo.
    """
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    found = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(found, mine)
    return torch.stack(found).cpu()


def check_agreement(quantities: Dict[str, float], by_rank: Tensor, tolerance: float = TOLERANCE) -> None:
    """Compares every rank with the first.

    Args:
        quantities: of this rank; only the names are looked at.
        by_rank: (ranks, len(quantities)) float64, see :func:`gather`.
        tolerance: relative to the larger of 1 and the first rank's value.

    Raises:
        RuntimeError: names the rank, the quantity and both values.
    """
    for column, name in enumerate(quantities):
        first = by_rank[0, column].item()
        for rank, value in enumerate(by_rank[:, column].tolist()):
            # Not (a > b): NaN is a disagreement too.
            if not abs(value - first) <= tolerance * max(1.0, abs(first)):
                raise RuntimeError(
                    f"{name}: {value!r} on rank {rank}, {first!r} on rank 0; expected equal values on all ranks, "
                    "otherwise each trains a student of its own. The same command goes on from the last checkpoint, "
                    "which all ranks share; should it happen again, look at distributed_training.ddp_backend and at "
                    "the device of that rank"
                )


def check_ranks(encoder: SpeechEncoder, constraint: Optional[SizeConstraint] = None) -> None:
    """Makes sure that gates and multipliers are equal on all ranks; called by all together, nothing for one process.

    Raises:
        RuntimeError: on every rank, if they are not.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if torch.distributed.get_world_size() == 1:
        return
    quantities = shared_quantities(encoder, constraint)
    if quantities:
        check_agreement(quantities, gather(list(quantities.values()), next(encoder.parameters()).device))
