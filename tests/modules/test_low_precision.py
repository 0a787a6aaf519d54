"""Encoders in bfloat16 and int8: how far each state is from float32 on real speech, and what is refused."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from skill_fairseq import load_encoder
from skill_fairseq.audio.manifest import read_manifest
from skill_fairseq.checkpoints import save_encoder
from skill_fairseq.modules import low_precision
from skill_fairseq.modules.low_precision import LowLinear, lower
from tests.conftest import LARGE_STYLE, random_encoder

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny"
TEACHER = TINY / "teacher" / "teacher.safetensors"
LIMIT = {"bf16": 0.005, "int8": 0.012}
"""Relative L1 of every state: about 0.3 % and 1 % were measured."""

pytestmark = [
    pytest.mark.skipif(int(torch.__version__.split(".")[0]) < 2, reason="torch < 2.0 has other products"),
    pytest.mark.filterwarnings("ignore:precision"),
]


def speech() -> torch.Tensor:
    import soundfile

    manifest = read_manifest(TINY / "data" / "valid.tsv")
    waves = [soundfile.read(str(manifest.root / path), dtype="float32")[0] for path in manifest.paths[:4]]
    wave = torch.cat([torch.from_numpy(wave) for wave in waves])[None]
    return (wave - wave.mean()) / wave.std()


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_every_state_is_near_on_speech(precision: str) -> None:
    wave = speech()
    with torch.no_grad():
        wanted = load_encoder(TEACHER)(wave).hidden_states
        found = load_encoder(TEACHER, precision=precision)(wave).hidden_states
    errors = [float((f - w).abs().sum() / w.abs().sum()) for f, w in zip(found, wanted)]
    print(precision, [f"{100 * e:.2f} %" for e in errors])
    assert all(state.dtype == torch.float32 for state in found)
    assert 1e-4 < max(errors) <= LIMIT[precision]


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("style", [{}, LARGE_STYLE, {"heads": [[0, 2], [], None], "ffn_dims": [5, None, 0]}], ids=str)
def test_every_shape(precision: str, style: dict[str, object]) -> None:
    encoder, source = random_encoder(**style), torch.randn(2, 6000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = encoder(source).x
        low = lower(encoder, precision)
        found = low(source).x
        assert torch.equal(copy.deepcopy(low).prepare()(source).x, found)
    assert 0 < float((found - wanted).abs().sum() / wanted.abs().sum()) <= 2 * LIMIT[precision]
    assert not any(type(m) is nn.Linear for n, m in low.named_modules() if not n.endswith("grep_linear"))


def test_scales_are_per_output() -> None:
    layer, x = nn.Linear(64, 3), torch.randn(50, 64)
    with torch.no_grad():
        layer.weight[0] *= 1000
        wanted, found = layer(x), LowLinear(layer.weight, layer.bias, "int8")(x)
    assert ((found - wanted).abs().sum(0) / wanted.abs().sum(0)).max() <= 0.05


def test_a_warning_says_where_nothing_is_gained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_precision, "cost", lambda precision: 7.9)
    with pytest.warns(UserWarning, match=r"precision: 'bf16' gains nothing on this processor, .* 7.9 times as long"):
        lower(random_encoder(), "bf16")
    monkeypatch.setattr(low_precision, "cost", lambda precision: 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lower(random_encoder(), "int8")
    monkeypatch.undo()
    assert 0 < low_precision.cost("int8") < 100


def test_refusals(tmp_path: Path) -> None:
    save_encoder(random_encoder(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=re.escape("precision: 'int4'; expected one of fp32, bf16, int8")):
        load_encoder(tmp_path / "model.safetensors", precision="int4")
    with pytest.raises(ValueError, match="precision: 'int8'; the encoder has gates .heads.: cut them out first"):
        lower(random_encoder(pruning_units=["heads"]), "int8")
    with pytest.raises(ValueError, match="precision: 'int8' is for CPUs, the encoder is on meta"):
        lower(random_encoder().to("meta"), "int8")
