"""ONNX graphs in int8 with the scales that training has found, as QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from skill_fairseq.exporting.onnx_graph import import_onnx
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.fake_quantize import (
    InputRange,
    check_ranges,
    quantize_weight,
    quantized_modules,
    range_of,
    steps_of,
    whole_weight,
)

PRODUCTS = ("MatMul", "Conv")


def to_trained_int8(model: Any, encoder: SpeechEncoder) -> Any:
    """The graph with the rounding of the encoder's training: int8 weights, a scale an output channel; uint8 inputs.

    Nothing is calibrated. The extractor's convolutions but the first have int8 weights and float32 inputs; that one,
    norms, softmax, activation functions and position bias are those of the float32 graph.

    Args:
        model: of :func:`skill_fairseq.exporting.onnx_graph.make_onnx`; left as it is.
        encoder: the one that it was made of, trained with ``model.quantize=int8``.

    Returns:
        a new model.

    Raises:
        ValueError: the encoder has no ranges, or none for a layer of the graph, which training did not reach.
    """
    check_ranges(encoder)
    onnx = import_onnx()
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    products: dict[str, Any] = {}
    for node in graph.node:
        if node.op_type in PRODUCTS and node.input[1] in constants:
            products.setdefault(node.name.partition("/")[0].removesuffix(".conv"), []).append(node)
    before: dict[str, list[Any]] = {}  # nodes that go ahead of a product, by its name
    rounded: dict[tuple[str, float, int], str] = {}  # query, key and value hear the same
    for name, module in quantized_modules(encoder):
        place = ".".join(name.split(".")[:3])
        if name not in products and not any(scope.startswith(f"{place}.") for scope in products):
            continue  # a layer above the deepest that the graph puts out
        (node,) = products[name]
        steps, scale = quantize_weight(whole_weight(module))
        if node.op_type == "MatMul":
            steps = steps.t()
        graph.initializer.remove(constants[node.input[1]])
        nodes = before[node.name] = []
        node.input[1] = _dequantized(graph, nodes, name, steps, scale, axis=1 if node.op_type == "MatMul" else 0)
        one = range_of(module)
        if one is None:
            continue
        if not one.known:
            raise ValueError(
                f"quantize: {name} has no range, because no objective reached it in training; export only layers that "
                "were trained (--layers)"
            )
        key = (node.input[0], *_steps(one))
        if key not in rounded:
            rounded[key] = _rounded(graph, nodes, name, *key)
        node.input[0] = rounded[key]
    nodes = [one for node in graph.node for one in (*before.get(node.name, ()), node)]
    graph.ClearField("node")
    graph.node.extend(nodes)
    onnx.checker.check_model(made)
    return made


def _steps(one: InputRange) -> tuple[float, int]:
    scale, zero = steps_of(one.bounds.cpu())
    return float(scale), int(zero)


def _rounded(graph: Any, nodes: list[Any], name: str, tensor: str, scale: float, zero: int) -> str:
    """Adds nodes that round a tensor; returns the name of what they put out."""
    helper = import_onnx().helper
    constants = [
        _constant(graph, f"{name}.input_scale", np.array(scale, dtype=np.float32)),
        _constant(graph, f"{name}.input_zero", np.array(zero, dtype=np.uint8)),
    ]
    names = [f"{name}.input_{kind}" for kind in ("steps", "rounded")]
    nodes += [
        helper.make_node("QuantizeLinear", [tensor, *constants], names[:1], f"{name}/QuantizeLinear"),
        helper.make_node("DequantizeLinear", [names[0], *constants], names[1:], f"{name}/DequantizeLinear"),
    ]
    return names[1]


def _dequantized(graph: Any, nodes: list[Any], name: str, steps: Tensor, scale: Tensor, axis: int) -> str:
    """Adds a weight in steps and the node that makes it float32; returns the name of what that puts out."""
    constants = [
        _constant(graph, f"{name}.weight_steps", steps.cpu().contiguous().numpy()),
        _constant(graph, f"{name}.weight_scale", scale.cpu().numpy()),
        _constant(graph, f"{name}.weight_zero", np.zeros(len(scale), dtype=np.int8)),
    ]
    out = f"{name}.weight_rounded"
    node = import_onnx().helper.make_node("DequantizeLinear", constants, [out], f"{name}/DequantizeLinear_weight")
    node.attribute.append(import_onnx().helper.make_attribute("axis", axis))
    nodes.append(node)
    return out


def _constant(graph: Any, name: str, value: np.ndarray) -> str:
    graph.initializer.append(import_onnx().numpy_helper.from_array(value, name))
    return name
