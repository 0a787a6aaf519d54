"""Students that were trained in int8: what is exported computes what was trained, without calibration."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from messages import says
from torch import Tensor

from skill_fairseq.audio.manifest import read_manifest
from skill_fairseq.checkpoints import load_encoder, save_encoder
from skill_fairseq.cli.export import main
from skill_fairseq.exporting.accuracy import sources
from skill_fairseq.exporting.huggingface_folder import stock_type
from skill_fairseq.exporting.traceable import NEEDED_TORCH
from skill_fairseq.modules.config import wavlm_base
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.fake_quantize import (
    Ranges,
    quantize_weight,
    quantized_modules,
    range_of,
    steps_of,
    whole_weight,
)
from tests.conftest import LARGE_STYLE, random_encoder

OLD_TORCH = tuple(int(number) for number in torch.__version__.split("+")[0].split(".")[:2]) < NEEDED_TORCH
graphs = pytest.mark.skipif(OLD_TORCH, reason=f"torch.export needs torch >= 2.6; this is {torch.__version__}")
SHAPES = {
    "base": {"heads": [[0, 2], [], None], "ffn_dims": [5, None, 0]},
    "large": {**LARGE_STYLE, "unit_widths": {"rank": 12}},
    "data2vec": {"pos_conv_depth": 3, "conv_pos": 15, "conv_pos_groups": 4, "time_reduction": 2, "adapter_dim": 8},
}


def source(seed: int = 0) -> Tensor:
    return torch.randn(2, 6000, generator=torch.Generator().manual_seed(seed))


def trained(**shape: Any) -> SpeechEncoder:
    plain = random_encoder(**shape)
    encoder = SpeechEncoder(plain.config.replace(quantize="int8")).eval()
    encoder.load_state_dict(plain.state_dict(), strict=False)
    ranges = Ranges(encoder)
    ranges.watch(True)
    with torch.no_grad():
        encoder(source(1))
    ranges.follow(0)
    ranges.watch(None)
    return encoder


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> tuple[SpeechEncoder, Path]:
    encoder = trained()
    path = tmp_path_factory.mktemp("trained") / "student.safetensors"
    save_encoder(encoder, path, {"source": "stage2.pt"}, dtype="int8")
    return encoder, path


def states(encoder: SpeechEncoder) -> list[Tensor]:
    with torch.no_grad():
        return encoder(source()).hidden_states


def difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().sum() / wanted.abs().sum())


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("dtype", ["int8", "float32", "bfloat16"])
def test_it_loads_as_it_was_trained(kind: str, dtype: str, tmp_path: Path) -> None:
    encoder = trained(**SHAPES[kind])
    encoder.mask_embedding = torch.randn(32)
    save_encoder(encoder, tmp_path / "student.safetensors", dtype=dtype)
    found = load_encoder(tmp_path / "student.safetensors")
    assert found.config == encoder.config
    for (name, a), (_, b) in zip(quantized_modules(found), quantized_modules(encoder)):
        assert range_of(a) is None or torch.equal(a.input_range.bounds, b.input_range.bounds)
        if dtype != "bfloat16":
            assert torch.equal(quantize_weight(whole_weight(a))[0], quantize_weight(whole_weight(b))[0]), name
    limit = 0.05 if dtype == "bfloat16" else 0.002  # beside one unit in the last place, a value between two steps
    assert max(difference(a, b) for a, b in zip(states(found), states(encoder))) < limit


def test_a_tap_of_the_positional_convolution_that_rounds_to_0(tmp_path: Path) -> None:
    encoder = trained()
    with torch.no_grad():
        encoder.transformer.pos_conv.weight_g[..., 2] *= 1e-4
    save_encoder(encoder, tmp_path / "student.safetensors", dtype="int8")
    found = load_encoder(tmp_path / "student.safetensors")
    assert (quantize_weight(whole_weight(found.transformer.pos_conv))[0][..., 2] == 0).all()
    assert max(difference(a, b) for a, b in zip(states(found), states(encoder))) < 0.002


@graphs
@pytest.mark.slow
def test_layers_that_training_did_not_reach(tmp_path: Path) -> None:
    """In a graph they are refused; torch rounds their inputs by each batch, as in training."""
    from skill_fairseq.exporting.onnx_graph import make_onnx
    from skill_fairseq.exporting.onnx_trained import to_trained_int8

    encoder = trained()
    for one in Ranges(encoder.transformer.layers[-1]).ranges:
        one.set(torch.zeros(2))
        one._known = None
    wanted = states(encoder)
    path = tmp_path / "student.safetensors"
    save_encoder(encoder, path, dtype="int8")
    found = states(load_encoder(path, precision="int8"))
    assert max(difference(a, b) for a, b in zip(found, wanted)) < 0.01
    depth = encoder.config.encoder_layers
    to_trained_int8(make_onnx(encoder, layers=[depth - 1]), encoder)
    with pytest.raises(
        ValueError, match=says(f"transformer.layers.{depth - 1}.attention.q_proj", "no range", "--layers")
    ):
        to_trained_int8(make_onnx(encoder, layers=[depth]), encoder)


def test_accuracy_of_a_file_in_int8_is_measured_on_the_file(
    student: tuple[SpeechEncoder, Path], tmp_path: Path, capsys: Any
) -> None:
    """A value between two steps may go either way as the file is read."""
    example = Path(__file__).parents[2] / "examples" / "tiny" / "data"
    speech = tmp_path / "speech.tsv"
    speech.write_text(f"{example}\n" + (example / "valid.tsv").read_text().splitlines()[1] + "\n")
    out = tmp_path / "student.safetensors"
    assert main([str(student[1]), str(out), "--dtype", "int8", "--accuracy", str(speech)]) == 0
    found = json.loads((tmp_path / "student.accuracy.json").read_text())
    assert max(found["relative_l1"].values()) < 0.002
    manifest, encoder = read_manifest(speech), load_encoder(student[1])
    (heard,) = sources(manifest, encoder, 120.0)
    with torch.no_grad():
        wanted, written = (e(heard).hidden_states[-1] for e in (encoder, load_encoder(out)))
    assert found["relative_l1"]["x"] == pytest.approx(difference(written, wanted), rel=1e-3, abs=1e-9)


def test_a_byte_a_weight(tmp_path: Path) -> None:
    """Of a student with a quarter of WavLM Base's parameters."""
    config = wavlm_base(conv_channels=[512, 410, 410, 410, 410, 410, 410], quantize="int8").replace(
        heads=[[0, 5]] * 12, ffn_dims=[610] * 12
    )
    encoder = SpeechEncoder(config)
    for one in Ranges(encoder).ranges:
        one.set(torch.tensor([-1.0, 1.0]))
    save_encoder(encoder, tmp_path / "student.safetensors", dtype="int8")
    size, parameters = (tmp_path / "student.safetensors").stat().st_size, encoder.num_parameters()
    assert 20e6 < parameters < 30e6 and 0.98 < size / parameters < 1.02


