"""Reduced-precision ONNX graphs: int8 with onnxruntime's quantisers, and float16."""

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
"""Modules of the audio front end. Their features of silence are small compared to those of speech, and would vanish in
8 bits for both."""
EXACT = tuple(f"{FRONT[0]}.{part}" for part in ("layers.0.", "log_mel"))
"""Names of nodes that stay float32 under float16 too, because they read the waveform. Rounded weights of a spectrum
would add noise to its quiet parts."""
POSITIONS = "transformer.pos_conv"
SMALL = 1024
"""Smaller weights are not changed."""


def to_int8(model: Any, batches: Optional[Iterable[np.ndarray]] = None) -> Any:
    """Quantises linear layers to 8 bits: signed 7-bit weights with a scale per output, unsigned activations.

    With 7 bits no processor's sum of two products overflows, as it would on AVX2 without VNNI. All else, including
    softmax and norms, computes in float32. The audio front end stores float16 weights and the positional convolution
    8-bit weights; both are converted to float32 at the start of a session, because their activations need a wider range
    than 8 bits.

    Args:
        model: a model from :func:`skill_fairseq.exporting.onnx_graph.make_onnx`; not modified.
        batches: (B, N) float32 audio to determine fixed ranges of the activations (QuantizeLinear and DequantizeLinear
            around each product). The second linear layer of feed-forward networks, and with None all layers, determine
            their ranges per batch (DynamicQuantizeLinear).

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
    # Outputs of an activation function have outliers: with fixed ranges the error on speech was twice as large.
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
    """Converts weights and products to float16, for GPUs and accelerators; inputs and outputs stay float32.

    A log-mel spectrum, the first convolution, all norms and softmax compute in float32. A CPU computes float16 through
    float32: there the file is half as large, but not faster.

    Args:
        model: a model from :func:`skill_fairseq.exporting.onnx_graph.make_onnx`; not modified.

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
    OnnxModel.graph_topological_sort(converted.graph)  # the converter appends the inputs' casts at the end
    onnx.checker.check_model(converted)
    return converted


def _of_activated(name: str) -> bool:
    """Whether a product's input is a feed-forward network's activation, from its node's name."""
    return name.partition("/")[0].endswith((".ffn", ".fc2", ".fc2.down"))


def _store_small(model: Any) -> None:
    """Stores other weights as float16 in the front end, and as 8 bits with a scale per output in the positional
    convolution.

    Operations on constants convert them to float32; onnxruntime computes these once, when it loads the model.
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
    """onnxruntime's CalibrationDataReader, which needs only these methods."""

    def __init__(self, batches: Iterable[np.ndarray], inputs: list[str]) -> None:
        self._batches, self._inputs, self._number = iter(batches), inputs, 0

    def get_next(self) -> Optional[dict[str, np.ndarray]]:
        """The next batch by input name, None at the end."""
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
    """Suppresses the root logger's line for every tensor."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
