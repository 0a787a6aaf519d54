"""The encoder against textbook operations: outputs, and the gradient of every weight and gate."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
import torch.multiprocessing
from reference import encode
from torch import Tensor

from skill_fairseq.modules import attention_core, conv_stack
from skill_fairseq.modules.encoder import EncoderOutput, SpeechEncoder
from skill_fairseq.modules.hard_concrete import open_units
from tests.conftest import LARGE_STYLE, random_encoder

STYLES: dict[str, dict[str, Any]] = {
    "wavlm_base": {},
    "hubert_base": {"relative_position": False},
    "wavlm_large": LARGE_STYLE,
    "hubert_large": {**LARGE_STYLE, "relative_position": False},
    "hubert_base_without_feature_norm": {"relative_position": False, "feature_layer_norm": False},
    "thin_without_feature_linear": {
        "conv_feature_layers": "[(8,10,5), (16,1,1)] + [(16,3,2)] * 4 + [(32,1,1)] + [(32,2,2)] * 2",
        "feature_linear": False,
    },
    "base_with_conv_bias_and_relu": {"conv_bias": True, "activation_fn": "relu"},
    "fithubert": {"relative_position": False, "time_reduction": 2},
    "armhubert": {"relative_position": False, "reuse_attention": [2]},
    "both_with_relative_position": {**LARGE_STYLE, "time_reduction": 3, "reuse_attention": [2, 3]},
    "data2vec_base": {"extractor_mode": "layer_norm", "relative_position": False, "pos_conv_depth": 3},
}
SHRUNK: dict[str, dict[str, Any]] = {
    "shrunk_base": {"heads": [[0, 2], [], None], "ffn_dims": [5, None, 0], "conv_channels": [16, 9, 16, 16, 4, 16, 11]},
    "shrunk_large": {**LARGE_STYLE, "heads": [None, [3], []], "ffn_dims": [0, 48, None], "conv_channels": [9] * 7},
}
UNITS = ["conv", "heads", "ffn", "attention_layers", "ffn_layers"]


def units_of(style: dict[str, Any]) -> list[str]:
    """The units that an encoder of this style can gate."""
    return [unit for unit in UNITS if not style.get("reuse_attention") or unit in ("conv", "ffn", "ffn_layers")]


def set_gates(encoder: SpeechEncoder, openness: float, seed: int = 1) -> torch.Generator:
    """Gates around a log_alpha, and one generator for their noise."""
    generator = torch.Generator()
    values = torch.Generator().manual_seed(seed)
    assert encoder.gates is not None
    encoder.gates.generator = generator
    for name, gate in encoder.named_gates():
        with torch.no_grad():
            middle = max(openness, -2.0) if name.startswith("feature_extractor.") else openness
            gate.log_alpha.copy_(middle + torch.randn(gate.num_units, generator=values))
    return generator


def run(
    encoder: SpeechEncoder,
    source: Tensor,
    padding_mask: Tensor | None,
    generator: torch.Generator | None,
    forward: Callable[..., EncoderOutput] = SpeechEncoder.forward,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Hidden states and gradients of a loss with a different weight for every number of every state."""
    encoder.zero_grad(set_to_none=True)
    if generator is not None:
        generator.manual_seed(7)
    out = forward(encoder, source, padding_mask)
    weights = torch.Generator().manual_seed(3)
    states = [*out.hidden_states, out.x]
    sum((s * torch.randn(s.shape, generator=weights, dtype=s.dtype)).sum() for s in states).backward()  # type: ignore[union-attr]
    return [s.detach() for s in states], {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}


