"""Encoders whose products are of bfloat16 (linear maps, convolutions) or int8 (linear maps), for inference on CPUs.

The first convolution, norms, softmax, gates of the position bias and sums over layers stay in float32. int8 weights
have a scale for each output; activations get theirs from the values of the moment. In int8 all convolutions stay in
float32: what they hear ranges too far, the first state was 16 % off (a tiny teacher, speech). An encoder that was
trained in int8 (``model.quantize``) keeps its own scales; float32 multiplies what its convolutions have rounded.
"""

from __future__ import annotations

import functools
import time
import warnings
from typing import TYPE_CHECKING, Any, Callable, Optional, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skill_fairseq.modules.fake_quantize import (
    KEPT,
    QuantizedLinear,
    check_ranges,
    dequantize_weight,
    quantize_weight,
    steps_of,
)
from skill_fairseq.modules.kernels import Product, has_vnni

if TYPE_CHECKING:
    from skill_fairseq.modules.encoder import SpeechEncoder

PRECISIONS = ("fp32", "bf16", "int8")
Module = TypeVar("Module", bound=nn.Module)


class LowLinear(nn.Module):
    """A linear map of frozen weights in low precision: float32 in, float32 out.

    Args:
        weight: (out, in).
        bias: (out,) or None.
        precision: "bf16" or "int8".
    """

    def __init__(self, weight: Tensor, bias: Optional[Tensor], precision: str) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.precision = precision
        self._multiply = _bf16(weight, bias) if precision == "bf16" else _int8(weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return self._multiply(x.float())

    def __deepcopy__(self, memo: Any) -> LowLinear:
        return self  # nothing in it changes

    def extra_repr(self) -> str:
        """Shape and precision, for ``print(module)``."""
        return f"{self.in_features}, {self.out_features}, {self.precision}"


class TrainedLinear(nn.Module):
    """A :class:`QuantizedLinear` for inference, with int8 weights: what was trained, float32 in, float32 out.

    The product is of int8 where torch has it for inputs of fixed scale; else float32 multiplies what was rounded.
    """

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        self.input_range = layer.input_range
        self._steps, self._scale = quantize_weight(layer.weight)
        self._bias = None if layer.bias is None else layer.bias.detach().float()
        scale, zero = steps_of(layer.input_range.bounds)
        self._packed = _pack(self._steps, self._scale, self._bias)
        self._input = float(scale), int(zero)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        if self._packed is None:
            return F.linear(self.input_range(x.float()), dequantize_weight(self._steps, self._scale), self._bias)
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        return product(x.float().contiguous(), *self._input, self._packed)  # type: ignore[no-any-return]

    def __deepcopy__(self, memo: Any) -> TrainedLinear:
        return self  # nothing in it changes

    def extra_repr(self) -> str:
        """Shape, for ``print(module)``."""
        return f"{self.in_features}, {self.out_features}, int8 as trained"


class LowConv(Product):
    """A strided convolution of the extractor in bfloat16: one product over windows that overlap."""

    def __init__(self, weight: Tensor, bias: Optional[Tensor], stride: int) -> None:
        super().__init__(weight, bias, stride, "plain")
        self._multiply = _bf16(weight.reshape(-1, weight.size(2)).t().contiguous(), bias)

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C) float32 frames to (1 + (N - k) // stride, O)."""
        size, inputs, _ = self.weight.shape
        rows = (len(x) - size) // self.stride + 1
        return self._multiply(x.as_strided((rows, size * inputs), (self.stride * inputs, 1)))


def _bf16(weight: Tensor, bias: Optional[Tensor]) -> Callable[[Tensor], Tensor]:
    weight, bias = weight.detach().bfloat16(), None if bias is None else bias.detach().float()

    def multiply(x: Tensor) -> Tensor:
        y = F.linear(x.bfloat16(), weight).float()
        return y if bias is None else y + bias

    return multiply


def _int8(weight: Tensor, bias: Optional[Tensor]) -> Callable[[Tensor], Tensor]:
    weight, bias = weight.detach().float(), None if bias is None else bias.detach().float()
    # Without VNNI products are added up in pairs in 16 bits, which 8 bits of weight and of activation would overflow;
    # 7 bits of weight lose less than 7 of activation (measured on speech).
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of quantised tensors, not of these products
        scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny).double() / (127 if has_vnni() else 63)
        zero = torch.zeros(len(weight), dtype=torch.long)
        quantised = torch.quantize_per_channel(weight, scale, zero, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(quantised, bias)
    return lambda x: torch.ops.quantized.linear_dynamic(x.contiguous(), packed, False)  # type: ignore[no-any-return]


def _pack(steps: Tensor, scale: Tensor, bias: Optional[Tensor]) -> Any:
    """Weights as torch's int8 product wants them; None where it has none of inputs in fixed steps."""
    if not hasattr(torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32"):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zero = torch.zeros(len(scale), dtype=torch.long)
        # Already in steps: nothing is rounded once more.
        weight = torch._make_per_channel_quantized_tensor(steps, scale.double(), zero, 0)
        return torch.ops.quantized.linear_prepack(weight, bias)


def lower(module: Module, precision: str) -> Module:
    """Turns an encoder, or a linear layer, into one that multiplies in low precision.

    Args:
        module: changed in place where it is an encoder, and prepared: from here on it is for inference only, on CPUs.
        precision: "fp32" leaves it as it is.

    Returns:
        the encoder, or what stands in for the layer. What products in this precision gain here is measured, and a
        warning says where they do not.

    Raises:
        ValueError: there is no such precision, the module is not on a CPU, has gates or other tools' layers, or this
            torch cannot multiply so.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: {precision!r}; expected one of {', '.join(PRECISIONS)}")
    if precision == "fp32":
        return module
    device = next(module.parameters()).device.type
    if device != "cpu":
        raise ValueError(f"precision: {precision!r} is for CPUs, the encoder is on {device}; use encoder.half() there")
    units = getattr(getattr(module, "config", None), "pruning_units", None)
    if units:
        raise ValueError(
            f"precision: {precision!r}; the encoder has gates ({', '.join(units)}): cut them out first with "
            "skill-shrink CHECKPOINT shrunk.safetensors"
        )
    trained = getattr(getattr(module, "config", None), "quantize", "none")
    if trained != "none":
        if precision != "int8":
            raise ValueError(f"precision: {precision!r}; the encoder was trained in int8: expected int8 or fp32")
        check_ranges(module)
    try:
        if isinstance(module, nn.Linear):
            return LowLinear(module.weight, module.bias, precision)  # type: ignore[return-value]
        ratio = cost(precision)
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, QuantizedLinear):
                    if child.input_range.known:  # otherwise training did not reach it: its range stays the input's own
                        setattr(parent, name, TrainedLinear(child))
                elif type(child) is nn.Linear and name not in KEPT:
                    setattr(parent, name, LowLinear(child.weight, child.bias, precision))
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"precision: {precision!r}; torch {torch.__version__} cannot here ({reason})") from error
    encoder: SpeechEncoder = module  # type: ignore[assignment]
    encoder.feature_extractor.bf16 = precision == "bf16"
    encoder.prepare()
    if ratio > 1:
        warnings.warn(
            f"precision: {precision!r} gains nothing on this processor, where a product takes {ratio:.1f} times as "
            "long as in float32; use fp32" + (" or int8" if precision == "bf16" else ""),
            stacklevel=3,
        )
    return module


def cost(precision: str) -> float:
    """Time of a product in this precision, as a multiple of that in float32: the least of three, in turn."""
    # No random numbers: the caller's stay as they are.
    weight, bias, x = (torch.linspace(-1, 1, n) for n in (512 * 512, 512, 256 * 512))
    weight, x = weight.view(512, 512), x.view(256, 512)
    low, best = LowLinear(weight, bias, precision), [float("inf")] * 2
    kernels: tuple[Callable[[Tensor], Tensor], ...] = (functools.partial(F.linear, weight=weight, bias=bias), low)
    with torch.no_grad():
        for turn in range(4):
            for i, multiply in enumerate(kernels):
                began = time.perf_counter()
                multiply(x)
                best[i] = min(best[i], time.perf_counter() - began) if turn else best[i]
    return best[1] / best[0]
