"""ONNX with fewer bits, with chosen outputs, and in the form that onnxruntime fuses, checked in onnxruntime."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from messages import says

from skill_fairseq.exporting.accuracy import compare, run_encoder
from skill_fairseq.exporting.onnx_graph import describe, make_onnx, output_names
from skill_fairseq.exporting.traceable import NEEDED_TORCH

OLD_TORCH = tuple(int(number) for number in torch.__version__.split("+")[0].split(".")[:2]) < NEEDED_TORCH
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(OLD_TORCH, reason=f"torch.export needs torch >= 2.6; this is {torch.__version__}"),
]


@pytest.fixture(scope="module")
def graph(export):
    """The student's float32 graph."""
    import onnx

    return onnx.load(export("onnx"))


def waves(speech):
    """(1, N) samples of every utterance."""
    return [source[~padding][None] for source, padding in zip(*speech)]


def accuracy(model, student, speech):
    from skill_fairseq.exporting.onnx_encoder import OnnxEncoder

    encoder = OnnxEncoder(model.SerializeToString(), threads=1)
    return compare(run_encoder(student, encoder.outputs), encoder.states, waves(speech))


def optimised(model, folder):
    """Counts of the operators that onnxruntime runs."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options)
    return Counter(node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node)


def test_onnxruntime_fuses_every_gelu_and_norm(graph, student, tmp_path):
    written, run = Counter(node.op_type for node in graph.graph.node), optimised(graph, tmp_path)
    units = [units for units in student.config.ffn_dims if units]
    assert written["Erf"] == 7 + 1 + len(units)  # convolutions, positions, feed-forward networks
    assert run["Gelu"] + run["BiasGelu"] == written["Erf"] and not run["Erf"]
    assert run["LayerNormalization"] >= 1 and run["GatherND"] <= 1  # position bias is computed once, not in every layer


@pytest.mark.formats("out", "ONNX in int8", "onnxruntime")
def test_int8_of_speech_stays_about_a_hundredth(graph, student, speech, tmp_path):
    import onnx

    from skill_fairseq.exporting.onnx_precision import FRONT, to_int8

    before = graph.SerializeToString()
    weights = {tensor.name for tensor in graph.graph.initializer}
    products = [node for node in graph.graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    linears = [node for node in products if not node.name.startswith(FRONT)]
    for batches in (None, [wave.numpy() for wave in waves(speech)]):
        small = to_int8(graph, batches)
        onnx.checker.check_model(small)
        found = accuracy(small, student, speech)
        assert 1e-4 < found.worst()[1] < 0.012 and min(found.cosine.values()) > 0.9999, found
        kinds = Counter(node.op_type for node in small.graph.node)
        if batches is None:
            assert kinds["MatMulInteger"] == len(linears) and not kinds["QuantizeLinear"]
        else:  # the second linear layers of feed-forward networks have outliers, so their ranges stay dynamic
            assert kinds["MatMulInteger"] == len([u for u in student.config.ffn_dims if u]) and kinds["QuantizeLinear"]
        matrices = [t for t in small.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) > 1]
        assert max(math.prod(tensor.dims) for tensor in matrices) < 2000  # no large weight in float32 is left
        assert len(small.SerializeToString()) < len(before) / 1.5
    assert graph.SerializeToString() == before


@pytest.mark.formats("out", "ONNX in fp16", "onnxruntime")
def test_fp16_keeps_float32_at_the_door(graph, student, speech):
    from skill_fairseq.exporting.onnx_precision import to_float16

    small = to_float16(graph)
    assert all(value.type.tensor_type.elem_type in (1, 9) for value in (*small.graph.input, *small.graph.output))
    assert 0 < accuracy(small, student, speech).worst()[1] < 0.001
    assert len(small.SerializeToString()) < 0.65 * len(graph.SerializeToString())


def test_no_audio_to_calibrate_with_is_said(graph):
    from skill_fairseq.exporting.onnx_precision import to_int8

    with pytest.raises(ValueError, match=says("calibration", "no audio")):
        to_int8(graph, [])


def every_value(model):
    """Inputs, outputs and everything between, with the shapes that ONNX infers."""
    import onnx.shape_inference

    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    assert len(graph.value_info) > 20
    return [*graph.input, *graph.output, *graph.value_info]


def test_chosen_layers_and_a_fixed_length(exporting, small, tmp_path):
    from skill_fairseq.exporting.onnx_encoder import OnnxEncoder

    encoder = small.random_encoder(conv_feature_layers="[(16,10,5)] + [(16,3,4)]", encoder_layers=3, normalize=True)
    model = make_onnx(encoder, layers=[2, 0], samples=1600)
    assert not any("layers.2" in node.name and node.name.startswith("transformer") for node in model.graph.node)
    describe(model, encoder, {"source": "x"}, layers="2,0")
    sizes = [d for value in every_value(model) for d in value.type.tensor_type.shape.dim]
    assert sizes and all(d.HasField("dim_value") for d in sizes)  # as accelerators want it
    graph = OnnxEncoder(model.SerializeToString())
    assert graph.outputs == ["hidden_state_2", "hidden_state_0"] and (graph.samples, graph.normalize) == (1600, True)
    assert graph.info["opset"] == 18 and graph.info["layers"] == "2,0"
    source = torch.randn(1, 1600, generator=torch.Generator().manual_seed(0))
    wanted, found = exporting.states_of(encoder, source), graph.states(source)
    exporting.assert_same(list(found.values()), [wanted[2], wanted[0]])
    for shape in ((1, 1601), (2, 1600), (1600,)):
        with pytest.raises(ValueError, match=says("source", shape, "(1, 1600)")):
            graph(np.zeros(shape, dtype=np.float32))
    audio = torch.randn(9000, generator=torch.Generator().manual_seed(1)).numpy()
    found = list(graph.stream(audio, chunk_seconds=0.05, context_seconds=0.02))
    frames = encoder.config.num_frames(9000)
    assert sum(out["hidden_state_2"].shape[1] for out in found) == frames > 400
    with pytest.raises(ValueError, match=says("chunk_seconds", 1600)):
        next(graph.stream(audio, chunk_seconds=0.1, context_seconds=0.02))
    assert output_names(3) == ["x", *(f"hidden_state_{i}" for i in range(4))] and output_names(3, []) == ["x"]


def test_a_stream_with_all_of_the_audio_as_context_is_the_whole(graph, student):
    from skill_fairseq.exporting.onnx_encoder import OnnxEncoder

    encoder = OnnxEncoder(graph.SerializeToString(), threads=1)
    audio = torch.randn(50_123, generator=torch.Generator().manual_seed(0)).numpy() * 0.1
    whole = encoder(audio[None])
    found = list(encoder.stream(audio, chunk_seconds=1.0, context_seconds=60.0))
    assert [out["x"].shape[1] for out in found] == [50, 50, 50, 6]
    for name in encoder.outputs:
        np.testing.assert_allclose(np.concatenate([out[name] for out in found], 1), whole[name], rtol=1e-4, atol=1e-5)
