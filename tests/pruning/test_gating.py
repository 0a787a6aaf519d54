"""Gates on our own encoder in a plain PyTorch loop, and the library's dependencies."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from messages import says

from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.pruning import SizeConstraint, gate, parameter_groups, shrink

UNITS = ("conv", "heads", "ffn", "attention_layers", "ffn_layers")


@pytest.mark.parametrize("style", ["base", "large"])
def test_a_gated_encoder_is_the_one_that_is_built_with_gates(small: Any, style: str) -> None:
    encoder = small.random_encoder(**(small.LARGE_STYLE if style == "large" else {})).train()
    weights = list(encoder.parameters())
    plain = encoder.state_dict()
    gates = gate(encoder, UNITS, drop_rate=0.3)
    assert gates.encoder is encoder and encoder.gates.training
    assert all(a is b for a, b in zip(weights, [p for n, p in encoder.named_parameters() if n != "gates.log_alpha"]))
    built = SpeechEncoder(encoder.config)
    assert encoder.config.pruning_units == list(UNITS) and encoder.config.original_parameters == built.num_parameters()
    assert [name for name, _ in encoder.named_gates()] == [name for name, _ in built.named_gates()]
    built.load_state_dict(encoder.state_dict())
    assert set(encoder.state_dict()) - set(plain) == {"gates.log_alpha", "gates.kept_override"}
    for model in (encoder, built.train()):
        model.gates.generator = torch.Generator().manual_seed(4)
    out = encoder(small.waves())
    assert torch.equal(out.x, built(small.waves()).x)
    (out.x.square().sum() + gates.expected_sparsity()).backward()
    assert encoder.gates.log_alpha.grad.abs().sum() > 0
    drop = 1 - torch.sigmoid(encoder.gates.log_alpha).mean()
    assert abs(float(drop) - 0.3) < 0.01
    with torch.no_grad():
        encoder.gates.log_alpha.normal_(0.5, 2.0, generator=torch.manual_seed(0))
        expected = encoder.eval()(small.waves()).x
        assert torch.allclose(shrink(encoder)(small.waves()).x, expected, atol=1e-5 * float(expected.abs().max()))


def test_the_task_loss_alone_prunes_to_the_target(small: Any) -> None:
    """An encoder learns to classify four tones while losing 60 % of its parameters."""
    torch.manual_seed(0)
    encoder = small.random_encoder()
    full = encoder.num_parameters()
    head = torch.nn.Linear(encoder.config.encoder_embed_dim, 2)
    waves, labels = small.waves(batch=4), torch.arange(4) % 2
    gates, constraint = gate(encoder), SizeConstraint(target=0.6, warmup=20)
    groups = parameter_groups(encoder, head, constraint, lr=1e-3, gates_lr=0.2, multipliers_lr=0.2)
    optimizer = torch.optim.AdamW(groups)
    encoder.train()
    for update in range(80):
        loss = torch.nn.functional.cross_entropy(head(encoder(waves).x.mean(1)), labels)
        optimizer.zero_grad()
        (loss + constraint(gates.expected_sparsity(), update)).backward()
        optimizer.step()
    assert abs(gates.expected_sparsity().item() - 0.6) < 0.05
    small_encoder = shrink(encoder, 0.6)
    assert abs(small_encoder.num_parameters() / full - 0.4) < 2e-3
    right = head(small_encoder(waves).x.mean(1)).argmax(1) == labels
    assert right.all()


def test_groups_have_rates_of_their_own_and_only_weights_decay(small: Any) -> None:
    encoder, constraint = small.random_encoder(), SizeConstraint(0.5)
    gate(encoder)
    encoder.feature_extractor.requires_grad_(False)
    groups = parameter_groups(encoder, constraint, encoder, lr=1.0, gates_lr=2.0, multipliers_lr=3.0, weight_decay=0.1)
    found = {group["name"]: (group["lr"], group["weight_decay"], len(group["params"])) for group in groups}
    frozen = len(list(encoder.feature_extractor.parameters()))
    weights = len(list(encoder.parameters())) - 1 - frozen
    assert found == {"weights": (1.0, 0.1, weights), "gates": (2.0, 0.0, 1), "multipliers": (3.0, 0.0, 2)}
    torch.optim.AdamW(groups)  # no parameter twice
    assert [group["name"] for group in parameter_groups(torch.nn.Linear(1, 1), lr=1.0)] == ["weights"]


def test_bad_input_says_what_to_do(small: Any) -> None:
    encoder = small.random_encoder()
    for units in ((), ("bias",), "ffn"):
        with pytest.raises(ValueError, match=says("units", repr(units), "heads")):
            gate(encoder, units)
    with pytest.raises(ValueError, match=says("drop_rate", "1.0", "(0, 1)")):
        gate(encoder, drop_rate=1.0)
    assert encoder.gates is None and not encoder.config.pruning_units
    gate(encoder)
    with pytest.raises(ValueError, match=says("SpeechEncoder", "gates already", "shrink()")):
        gate(encoder)


def test_torch_is_all_that_it_needs() -> None:
    """All other dependencies are blocked; numpy comes with torch."""
    code = (
        "import sys\n"
        "absent = 'fairseq fairseq_cli hydra omegaconf transformers safetensors scipy soundfile sklearn matplotlib'\n"
        "absent += ' yaml tqdm sentencepiece tensorboardX editdistance torchaudio onnx'\n"
        "sys.modules.update(dict.fromkeys(absent.split()))\n"
        "import torch\n"
        "from skill_fairseq.pruning import SizeConstraint, gate, parameter_groups, shrink\n"
        "from skill_fairseq.modules.config import EncoderConfig\n"
        "from skill_fairseq.modules.encoder import SpeechEncoder\n"
        "shape = dict(conv_feature_layers='[(8,10,5)] + [(8,8,64)]', encoder_layers=2, encoder_embed_dim=16)\n"
        "shape.update(encoder_ffn_embed_dim=32, encoder_attention_heads=2, conv_pos=8, conv_pos_groups=2)\n"
        "encoder = SpeechEncoder(EncoderConfig(**shape))\n"
        "gates, constraint = gate(encoder), SizeConstraint(0.5)\n"
        "optimizer = torch.optim.Adam(parameter_groups(encoder, constraint, lr=1e-3))\n"
        "(encoder(torch.randn(2, 4000)).x.sum() + constraint(gates.expected_sparsity(), 0)).backward()\n"
        "optimizer.step()\n"
        "print(encoder.num_parameters(), shrink(encoder, 0.5).num_parameters())\n"
    )
    env = {**os.environ, "SKILL_FAIRSEQ_HOOK": "0"}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    before, after = map(int, found.stdout.split())
    assert abs(after / before - 0.5) < 0.01
