"""ONNX graphs in fewer bits: int8 by onnxruntime's own quantisers, and float16."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Optional

import numpy as np

from skill_fairseq.exporting.onnx_graph import import_onnx
from skill_fairseq.messages import require

PRECISIONS = ("fp32", "fp16", "int8")
FRONT = ("feature_extractor", "feature_projection")
"""Names of the modules that hear the audio. Their features of silence are small beside those of speech: 8 bits for both
would leave nothing of the small ones."""
EXACT = tuple(f"{FRONT[0]}.{part}" for part in ("layers.0.", "log_mel"))
"""Names of nodes that compute in float32 under float16 too: they hear the waveform. A spectrum by rounded weights would
hear its rounding in place of what is quiet."""
POSITIONS = "transformer.pos_conv"
SMALL = 1024
"""Weights of fewer numbers stay as they are."""


def to_int8(model: Any, batches: Optional[Iterable[np.ndarray]] = None) -> Any:
    """Linear layers compute in 8 bits: weights signed, of 7 bits and a scale for each output; activations unsigned.

    With 7 bits no processor's sum of two products overflows; kernels of AVX2 without VNNI otherwise would. All else,
    softmax and norms too, computes in float32. The audio front end keeps float16 weights, the positional convolution
    8-bit ones, which are made float32 as a session begins: their activations range too far for 8 bits.

    Args:
        model: of :func:`skill_fairseq.exporting.onnx_graph.make_onnx`; left as it is.
        batches: (B, N) float32 audio from which ranges of the activations are taken, which are then fixed
            (QuantizeLinear and DequantizeLinear around each product). None, and with them too for the second linear
            layer of feed-forward networks: each batch has ranges of its own (DynamicQuantizeLinear).

    Returns:
        a new model.

    Raises:
        ValueError: onnxruntime is missing, or there are no batches.
    """
    require("int8", "onnxruntime")
    onnx = import_onnx()
    from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static

    constants = {tensor.name for tensor in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in constants]
    linears = [node.name for node in products if not node.name.startswith(FRONT)]
    # An activation function's outputs have outliers: fixed ranges for them had twice the error, measured on speech.
    moving = linears if batches is None else [name for name in linears if _of_activated(name)]
    fixed = [name for name in linears if name not in moving]
    common = {"op_types_to_quantize": ["MatMul"], "per_channel": True, "reduce_range": True}
    with _quietly(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        if moving:
            quantize_dynamic(
                path,
                path,
                weight_type=QuantType.QInt8,
                nodes_to_quantize=moving,
                extra_options={"MatMulConstBOnly": True},
                **common,
            )
        if batches is not None and fixed:
            quantize_static(
                path,
                path,
                _Reader(batches, [value.name for value in model.graph.input]),
                weight_type=QuantType.QInt8,
                activation_type=QuantType.QUInt8,
                nodes_to_quantize=fixed,
                extra_options={"MatMulConstBOnly": True, "WeightSymmetric": True, "ActivationSymmetric": False},
                **common,
            )
        quantised = onnx.load(path)
    _store_small(quantised)
    onnx.checker.check_model(quantised)
    return quantised


def to_float16(model: Any) -> Any:
    """Weights and products in float16, for GPUs and accelerators; inputs and outputs stay float32.

    A spectrum, the first convolution and its norm compute in float32, as do all norms and softmax. A CPU computes
    float16 by way of float32: there it is half the file and no faster.

    Args:
        model: of :func:`skill_fairseq.exporting.onnx_graph.make_onnx`; left as it is.

    Raises:
        ValueError: onnxruntime is missing.
    """
    require("fp16", "onnxruntime")
    onnx = import_onnx()
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    first = [node.name for node in copied.graph.node if node.name.startswith(EXACT)]
    kept = [*DEFAULT_OP_BLOCK_LIST, "LayerNormalization", "InstanceNormalization", "Softmax"]
    with _quietly():
        converted = convert_float_to_float16(copied, keep_io_types=True, op_block_list=kept, node_block_list=first)
    converted.graph.ClearField("value_info")
    OnnxModel.graph_topological_sort(converted.graph)  # casts of the inputs were put last
    onnx.checker.check_model(converted)
    return converted


def _of_activated(name: str) -> bool:
    """Whether a product reads the activations of a feed-forward network, by its node's name."""
    return name.partition("/")[0].endswith((".ffn", ".fc2", ".fc2.down"))


def _store_small(model: Any) -> None:
    """Other weights: float16 in the front end, 8 bits and a scale for each output in the positional convolution.

    They are made float32 by operations on constants, which onnxruntime computes once, as it loads the model.
    """
    onnx = import_onnx()
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    before: list[Any] = []
    for node in model.graph.node:
        large = node.op_type == "Conv" or (node.op_type == "MatMul" and node.name.startswith(FRONT))
        large = large and not node.name.startswith(EXACT[1])
        tensor = tensors.get(node.input[1]) if large else None
        if tensor is None or np.prod(tensor.dims) < SMALL:
            continue
        weight, name = onnx.numpy_helper.to_array(tensor), tensor.name
        model.graph.initializer.remove(tensor)
        node.input[1] = f"{name}_float32"
        cast = onnx.helper.make_node("Cast", [f"{name}_small"], [node.input[1]], to=onnx.TensorProto.FLOAT)
        before.append(cast)
        if node.name.startswith(POSITIONS):
            scale = np.abs(weight).max(axis=(1, 2), keepdims=True) / 127
            scale[scale == 0] = 1
            small = np.round(weight / scale).astype(np.int8)
            cast.output[0] = f"{name}_steps"
            before.append(onnx.helper.make_node("Mul", [f"{name}_steps", f"{name}_scale"], [node.input[1]]))
            model.graph.initializer.append(onnx.numpy_helper.from_array(scale, f"{name}_scale"))
        else:
            small = weight.astype(np.float16)
        model.graph.initializer.append(onnx.numpy_helper.from_array(small, f"{name}_small"))
    nodes = [*before, *model.graph.node]
    for number, node in enumerate(before):
        node.name = f"{node.output[0]}/{node.op_type}_{number}"
    model.graph.ClearField("node")
    model.graph.node.extend(nodes)


class _Reader:
    """onnxruntime's CalibrationDataReader, which asks for nothing but these methods."""

    def __init__(self, batches: Iterable[np.ndarray], inputs: list[str]) -> None:
        self._batches, self._inputs, self._number = iter(batches), inputs, 0

    def get_next(self) -> Optional[dict[str, np.ndarray]]:
        """The next batch by the names of the inputs, None at the end."""
        batch = next(self._batches, None)
        if batch is None:
            if not self._number:
                raise ValueError("calibration: no audio; expected at least one recording")
            return None
        self._number += 1
        found = {"source": batch, "padding_mask": np.zeros(batch.shape, dtype=bool)}
        return {name: found[name] for name in self._inputs}


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the root logger's line for every tensor."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