def batch(dtype: torch.dtype, samples: int = 6543) -> tuple[Tensor, Tensor]:
    """(3, N) noise, the first utterance padded; and its mask."""
    source = torch.randn(3, samples, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = torch.zeros(3, samples, dtype=torch.bool)
    mask[0, samples * 2 // 3 :] = True
    return source.masked_fill(mask, 0.0), mask


@pytest.mark.parametrize("padded, training", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("openness", [None, 3.0, -1.0, -4.0, -9.0])
@pytest.mark.parametrize("style", {**STYLES, **SHRUNK})
def test_same_outputs_and_gradients(style: str, openness: float | None, padded: bool, training: bool) -> None:
    gated = openness is not None
    shape = {**STYLES, **SHRUNK}[style]
    encoder = random_encoder(**shape, pruning_units=units_of(shape) if gated else [])
    encoder = encoder.double().train(training)
    generator = set_gates(encoder, openness) if openness is not None else None
    source, mask = batch(torch.float64)
    states, gradients = run(encoder, source, mask if padded else None, generator)
    plain_states, plain_gradients = run(encoder, source, mask if padded else None, generator, encode)
    for state, plain in zip(states, plain_states):
        torch.testing.assert_close(state, plain, rtol=1e-10, atol=1e-10)
    assert gradients.keys() >= plain_gradients.keys()
    # Gates are float32, and their gradients are rounded to that.
    for name, gradient in gradients.items():
        rounding = 2e-6 if name.endswith("log_alpha") else 1e-9
        plain = plain_gradients.get(name, torch.zeros_like(gradient))  # none of a norm before a bias alone
        assert (gradient - plain).abs().max() <= rounding * plain.abs().max().clamp(min=1.0), name


@pytest.mark.parametrize("style", STYLES)
def test_in_float32_to_1e_5(style: str) -> None:
    encoder = random_encoder(**STYLES[style], pruning_units=units_of(STYLES[style])[:3]).train()
    generator = set_gates(encoder, 0.0)
    source, _ = batch(torch.float32)
    states, gradients = run(encoder, source, None, generator)
    plain_states, plain_gradients = run(encoder, source, None, generator, encode)
    for state, plain in zip(states, plain_states):
        assert (state - plain).abs().max() <= 1e-5 * plain.abs().max()
    whole = torch.cat([g.flatten() for g in plain_gradients.values()])
    difference = torch.cat([(g - plain_gradients[n]).flatten() for n, g in gradients.items()])
    assert difference.norm() <= 1e-5 * whole.norm()


def test_closed_units_are_left_out_and_get_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = random_encoder(pruning_units=["conv", "heads", "ffn"]).train()
    generator = set_gates(encoder, -1.5)
    widths: list[tuple[int, int]] = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, w, b=None: (widths.append((w.size(0), w.size(1))), linear(x, w, b))[1]
    )
    source, _ = batch(torch.float32)
    _, gradients = run(encoder, source, None, generator)
    monkeypatch.undo()
    generator.manual_seed(7)
    assert encoder.gates is not None
    draw = encoder.gates.draw()
    samples = {name: draw.z[gate.part] for name, gate in encoder.named_gates()}
    of_gates = {name: gate.grad for name, gate in encoder.named_gates()}
    for i, layer in enumerate(encoder.transformer.layers):
        prefix = f"transformer.layers.{i}"
        units = samples[f"{prefix}.ffn.gate"]
        open_ones = int((units > 0).sum())
        assert 0 < open_ones < units.numel()
        assert (-(-open_ones // 16) * 16, 32) in widths  # fc1 with only the open units, rounded up
        closed = units == 0
        assert not gradients[f"{prefix}.ffn.fc1.weight"][closed].any()
        assert not gradients[f"{prefix}.ffn.fc2.weight"][:, closed].any()
        assert gradients[f"{prefix}.ffn.fc1.weight"][~closed].abs().sum(1).min() > 0
        assert not of_gates[f"{prefix}.ffn.gate"][closed].any()  # type: ignore[index]
        heads = samples[f"{prefix}.attention.gate"] == 0
        assert layer.attention is not None
        assert not gradients[f"{prefix}.attention.q_proj.weight"].unflatten(0, (4, -1))[heads].any()
        assert not gradients[f"{prefix}.attention.position_gate.grep_a"][0, heads].any()
    for i in range(7):
        closed = samples[f"feature_extractor.layers.{i}.gate"] == 0
        assert closed.any()
        assert not gradients[f"feature_extractor.layers.{i}.conv.weight"][closed].any()


def test_which_units_are_computed() -> None:
    mask = torch.zeros(100, dtype=torch.bool)
    mask[[3, 50, 99]] = True
    assert open_units(mask).tolist() == [3, 50, 99]  # type: ignore[union-attr]
    assert open_units(mask, 8).tolist() == [0, 1, 2, 3, 4, 5, 50, 99]  # type: ignore[union-attr]
    assert open_units(torch.zeros(5, dtype=torch.bool)).tolist() == [0]  # type: ignore[union-attr]
    assert open_units(torch.ones(5, dtype=torch.bool)) is None
    mask[:90] = True
    assert open_units(mask) is None  # slicing would cost more than it saves


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("samples", [400, 719, 720, 5000, 16321])
def test_inference_in_chunks(style: str, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_stack, "CHUNK_FRAMES", 7)
    encoder = random_encoder(**STYLES[style]).double()
    source, mask = batch(torch.float64, max(samples, encoder.config.receptive_field))
    with torch.no_grad():
        out = encoder(source, mask)
        plain = encode(encoder, source, mask)
    assert out.x.shape == plain.x.shape
    for state, reference in zip(out.hidden_states, plain.hidden_states):
        torch.testing.assert_close(state, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("relative_position", [True, False])
def test_no_matrix_over_pairs_of_frames_is_kept(relative_position: bool) -> None:
    encoder = random_encoder(relative_position=relative_position, pruning_units=UNITS[:3]).train()
    for module in encoder.modules():
        if hasattr(module, "head_dim"):
            module.dropout = 0.1  # type: ignore[assignment]
    frames = 600
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    layer, table = encoder.transformer.layers[0], encoder.transformer.relative_position
    frames_in = torch.randn(1, frames, 32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(frames_in, None if table is None else table(frames)).sum().backward()
    assert max(kept) < frames * frames


def test_prepared_weights_are_forgotten_when_weights_change() -> None:
    encoder = random_encoder()
    source = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    other = random_encoder(seed=1)
    with torch.no_grad():
        before, wanted = encoder(source).x, other(source).x
        assert torch.equal(encoder.prepare()(source).x, before)
        assert torch.equal(copy.deepcopy(encoder)(source).x, before)
        encoder.load_state_dict(other.state_dict())
        assert torch.equal(encoder(source).x, wanted)
        encoder.load_state_dict(random_encoder().state_dict())
        encoder.prepare()
        encoder.feature_extractor.layers.load_state_dict(other.feature_extractor.layers.state_dict())
        fresh = copy.deepcopy(encoder)
        assert torch.equal(encoder(source).x, fresh(source).x) and not torch.equal(fresh(source).x, before)
        encoder.load_state_dict(other.state_dict())
        encoder.prepare().train()
        for parameter, new in zip(encoder.parameters(), random_encoder().parameters()):
            parameter.data.copy_(new)
        assert torch.equal(encoder.eval()(source).x, before)
        doubled = encoder.prepare().double()
        assert doubled(source.double()).x.dtype == torch.float64
        torch.testing.assert_close(doubled(source.double()).x.float(), before)


def test_prepared_encoders_still_have_gradients() -> None:
    encoder = random_encoder()
    source, _ = batch(torch.float32)
    _, wanted = run(encoder, source, None, None)
    _, gradients = run(encoder.prepare(), source, None, None)
    assert gradients.keys() == wanted.keys() and all(torch.equal(gradients[n], wanted[n]) for n in wanted)


def _worker(rank: int, folder: str) -> None:
    """One of two data-parallel processes with its half of the batch; saves the reduced gradients."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    encoder = random_encoder(pruning_units=UNITS).double().train()
    generator = set_gates(encoder, -1.0)
    generator.manual_seed(7)  # the same gates on both
    model = torch.nn.parallel.DistributedDataParallel(encoder)  # fails if a parameter gets no gradient
    source, _ = batch(torch.float64)
    out = model(source[rank : rank + 1])
    sum(state.square().mean() for state in out.hidden_states).backward()  # type: ignore[union-attr]
    torch.save({n: p.grad for n, p in encoder.named_parameters()}, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads may abort a normal exit


@pytest.mark.slow
def test_data_parallel_gradients_are_those_of_textbook_operations(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    encoder = random_encoder(pruning_units=UNITS).double().train()
    generator = set_gates(encoder, -1.0)
    source, _ = batch(torch.float64)
    for rank in range(2):
        generator.manual_seed(7)
        out = encode(encoder, source[rank : rank + 1])
        (sum(state.square().mean() for state in out.hidden_states) / 2).backward()  # type: ignore[union-attr]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, parameter in encoder.named_parameters():
            wanted = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            assert (found[name] - wanted).abs().max() <= 2e-6 * max(1.0, float(wanted.abs().max())), name


def test_block_size_of_attention_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = random_encoder().double().train()
    source, mask = batch(torch.float64)
    states, gradients = run(encoder, source, mask, None)
    monkeypatch.setattr(attention_core, "BLOCK_QUERIES", 3)
    monkeypatch.setattr(attention_core, "BLOCK_SCORES", 50)
    blocked, blocked_gradients = run(encoder, source, mask, None)
    for state, wanted in zip(blocked, states):
        torch.testing.assert_close(state, wanted, rtol=1e-12, atol=1e-12)
    for name, wanted in gradients.items():
        torch.testing.assert_close(blocked_gradients[name], wanted, rtol=1e-9, atol=1e-9, msg=name)


def test_an_utterance_without_a_frame_gives_no_nan() -> None:
    """With transformers' padding rule 300 samples give no frame: every key of that utterance is masked."""
    encoder = random_encoder(padding_rule="convolution").train()
    source, mask = torch.randn(2, 4000), torch.zeros(2, 4000, dtype=torch.bool)
    mask[0, 300:] = True
    out = encoder(source.masked_fill(mask, 0.0), mask)
    assert out.padding_mask is not None and out.padding_mask[0].all()
    out.x[~out.padding_mask].square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
    assert encoder.transformer.layers[0].attention.q_proj.weight.grad.abs().sum() > 0  # type: ignore[union-attr]


@pytest.mark.skipif(not hasattr(torch, "compile"), reason="torch < 2 mixes up types in backward passes under autocast")
def test_backward_inside_autocast_is_that_outside() -> None:
    encoder = random_encoder(pruning_units=UNITS[:3]).train()
    generator = set_gates(encoder, 0.0)
    source, _ = batch(torch.float32)
    found = []
    for inside in (False, True):
        encoder.zero_grad(set_to_none=True)
        generator.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16):
            loss = encoder(source).x.float().square().mean()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None]))
    assert (found[0] - found[1]).norm() < 0.02 * found[0].norm()
