"""Numbers on a device against textbook operations in float64 or float32: one row per comparison."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any, Callable, NamedTuple

import torch
import torch.nn.functional as F
from reference import encode
from torch import Tensor

from skill_fairseq.modules.attention_core import attend, expand_offsets
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.training.data_parallel import DistributedByType
from tests.conftest import LARGE_STYLE, random_encoder

UNITS = ["conv", "heads", "ffn", "attention_layers", "ffn_layers"]


class Row(NamedTuple):
    """One comparison: the relative error (of norms) and its limit."""

    name: str
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit  # false for NaN


def distance(found: Any, exact: Any) -> float:
    """Relative distance between lists of tensors, in float64."""
    one, two = (torch.cat([t.detach().double().flatten().cpu() for t in side]) for side in (found, exact))
    return float((one - two).norm() / two.norm())


def gated(style: dict[str, Any], device: str) -> SpeechEncoder:
    encoder = random_encoder(pruning_units=UNITS, **style).train().to(device)
    assert encoder.gates is not None
    with torch.no_grad():
        for gate in encoder.gates.gates:
            values = torch.randn(gate.num_units, generator=torch.Generator().manual_seed(gate.index))
            gate.log_alpha.copy_(1.0 + values if gate.num_units > 1 else values.abs() + 4.0)
    return encoder


def states_and_gradients(
    encoder: SpeechEncoder, autocast: torch.dtype | None = None, forward: Callable[..., Any] = SpeechEncoder.forward
) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states and all gradients for a batch with padding and one draw of the gates."""
    assert encoder.gates is not None
    encoder.gates.generator = torch.Generator().manual_seed(5)
    encoder.zero_grad(set_to_none=True)
    device = encoder.gates.log_alpha.device
    source = torch.randn(3, 8000, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(3, 8000, dtype=torch.bool)
    mask[0, 5000:] = True
    with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        out = forward(encoder, source.masked_fill(mask, 0.0).to(device), mask.to(device))
        wide = (state.to(torch.promote_types(state.dtype, torch.float32)) for state in (*out.hidden_states, out.x))
        states = [F.layer_norm(state, state.shape[-1:]) for state in wide]
    weights = torch.Generator().manual_seed(3)
    sum((s * torch.randn(s.shape, generator=weights).to(device)).mean() for s in states).backward()  # type: ignore[union-attr]
    return states, [p.grad for p in encoder.parameters() if p.grad is not None]


def encoders(device: str) -> Iterator[Row]:
    """Every precision against textbook operations in float64."""
    for style_name, style in (("base", {}), ("large", LARGE_STYLE)):
        encoder = gated(style, device)
        exact = states_and_gradients(copy.deepcopy(encoder).double(), forward=encode)
        found = states_and_gradients(encoder)
        for what, one, two in zip(("states", "gradients"), found, exact):
            yield Row(f"{style_name}: float32, {what}", distance(one, two), 2e-5)
        for dtype, limit in ((torch.bfloat16, 0.03), (torch.float16, 0.004)):
            name = str(dtype).split(".")[1]
            for how in ("autocast", "cast"):
                twin = encoder if how == "autocast" else copy.deepcopy(encoder).to(dtype)
                found = states_and_gradients(twin, dtype if how == "autocast" else None)
                for what, one, two, factor in zip(("states", "gradients"), found, exact, (1, 2)):
                    yield Row(f"{style_name}: {name} by {how}, {what}", distance(one, two), limit * factor)
        if device.startswith("cuda"):
            before = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = True
            found = states_and_gradients(encoder)
            torch.backends.cuda.matmul.allow_tf32 = before
            for what, one, two, limit in zip(("states", "gradients"), found, exact, (4e-3, 8e-3)):
                yield Row(f"{style_name}: TF32, {what}", distance(one, two), limit)


def attention(device: str) -> Iterator[Row]:
    """The device's attention kernel against one matrix, with bias, padding and an utterance without frames."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    batch, heads, frames, dim = 3, 4, 50, 16
    leaves = [draw(batch, heads, frames, dim) for _ in range(3)]
    leaves += [draw(batch, heads, frames, 1), draw(heads, 2 * frames - 1)]
    mask = torch.zeros(batch, frames, dtype=torch.bool, device=device)
    mask[0, 30:] = True
    mask[1] = True
    weights = draw(batch, frames, heads, dim).masked_fill(mask[:, :, None, None], 0.0)

    def run(dtype: torch.dtype, fast: bool) -> list[Tensor]:
        inputs = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        q, k, v, factor, offsets = inputs
        if fast:
            y = attend(q, k, v, factor, offsets, mask)
        else:
            bias = factor * expand_offsets(offsets).flip(-1)
            scores = q @ k.transpose(-1, -2) * dim**-0.5 + bias
            y = scores.masked_fill(mask[:, None, None], torch.finfo(dtype).min).softmax(-1).matmul(v).transpose(1, 2)
        y = y.masked_fill(mask[:, :, None, None], 0.0)
        (y * weights.to(dtype)).sum().backward()
        return [y, *(leaf.grad for leaf in inputs)]  # type: ignore[misc]

    exact = run(torch.float32, fast=False)
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.004)):
        name = str(dtype).split(".")[1]
        found = run(dtype, fast=True)
        finite = all(bool(t.isfinite().all()) for t in found)
        yield Row(f"attention, {name}, outputs and gradients", distance(found, exact) if finite else math.nan, limit)


def one_rank(device: str) -> Iterator[Row]:
    """NCCL (gloo on a CPU) with one rank, through the data-parallel wrapper."""
    backend = "nccl" if device.startswith("cuda") else "gloo"
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    encoder = gated({}, device)
    _, exact = states_and_gradients(encoder)
    exact = [grad.clone() for grad in exact]
    DistributedByType(encoder, torch.distributed.group.WORLD).all_reduce_grads()
    found = [p.grad for p in encoder.parameters() if p.grad is not None]
    torch.distributed.destroy_process_group()
    yield Row(f"{backend} with one rank, gradients", distance(found, exact), 0.0)


def rows(device: str) -> Iterator[Row]:
    """All comparisons."""
    for check in (encoders, attention, one_rank):
        yield from check(device)
