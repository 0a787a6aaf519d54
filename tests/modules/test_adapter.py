"""Adapters beside the FFNs: OS-KDFT's numbers, sizes, passes with and without, files, and training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from messages import says
from oracle import RELATED, agrees, tensor, tensors

from skill_fairseq.checkpoints import load_encoder, save_encoder
from skill_fairseq.modules.adapter import Adapter, ResidualAdapter
from skill_fairseq.modules.attention import SelfAttention
from skill_fairseq.modules.config import EncoderConfig, hubert_base, hubert_large, wavlm_base
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.feed_forward import FeedForward
from skill_fairseq.modules.layer import EncoderLayer
from skill_fairseq.modules.size import count_macs, count_parameters, widths_of
from skill_fairseq.modules.taps import Tap
from skill_fairseq.pruning.shrink import shrink
from tests.conftest import LARGE_STYLE, random_encoder

CASES, COUNTS = RELATED["cases"]["os_kdft"], RELATED["parameter_counts"]


@pytest.mark.parametrize("activation", ["relu", "elu"])
def test_an_adapter_is_the_reference(activation: str) -> None:
    case = CASES["adapter"]
    adapter = Adapter(6, 4, activation).double().eval()
    adapter.load_state_dict(tensors(case["weights"]))
    assert agrees(adapter(tensor(case["inputs"]["x"])), case[f"output_{activation}"])


def test_the_adapter_of_the_first_scripts_is_the_reference() -> None:
    case = CASES["adapter_paper_scripts"]
    adapter = ResidualAdapter(6, 4).double()
    names = {"adapter_layer_norm_before": "norm", "down_proj": "down", "up_proj": "up"}
    state = {}
    for name, weight in tensors(case["weights"]).items():
        module, _, kind = name.partition(".")
        state[f"{names[module]}.{kind}"] = weight
    adapter.load_state_dict(state)
    x = tensor(case["inputs"]["x"])
    assert agrees(adapter(x), case["output"])
    # In a pre-LayerNorm layer: h + FFN(LN(h)) + h + 0.1 up(...), with h from before the LayerNorm.
    ffn = FeedForward(6, 5)
    layer = EncoderLayer(6, None, ffn, True, adapter=adapter).double().eval()
    torch.nn.init.normal_(layer.ffn_norm.weight)
    assert torch.allclose(layer(x), x + ffn(layer.ffn_norm(x)) + adapter(x))
    assert torch.allclose(layer(x, adapted=False), x + ffn(layer.ffn_norm(x)))


def test_the_student_of_the_first_scripts_has_the_published_size() -> None:
    xlsr = hubert_large(conv_bias=True)
    counts = COUNTS["os_kdft first scripts (XLSR-53, 4 layers)"]
    shape = xlsr.replace(encoder_layers=4, adapter_dim=64, adapter_form="residual", heads=None, ffn_dims=None)
    without = shape.replace(adapter_dim=0, adapter_form="plain")
    sizes = [count_parameters(config, widths_of(config)) for config in (xlsr, shape, without)]
    mask_embedding = 1024  # which encoders here lack
    assert sizes[0] + mask_embedding == counts["teacher"]
    assert sizes[1] + mask_embedding == counts["student_with_adapters"]
    assert sizes[1] - sizes[2] == counts["adapters"]


def test_noise_is_a_share_of_the_mean_activation() -> None:
    torch.manual_seed(0)
    adapter, x = Adapter(8, 5000).train(), torch.randn(1, 1, 8)
    torch.nn.init.eye_(adapter.up.weight), torch.nn.init.zeros_(adapter.up.bias)
    with torch.no_grad():
        clean = torch.relu(adapter.down(x))
        adapter.up = torch.nn.Identity()
        deviations = [((adapter(x) - clean).std() / clean.abs().mean()).item() for _ in range(100)]
    assert 0.09 < min(deviations) < 0.15 and 0.45 < max(deviations) < 0.52


def test_a_layer_with_and_without_is_the_reference() -> None:
    case = CASES["layer"]
    attention = SelfAttention(8, 4, [0, 1], 2, 0.0, False)
    layer = EncoderLayer(8, attention, FeedForward(8, 12), False, adapter=Adapter(8, 4)).double().eval()
    names = {
        "attention_norm": "layer_norm",
        "ffn_norm": "final_layer_norm",
        "ffn.fc1": "feed_forward.intermediate_dense",
        "ffn.fc2": "feed_forward.output_dense",
        "adapter": "os_kdft_adapter",
    }
    state, given = {}, tensors(case["weights"])
    for name in layer.state_dict():
        (theirs,) = [theirs for mine, theirs in names.items() if name.startswith(f"{mine}.")] or [""]
        (mine,) = [mine for mine in names if name.startswith(f"{mine}.")] or [""]
        state[name] = given[theirs + name[len(mine) :]]
    layer.load_state_dict(state)
    x = tensor(case["inputs"]["x"])
    assert agrees(layer(x[:4], adapted=False), case["distillation_half_without_adapter"])
    assert agrees(layer(x[4:]), case["fine_tuning_half_with_adapter"])


def test_published_sizes() -> None:
    for teacher, activation, name in ((hubert_base(), "relu", "HuBERT"), (wavlm_base(), "elu", "WavLM")):
        shape = teacher.replace(
            encoder_layers=2, adapter_dim=64, adapter_activation=activation, heads=None, ffn_dims=None
        )
        counts = COUNTS[f"os_kdft student ({name}, 2 layers)"]
        without = shape.replace(adapter_dim=0, adapter_activation="relu")
        assert count_parameters(without, widths_of(without)) == counts["encoder"]
        assert count_parameters(shape, widths_of(shape)) == counts["encoder"] + counts["adapters"]
        macs = [count_macs(config, widths_of(config), 16000) for config in (without, shape)]
        assert macs[1] - macs[0] == 2 * 2 * 49 * 768 * 64
    for form in ("plain", "residual"):
        encoder = random_encoder(adapter_dim=5, adapter_form=form)
        assert encoder.num_parameters() == count_parameters(encoder.config, widths_of(encoder.config))


def test_the_default_is_not_written_and_values_are_checked() -> None:
    assert not {"adapter_dim", "adapter_activation", "adapter_form"} & set(EncoderConfig().to_dict())
    written = EncoderConfig(adapter_dim=1, adapter_activation="elu").to_dict()
    assert EncoderConfig.from_dict(written) == EncoderConfig(adapter_dim=1, adapter_activation="elu")
    for fields, said in (
        ({"adapter_dim": -1}, ["model.adapter_dim: -1"]),
        ({"adapter_dim": True}, ["model.adapter_dim: True"]),
        ({"adapter_dim": 4, "adapter_activation": "gelu"}, ["model.adapter_activation: 'gelu'", "'elu'"]),
        ({"adapter_activation": "elu"}, ["model.adapter_activation", "adapter_dim above 0"]),
        ({"adapter_form": "residual"}, ["model.adapter_form", "adapter_dim above 0"]),
        ({"adapter_dim": 4, "adapter_form": "parallel"}, ["model.adapter_form: 'parallel'", "'residual'"]),
        (
            {"adapter_dim": 4, "adapter_form": "residual", "adapter_activation": "elu"},
            ["model.adapter_activation: 'elu'", "residual"],
        ),
    ):
        with pytest.raises(ValueError, match=says(*said)):
            EncoderConfig(**fields)


RESIDUAL = {**LARGE_STYLE, "adapter_form": "residual"}


@pytest.mark.parametrize("style", [{}, LARGE_STYLE, RESIDUAL, {"reuse_attention": [2], "time_reduction": 2}])
def test_passes_with_and_without(style: dict, small: Any) -> None:
    """Per forward; without them, it equals an encoder that has none."""
    encoder = random_encoder(adapter_dim=5, **style)
    plain = SpeechEncoder(encoder.config.replace(adapter_dim=0, adapter_form="plain")).eval()
    plain.load_state_dict({k: v for k, v in encoder.state_dict().items() if ".adapter." not in k})
    taps = [Tap((layer,), adapters=adapters) for layer in (0, 1, 3) for adapters in (True, False)]
    ran: list[int] = []
    encoder.feature_extractor.register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        found, _ = encoder.tap(small.waves(), None, taps)
        assert ran == [1]
        with_them, without = encoder(small.waves()).hidden_states, plain(small.waves()).hidden_states
    for tap, state in zip(taps, found):
        assert torch.equal(state, (with_them if tap.adapters else without)[tap.layers[0]])
    assert not torch.allclose(found[-1], found[-2])


@pytest.mark.parametrize("style", [{}, RESIDUAL])
def test_files_and_shrinking_keep_them(style: dict, small: Any, tmp_path: Path) -> None:
    gated = random_encoder(adapter_dim=5, pruning_units=["ffn_layers", "heads"], **style)
    with torch.no_grad():
        for _, gate in gated.named_gates():
            gate.log_alpha[0] = -9.0
    cut = shrink(gated)
    assert cut.config.ffn_dims.count(None) >= 1 and cut.config.adapter_dim == 5
    with torch.no_grad():
        assert torch.allclose(gated(small.waves()).x, cut(small.waves()).x, atol=1e-4)
    save_encoder(cut, tmp_path / "student.safetensors")
    loaded = load_encoder(tmp_path / "student.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(loaded(small.waves()).x, cut(small.waves()).x)


@pytest.mark.parametrize("form", ["plain", "residual"])
def test_what_no_tap_reaches_is_not_trained(form: str, small: Any, speech: Path, teacher_file: Path) -> None:
    task = small.make_task(speech, teacher_file)
    for taps in (
        [Tap((3,), adapters=False)],
        [Tap((3,), adapters=False), Tap((1,))],
        [Tap((3,), adapters=False), Tap((2,), "mean_map")],
        [Tap((3,))],
    ):
        model = task.build_model(small.student_config(teacher_file, adapter_dim=4, adapter_form=form)).train()
        model.train_for(taps)
        torch.stack([state.square().mean() for state in model(small.waves(), taps=taps)["taps"]]).sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (parameter.grad is not None), (taps, name)