def test_what_is_refused(student: tuple[SpeechEncoder, Path], tmp_path: Path, capsys: Any) -> None:
    plain = tmp_path / "plain.safetensors"
    save_encoder(random_encoder(), plain)
    with pytest.raises(ValueError, match=says("int8", "model.quantize", "--precision int8")):
        save_encoder(random_encoder(), tmp_path / "out.safetensors", dtype="int8")
    for arguments, parts in (
        ([plain, tmp_path / "out.safetensors", "--dtype", "int8"], ("int8", "model.quantize")),
        ([student[1], tmp_path / "out", "--to", "huggingface", "--dtype", "int8"], ("--dtype", "safetensors")),
    ):
        assert main([str(argument) for argument in arguments]) == 2
        assert re.search(says(*parts), capsys.readouterr().err)
    assert stock_type(trained(), {}) is None  # transformers' own models round nothing


def test_a_file_without_the_sizes_of_its_steps_is_refused(student: tuple[SpeechEncoder, Path], tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(str(student[1]), framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    name = "transformer.layers.0.ffn.fc1.weight"
    del tensors[f"{name}_scale"]
    save_file(tensors, tmp_path / "damaged.safetensors", metadata)
    with pytest.raises(ValueError, match=says("damaged.safetensors", f"{name}_scale", 48)):
        load_encoder(tmp_path / "damaged.safetensors")


@graphs
@pytest.mark.slow
@pytest.mark.formats("out", "ONNX in int8", "onnxruntime")
@pytest.mark.parametrize(
    "kind", ["base", *(pytest.param(kind, marks=pytest.mark.nightly) for kind in list(SHAPES)[1:])]
)
def test_onnxruntime_computes_what_was_trained(kind: str, tmp_path: Path) -> None:
    import onnx

    from skill_fairseq.exporting.onnx_encoder import OnnxEncoder
    from skill_fairseq.exporting.onnx_graph import describe, make_onnx
    from skill_fairseq.exporting.onnx_trained import to_trained_int8

    encoder = trained(**SHAPES[kind])
    model = to_trained_int8(make_onnx(encoder), encoder)
    describe(model, encoder, {}, precision="int8")
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    for name, module in quantized_modules(encoder):
        steps, sizes = quantize_weight(whole_weight(module))
        written = constants[f"{name}.weight_steps"]
        assert written.dtype == np.int8 and np.array_equal(written if written.ndim == 3 else written.T, steps.numpy())
        assert np.array_equal(constants[f"{name}.weight_scale"], sizes.numpy())
    scales = {float(value) for name, value in constants.items() if name.endswith("input_scale")}
    assert scales == {float(steps_of(one.bounds)[0]) for one in Ranges(encoder).ranges}
    runner = OnnxEncoder(model.SerializeToString(), threads=1)
    found = runner.states(source())
    for i, state in enumerate(states(encoder)):
        assert difference(found[f"hidden_state_{i}"], state) < 0.005, i  # a value between two steps may go either way
    assert runner.config == encoder.config


@graphs
@pytest.mark.slow
def test_skill_export_needs_no_calibration(student: tuple[SpeechEncoder, Path], tmp_path: Path, capsys: Any) -> None:
    encoder, path = student
    speech = tmp_path / "speech.tsv"
    example = Path(__file__).parents[2] / "examples" / "tiny" / "data"
    speech.write_text(f"{example}\n" + "\n".join((example / "valid.tsv").read_text().splitlines()[1:4]) + "\n")
    out = tmp_path / "student.onnx"
    for option, value in (("--calibrate", str(speech)), ("--precision", "fp16")):
        more = ["--precision", "int8"] if option == "--calibrate" else []
        assert main([str(path), str(out), option, value, *more]) == 2
        assert re.search(says(option, "trained in int8", "leave it out"), capsys.readouterr().err)
        assert not out.exists()
    assert main([str(path), str(out), "--precision", "int8", "--accuracy", str(speech), "--layers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "in int8" in printed and "beside the encoder as trained" in printed
    found = json.loads((tmp_path / "student.accuracy.json").read_text())
    assert max(found["relative_l1"].values()) < 0.005
    assert main(["--info", str(out)]) == 0
    assert re.search(r"trained in +int8", capsys.readouterr().out)
