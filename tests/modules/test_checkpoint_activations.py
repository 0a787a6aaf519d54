"""Activation checkpointing: the same gradients, with less memory for the backward pass."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
from torch import Tensor

from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.transformer import Dropouts
from tests.conftest import LARGE_STYLE, random_encoder
from tests.modules.test_fast_path import UNITS, batch, set_gates

STYLES: dict[str, dict[str, Any]] = {
    "wavlm": {},
    "large": LARGE_STYLE,
    "hubert": {"relative_position": False},
    "shrunk": {"heads": [[0, 2], [], [1]], "ffn_dims": [5, None, 0], "conv_channels": [16, 16, 16, 16, 16, 16, 9]},
}
ALL = Dropouts(hidden=0.2, attention=0.2, activation=0.2, input=0.1, layerdrop=0.3)


def train_once(
    encoder: SpeechEncoder, checkpointing: bool, padded: bool = True, openness: float | None = None
) -> tuple[Tensor, dict[str, Tensor], int]:
    """Output, gradients and bytes kept for the backward pass of one forward, from equal random states."""
    torch.manual_seed(0)
    np.random.seed(0)
    if openness is not None:
        set_gates(encoder, openness).manual_seed(7)
    encoder.train().zero_grad(set_to_none=True)
    encoder.transformer.checkpoint_activations = checkpointing
    source, mask = batch(torch.float32)
    kept = 0

    def note(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = encoder(source, mask if padded else None)
    sum(state.square().mean() for state in out.hidden_states).backward()  # type: ignore[union-attr]
    return out.x.detach(), {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}, kept


@pytest.mark.parametrize("openness", [None, 2.0, -1.0, -9.0])
@pytest.mark.parametrize("style", STYLES)
def test_gradients_are_the_same_bit_for_bit(style: str, openness: float | None) -> None:
    whole = random_encoder(**STYLES[style], pruning_units=[] if openness is None else UNITS)
    encoder = SpeechEncoder(whole.config, ALL)
    encoder.load_state_dict(whole.state_dict())
    state, gradients, kept = train_once(encoder, False, openness=openness)
    again, found, less = train_once(encoder, True, openness=openness)
    assert torch.equal(state, again)
    assert gradients.keys() == found.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, found[name]), name
    assert less < kept


def test_layers_keep_their_inputs_alone() -> None:
    encoder = random_encoder(encoder_layers=6, conv_feature_layers="[(4,10,5)] + [(4,3,2)] * 4 + [(4,2,2)] * 2")
    _, _, kept = train_once(encoder, False)
    _, _, less = train_once(encoder, True)
    frames, width = 3 * 20, encoder.config.encoder_embed_dim
    # Convolutions and the states' means keep the rest; a layer kept more than ten times its input.
    assert kept - less > 6 * 10 * 4 * frames * width


def test_nothing_is_computed_twice_without_gradients() -> None:
    encoder = random_encoder().train()
    encoder.transformer.checkpoint_activations = True
    calls: list[int] = []
    for i, layer in enumerate(encoder.transformer.layers):
        layer.attention_norm.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    source, _ = batch(torch.float32)
    with torch.no_grad():
        encoder(source)
    assert calls == [0, 1, 2]
    encoder(source).x.sum().backward()
    assert sorted(calls[3:]) == [0, 0, 1, 1, 2, 2]


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for checkpointing in (False, True):
        encoder = random_encoder(pruning_units=UNITS).train()
        encoder.transformer.checkpoint_activations = checkpointing
        set_gates(encoder, -1.0).manual_seed(7)
        model = torch.nn.parallel.DistributedDataParallel(encoder)
        source, _ = batch(torch.float32)
        out = model(source[rank : rank + 1])
        sum(state.square().mean() for state in out.hidden_states).backward()  # type: ignore[union-attr]
        found[checkpointing] = {n: p.grad for n, p in encoder.named_parameters()}
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads may abort a normal exit


@pytest.mark.slow
def test_with_data_parallel_training(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, gradient in found[False].items():
            assert torch.equal(gradient, found[True][name]), name
