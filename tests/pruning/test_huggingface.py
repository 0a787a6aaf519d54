"""Gates on transformers models, and shrinking them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_models import huggingface, padded_batch
from messages import says
from torch import Tensor, nn

from skill_fairseq.checkpoints import load_encoder, save_encoder
from skill_fairseq.modules.units import UNITS as EVERY_UNIT
from skill_fairseq.pruning import Gates, MacCost, as_encoder, gate, shrink

KINDS = ("wavlm", "hubert", "wav2vec2", "data2vec-audio")
STYLES = ("base", "large")  # GroupNorm and post-LN; a LayerNorm after every convolution and pre-LN
STILL = {
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}
"""Nothing but gates is random in training."""
UNITS = [name for name, unit in EVERY_UNIT.items() if unit.field]
"""The kinds that need no modules of ours."""
OUTSIDE = ("masked_spec_embed", "gates.log_alpha")
SAMPLES = (4000, 3990, 2500)


def gated(kind: str, style: str, units: Any = tuple(UNITS), **changes: Any) -> tuple[Any, Gates]:
    """A model with gates around their threshold, and some sublayers without units or removed."""
    model = huggingface(kind, style, **changes)
    gates = gate(model, units)
    scatter(model, gates)
    return model, gates


def scatter(model: Any, gates: Gates) -> None:
    with torch.no_grad():
        model.gates.log_alpha.copy_(torch.randn(len(model.gates.log_alpha), generator=torch.manual_seed(1)) * 2 + 0.5)
        for name, value in {
            "0.attention.gate": -9.0,  # layer 0 has WavLM's position table
            "0.attention.output_gate": 2.0,
            "0.ffn.output_gate": 9.0,
            "1.attention.output_gate": -9.0,
            "1.ffn.output_gate": -9.0,
            "2.ffn.gate": -9.0,
            "2.ffn.output_gate": 2.0,
        }.items():
            vector = dict(gates.encoder.named_gates()).get(f"transformer.layers.{name}")
            if vector is not None:
                vector.log_alpha.fill_(value)


def states(model: Any, source: Tensor, padding: Tensor | None) -> list[Tensor]:
    """Hidden states and output, outside the padding."""
    mask = None if padding is None else (~padding).long()
    out = model(source, attention_mask=mask, output_hidden_states=True)
    counts = slice(None)
    if mask is not None:
        counts = model._get_feature_vector_attention_mask(out.last_hidden_state.size(1), mask).bool()
    return [state[counts] for state in (*out.hidden_states, out.last_hidden_state)]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    assert len(found) == len(expected)
    for i, (a, b) in enumerate(zip(found, expected)):
        assert b.std() > 0.1 and a.shape == b.shape
        assert float((a - b).norm() / b.norm()) < tolerance, f"state {i}"


def num_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def size(model: nn.Module) -> int:
    """Parameters of the encoder."""
    return sum(p.numel() for name, p in model.named_parameters() if name not in OUTSIDE)


@pytest.mark.parametrize(
    ("kind", "attention"),
    [("wavlm", "eager"), *((kind, kernel) for kind in KINDS[1:] for kernel in ("eager", "sdpa"))],  # WavLM has no other
)
@pytest.mark.parametrize("style", STYLES)
def test_the_smaller_model_computes_the_same(kind: str, style: str, attention: str) -> None:
    model, gates = gated(kind, style, attn_implementation=attention)
    small = shrink(model)
    assert type(small) is type(model) and not hasattr(small, "gates")
    assert num_hooks(small) == num_hooks(huggingface(kind, style)) < num_hooks(model)
    assert size(small) == as_encoder(small).num_parameters() < size(model) / 2
    source, padding = padded_batch(SAMPLES)
    with torch.no_grad():
        for mask in (None, padding):
            assert_close(states(small, source, mask), states(model, source, mask))


def test_a_hubert_without_a_norm_after_its_convolutions() -> None:
    model, _ = gated("hubert", "base", feat_proj_layer_norm=False)
    small = shrink(model)
    source, padding = padded_batch(SAMPLES)
    assert not hasattr(small.feature_projection, "layer_norm")
    assert small.encoder_shape.conv_channels[-1] < 16 and size(small) == as_encoder(small).num_parameters()
    with torch.no_grad():
        assert_close(states(small, source, padding), states(model, source, padding))


@pytest.mark.parametrize("units", [("conv",), ("heads",), ("ffn",), ("attention_layers", "ffn_layers")], ids=str)
@pytest.mark.parametrize("kind", ["wavlm", "hubert"])
def test_kinds_of_unit_one_by_one(kind: str, units: tuple[str, ...]) -> None:
    model, _ = gated(kind, "large", units)
    small = shrink(model)
    source, padding = padded_batch(SAMPLES)
    with torch.no_grad():
        assert_close(states(small, source, padding), states(model, source, padding))
    before, after = as_encoder(model).config, small.encoder_shape
    changed = {
        "conv": before.conv_channels != after.conv_channels,
        "heads": before.heads != after.heads and None not in after.heads,
        "ffn": before.ffn_dims != after.ffn_dims and None not in after.ffn_dims,
        "attention_layers": None in after.heads,
        "ffn_layers": None in after.ffn_dims,
    }
    assert {unit for unit, change in changed.items() if change} == set(units)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
def test_training_computes_what_our_gated_encoder_computes(kind: str, style: str) -> None:
    """The same noise gives the same states and gradients of weights and gates."""
    model, gates = gated(kind, style, **STILL)
    ours = as_encoder(model).train()
    model.train()
    source, padding = padded_batch(SAMPLES)
    for bank in (model.gates, ours.gates):
        bank.generator = torch.Generator().manual_seed(5)
    theirs, out = states(model, source, padding), ours(source, padding)
    assert_close([state[~out.padding_mask] for state in (*out.hidden_states, out.x)][-1:], theirs[-1:])
    weights = torch.randn(theirs[-1].shape, generator=torch.manual_seed(0))
    (theirs[-1] * weights).sum().backward()
    (out.x[~out.padding_mask] * weights).sum().backward()
    expected = ours.gates.log_alpha.grad
    assert (expected != 0).float().mean() > 0.1
    assert torch.allclose(model.gates.log_alpha.grad, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    vector = dict(gates.encoder.named_gates())["transformer.layers.0.ffn.gate"]
    closed = model.pruning_gates.values(vector, weights) == 0
    gradient = model.encoder.layers[0].feed_forward.output_dense._parameters["weight"].grad
    assert closed.any() and not gradient[:, closed].any() and gradient[:, ~closed].any()


def test_gates_are_drawn_anew_in_training_and_fixed_in_evaluation() -> None:
    model, _ = gated("wavlm", "base", **STILL)
    source, _ = padded_batch(SAMPLES)
    with torch.no_grad():
        fixed = model(source).last_hidden_state
        assert torch.equal(model(source).last_hidden_state, fixed)
        model.train()
        drawn = [model(source).last_hidden_state for _ in range(3)]
        assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])
        assert torch.equal(model.eval()(source).last_hidden_state, fixed)
        model.gates.log_alpha.add_(0.3)  # an edit takes effect immediately
        assert not torch.equal(model(source).last_hidden_state, fixed)


def test_recomputed_layers_see_the_same_gates() -> None:
    gradients = []
    for recompute in (False, True):
        model, _ = gated("hubert", "base", **STILL)
        model.train()
        if recompute:
            model.gradient_checkpointing_enable()
        model.gates.generator = torch.Generator().manual_seed(3)
        model(padded_batch(SAMPLES)[0]).last_hidden_state.square().sum().backward()
        gradients.append(model.gates.log_alpha.grad)
    assert gradients[0].abs().sum() > 0
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-5 * float(gradients[0].abs().max()))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
def test_expected_size_is_that_of_the_model_which_certain_gates_leave(kind: str, style: str) -> None:
    model = huggingface(kind, style)
    full = size(model)
    gates = gate(model, tuple(UNITS))
    vectors = dict(gates.encoder.named_gates())
    with torch.no_grad():
        model.gates.log_alpha.fill_(40.0)
    assert gates.expected_cost().item() == full and gates.expected_sparsity().item() == 0
    with torch.no_grad():
        for name, kept in (("0.attention", 1), ("1.attention", 3), ("1.ffn", 50), ("2.ffn", 7)):
            vectors[f"transformer.layers.{name}.gate"].log_alpha[kept:] = -40.0
        vectors["transformer.layers.2.attention.output_gate"].log_alpha.fill_(-40.0)
        vectors["transformer.layers.0.ffn.output_gate"].log_alpha.fill_(-40.0)
        for i in (0, 3, 6):
            vectors[f"feature_extractor.layers.{i}.gate"].log_alpha[i + 2 :] = -40.0
    left = size(shrink(model))
    # In the expectation a closed attention keeps its small relative-position gate; only rounding removes it.
    relative = gates.encoder.config.head_dim * 8 + 8 + gates.encoder.config.encoder_attention_heads
    assert gates.expected_cost().item() == left + (relative if kind == "wavlm" else 0) < full / 2
    with torch.no_grad():
        model.gates.log_alpha.copy_(torch.randn(model.gates.log_alpha.shape, generator=torch.manual_seed(2)))
    (slope,) = torch.autograd.grad(gates.expected_sparsity(), model.gates.log_alpha)
    step = 0.05 * torch.randn(slope.shape, generator=torch.manual_seed(3))
    ends = []
    for sign in (1, -2):
        with torch.no_grad():
            model.gates.log_alpha.add_(sign * step)
        ends.append(gates.expected_sparsity().item())
    assert abs((ends[0] - ends[1]) / 2 / float((slope * step).sum()) - 1) < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_a_size_is_met(kind: str) -> None:
    model = huggingface(kind, "base")
    full = size(model)
    gate(model)
    with torch.no_grad():
        model.gates.log_alpha.copy_(torch.randn(model.gates.log_alpha.shape, generator=torch.manual_seed(0)))
    macs = as_encoder(huggingface(kind, "base")).macs(1.0)
    for sparsity in (0.3, 0.6):
        assert abs(size(shrink(model, sparsity)) / full - (1 - sparsity)) < 1e-3
    assert abs(as_encoder(shrink(model, 0.4, MacCost(1.0))).macs(1.0) / macs - 0.6) < 3e-3


def test_a_model_with_a_head_keeps_its_forward_and_its_loss() -> None:
    model: Any = huggingface("wavlm", "large", "ForSequenceClassification", num_labels=3, **STILL)
    labels = torch.tensor([0, 1, 2])
    source, padding = padded_batch(SAMPLES)
    mask = (~padding).long()
    gates = gate(model.wavlm)
    scatter(model.wavlm, gates)
    loss = model.train()(source, attention_mask=mask, labels=labels).loss + gates.expected_sparsity()
    loss.backward()
    assert model.classifier.weight.grad.abs().sum() > 0 and model.wavlm.gates.log_alpha.grad.abs().sum() > 0
    model.eval()
    with torch.no_grad():
        expected = model(source, attention_mask=mask).logits
        model.wavlm = shrink(model.wavlm)
        assert torch.allclose(model(source, attention_mask=mask).logits, expected, atol=1e-5)
    model.train()(source, attention_mask=mask, labels=labels).loss.backward()  # fine-tuning continues
    assert all(p.grad is not None for p in model.wavlm.encoder.layers[-1].parameters())


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
def test_shrunk_models_are_gated_and_shrunk_again(kind: str, style: str) -> None:
    model, _ = gated(kind, style)
    once = shrink(model)
    full = once.encoder_shape.original_parameters
    gates = gate(once)
    assert gates.encoder.config.original_parameters == full and gates.expected_sparsity().item() > 0.5
    with torch.no_grad():
        once.gates.log_alpha.copy_(torch.randn(once.gates.log_alpha.shape, generator=torch.manual_seed(9)))
    twice = shrink(once)
    assert size(twice) < 0.98 * size(once)
    source, padding = padded_batch(SAMPLES)
    with torch.no_grad():
        assert_close(states(twice, source, padding), states(once, source, padding))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
def test_gated_and_shrunk_models_go_into_files_of_our_encoder(kind: str, style: str, tmp_path: Path) -> None:
    model, _ = gated(kind, style)
    source, padding = padded_batch(SAMPLES)
    for given in (model, shrink(model)):
        save_encoder(as_encoder(given), tmp_path / "encoder.safetensors")
        encoder = load_encoder(tmp_path / "encoder.safetensors")
        with torch.no_grad():
            out, theirs = encoder(source, padding), states(given, source, padding)
        assert_close([out.x[~out.padding_mask]], theirs[-1:])
        assert_close([state[~out.padding_mask] for state in out.hidden_states[1:-1]], theirs[1:-2])


def test_a_copy_has_gates_of_its_own_and_states_load() -> None:
    model, _ = gated("wavlm", "base", **STILL)
    source, _ = padded_batch(SAMPLES)
    model.train()(source)
    conv = model.encoder.pos_conv_embed.conv
    if "weight" in vars(conv):  # torch < 2.1 cannot copy weight norm's after a forward
        conv.weight = conv.weight.detach()
    twin = copy.deepcopy(model).eval()
    fresh = huggingface("wavlm", "base", **STILL)
    gate(fresh, tuple(UNITS))
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = model.eval()(source).last_hidden_state
        assert torch.equal(twin(source).last_hidden_state, expected)
        assert torch.equal(fresh(source).last_hidden_state, expected)
        twin.gates.log_alpha.fill_(-1.0)
        assert not torch.equal(twin(source).last_hidden_state, expected)
        assert torch.equal(model(source).last_hidden_state, expected)


def test_what_was_frozen_stays_frozen_and_half_precision_stays_half() -> None:
    model, _ = gated("hubert", "base")
    model.feature_extractor._freeze_parameters()
    small = shrink(model)
    assert not any(p.requires_grad for p in small.feature_extractor.parameters())
    assert all(p.requires_grad for p in small.encoder.parameters())
    assert {p.dtype for p in shrink(model.bfloat16()).parameters()} == {torch.bfloat16}
    assert model.gates.log_alpha.dtype == torch.float32


def test_bad_input_says_what_to_do() -> None:
    with pytest.raises(TypeError, match=says("gate()", "Linear", "WavLMModel", "SpeechEncoder")):
        gate(nn.Linear(1, 1))
    with pytest.raises(TypeError, match=says("gate()", "HubertForCTC", "model.hubert")):
        gate(huggingface("hubert", "base", "ForCTC"))
    with pytest.raises(TypeError, match=says("shrink()", "Linear", "WavLMModel")):
        shrink(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=says("activation_fn", "gelu_new")):
        gate(huggingface("wavlm", "base", hidden_act="gelu_new"))
    with pytest.raises(ValueError, match=says("Wav2Vec2Model", "add_adapter", "True")):
        gate(huggingface("wav2vec2", "base", add_adapter=True))
    model: Any = huggingface("hubert", "base")
    with pytest.raises(ValueError, match=says("no gates")):
        shrink(model)
    for units, named in ((("bias",), "bias"), ((), "units")):
        with pytest.raises(ValueError, match=says("units", named)):
            gate(model, units)
    model.encoder.layers[1].attention.out_proj = nn.Sequential(model.encoder.layers[1].attention.out_proj)
    with pytest.raises(ValueError, match=says("encoder.layers.1.attention.out_proj", "Sequential", "nn.Linear")):
        gate(model)
    assert not hasattr(model, "gates") and num_hooks(model) == num_hooks(
        huggingface("hubert", "base")
    )  # nothing half-done
    gate(model, ("ffn",))
    with pytest.raises(ValueError, match=says("HubertModel", "gates already", "shrink()")):
        gate(model)
