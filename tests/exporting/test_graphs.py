"""ONNX and torch.export: other shapes, without the mask input, and refusals."""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from messages import says

from skill_fairseq.cli.export import main
from skill_fairseq.exporting.onnx_graph import OPSET, save_onnx
from skill_fairseq.exporting.torch_program import save_torch_program
from skill_fairseq.exporting.traceable import NEEDED_TORCH, record

REPO = Path(__file__).resolve().parents[2]
OLD_TORCH = tuple(int(number) for number in torch.__version__.split("+")[0].split(".")[:2]) < NEEDED_TORCH
new_torch = pytest.mark.skipif(
    OLD_TORCH, reason=f"torch.export needs torch >= {NEEDED_TORCH[0]}.{NEEDED_TORCH[1]}; this is {torch.__version__}"
)

LARGE = {
    "extractor_mode": "layer_norm",
    "layer_norm_first": True,
    "conv_bias": True,
    "conv_feature_layers": "[(16,10,5)] + [(16,3,4)] + [(16,2,2)]",  # three, because recording takes long
    "encoder_layers": 1,
    "conv_channels": [3, 16, 5],
    "heads": [[0, 3]],
    "padding_rule": "convolution",
    "normalize": True,
}


def contents(path):
    """The bytes of a file, or of every member of an archive."""
    if not zipfile.is_zipfile(path):
        return [path.read_bytes()]
    with zipfile.ZipFile(path) as archive:
        return [archive.read(name) for name in archive.namelist()]


@new_torch
@pytest.mark.slow
def test_onnxruntime_quantises_a_graph(exporting, small, tmp_path):
    """Its weights are constants, also those of the positional convolution."""
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    encoder = small.random_encoder(conv_feature_layers="[(16,10,5)] + [(16,3,4)]", encoder_layers=1)
    save_onnx(encoder, tmp_path / "a.onnx")
    quant_pre_process(str(tmp_path / "a.onnx"), str(tmp_path / "prepared.onnx"), auto_merge=True)
    quantize_dynamic(str(tmp_path / "a.onnx"), str(tmp_path / "b.onnx"))
    quantize_dynamic(str(tmp_path / "prepared.onnx"), str(tmp_path / "c.onnx"))
    source = torch.randn(2, 800, generator=torch.Generator().manual_seed(0))
    wanted = encoder(source).x.detach()
    for name, most in (("prepared", 1e-4), ("b", 0.1), ("c", 0.1)):
        session = onnxruntime.InferenceSession(str(tmp_path / f"{name}.onnx"))
        found = torch.from_numpy(session.run(["x"], {"source": source.numpy()})[0])
        assert float((found - wanted).abs().max()) < most * float(wanted.abs().max()), name
    assert (tmp_path / "c.onnx").stat().st_size < (tmp_path / "prepared.onnx").stat().st_size


@new_torch
@pytest.mark.nightly
def test_large_style(exporting, small, tmp_path):
    import onnx
    import onnxruntime

    encoder = small.random_encoder(**LARGE)
    encoder.train()
    save_onnx(encoder, tmp_path / "a.onnx")
    save_torch_program(encoder, tmp_path / "a.pt2", padding_mask=True)
    assert encoder.training  # left as it was
    encoder.eval()
    model = onnx.load(tmp_path / "a.onnx")
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [OPSET]
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert (properties["normalize"], properties["sample_rate"], properties["downsampling"]) == ("true", "16000", "40")
    assert (tmp_path / "a.onnx").stat().st_size < 4 * encoder.num_parameters() + 150_000  # the graph, no stack traces
    for file in ("a.onnx", "a.pt2"):  # nothing of the machine that wrote it
        for text in contents(tmp_path / file):
            assert not any(str(place).encode() in text for place in (REPO, sys.prefix, torch.__path__[0], Path.home()))
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"))
    assert [i.name for i in session.get_inputs()] == ["source"] and len(session.get_outputs()) == 3
    program = torch.export.load(tmp_path / "a.pt2").module()
    for batch, samples in ((1, 80), (2, 119), (2, 120), (3, 751)):
        source = torch.randn(batch, samples, generator=torch.Generator().manual_seed(samples))
        wanted = exporting.states_of(encoder, source)
        x, *states = session.run(None, {"source": source.numpy()})
        exporting.assert_same([*states, x], wanted)
        found = program(source, torch.zeros_like(source, dtype=torch.bool))
        exporting.assert_same([*found["hidden_states"], found["x"]], wanted)
    for length in (79, 80, 119, 120, 300):  # frames are counted like the convolutions' output
        padding = torch.arange(751).expand(2, -1) >= torch.tensor([[751], [length]])
        source = torch.randn(2, 751).masked_fill(padding, 0.0)
        found = program(source, padding)
        frames = encoder(source, padding).padding_mask
        assert torch.equal(found["padding_mask"], frames)
        assert (~frames[1]).sum() == encoder.config.num_frames(length) < 19
        exporting.assert_same([*found["hidden_states"], found["x"]], exporting.states_of(encoder, source, padding))
        for dtype in (torch.int64, torch.uint8):  # a program accepts any dtype: 0 and 1 work too
            assert torch.equal(program(source, padding.to(dtype))["x"], found["x"])
    for wrong in (padding[:, :700], padding[:1], padding[0]):
        with pytest.raises(Exception, match="padding_mask"):
            program(source, wrong)


@new_torch
def test_gates_have_no_place_in_a_graph(small, tmp_path):
    encoder = small.random_encoder(pruning_units=["ffn"])
    for save, name in ((save_onnx, "a.onnx"), (save_torch_program, "a.pt2")):
        with pytest.raises(ValueError, match=says("gates", "ffn", "skill-shrink")):
            save(encoder, tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not OLD_TORCH, reason=f"torch {torch.__version__} has what an older one lacks")
def test_an_old_torch_is_named(small, tmp_path, capsys):
    with pytest.raises(ValueError, match=says(f"torch {torch.__version__}", "torch >= 2.6")):
        record(small.random_encoder())


def test_what_does_not_go_together_is_one_line(teacher_file, tmp_path, capsys):
    for arguments, said in (
        (["a.safetensors", "--to", "onnx"], ["a.safetensors", ".onnx", "--to onnx"]),
        (["a.onnx", "--to", "torch"], ["a.onnx", ".pt2"]),
        (["a.onnx", "--to", "onnx", "--dtype", "float16"], ["--to onnx", "float32"]),
        (["a.safetensors", "--padding-mask"], ["--padding-mask", "--to safetensors"]),
        (["a.safetensors", "--to", "s3prl"], ["--to s3prl", "folder"]),
        (["", "--to", "huggingface"], [tmp_path, "exists"]),
    ):
        (tmp_path / "file").touch()
        assert main([str(teacher_file), str(tmp_path / arguments[0]), *arguments[1:]]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and re.search(says("error", *said), error), error
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
