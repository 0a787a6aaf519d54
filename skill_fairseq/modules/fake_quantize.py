"""Products that are trained as int8 computes them: the forward pass rounds weights and inputs, gradients pass through.

Jacob et al. 2018 (arXiv:1712.05877): weights are signed, symmetric, of one scale an output channel, which follows from
the largest weight; inputs are unsigned, of one scale and one zero point for all of a tensor, which follow from moving
averages of its smallest and largest value. The straight-through gradient passes what lies in the range, and stops the
rest. Norms, softmax, activation functions, the gates of the position bias and the first convolution, which hears the
audio, stay in floating point. Of the extractor's other convolutions weights are rounded and inputs are not: silence is
small there beside speech. With 256 steps for both the first state was 8 % off (a tiny student, speech), and training
did not mend it.
"""

from __future__ import annotations

import math
from typing import Any, Iterator, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skill_fairseq.modules.fp32 import Float32Module
from skill_fairseq.modules.prepared import Prepared

QUANTIZE = ("none", "int8")
"""Values of ``model.quantize``."""
KEPT = ("grep_linear",)
"""Linear layers that stay in float32: a few outputs that gate the position bias."""
MOST = 63
"""Largest weight in steps: 7 of the 8 bits. Kernels of processors without VNNI add up two products in 16 bits, which
those of the full 8 bits would overflow, so that one graph would differ by processor. As in int8 after training."""
LEVELS = 255
"""Steps of an input's range."""
NEW_SHARE = 0.01
"""Least weight of an update in the moving averages; of the first updates all count alike."""
BOUNDS = "input_range.bounds"
"""Ending of the names under which ranges stand in a state dict."""

_LEAST = torch.finfo(torch.float32).tiny


def weight_scale(weight: Tensor) -> Tensor:
    """Step of each output channel: (O,) float32 of a weight (O, ...), the largest magnitude / 63."""
    return weight.detach().float().flatten(1).abs().amax(1).clamp(min=_LEAST * MOST) / MOST


def quantize_weight(weight: Tensor) -> Tuple[Tensor, Tensor]:
    """A weight in steps, as the fake-quantised forward rounds it.

    Args:
        weight: (O, ...).

    Returns:
        int8 of the same shape, from -63 to 63, and the (O,) float32 steps.
    """
    scale = weight_scale(weight)
    per_channel = (1.0 / scale).view(-1, *(1,) * (weight.dim() - 1))
    return (weight.detach().float() * per_channel).round().clamp(-MOST, MOST).to(torch.int8), scale


def dequantize_weight(steps: Tensor, scale: Tensor) -> Tensor:
    """Inverse of :func:`quantize_weight`: (O, ...) float32 of int8 and (O,)."""
    return steps.float() * scale.view(-1, *(1,) * (steps.dim() - 1))


def fake_quantize_weight(weight: Tensor) -> Tensor:
    """A weight (O, ...) rounded to steps of its output channels; the gradient passes as it is."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    scale = weight_scale(weight)
    zero = torch.zeros(scale.shape, dtype=torch.int32, device=scale.device)
    rounded = torch.fake_quantize_per_channel_affine(weight.to(wide), scale, zero, 0, -MOST, MOST)
    return rounded.to(weight.dtype)


def steps_of(bounds: Tensor) -> Tuple[Tensor, Tensor]:
    """Scale and zero point of a range, which is widened to hold 0: that is then exact.

    Args:
        bounds: (2,) float32, the smallest and the largest value.

    Returns:
        () float32 and () int32, from 0 to 255: x is near ``scale (round(x / scale + zero) - zero)``.
    """
    low, high = bounds.float()[0].clamp(max=0.0), bounds.float()[1].clamp(min=0.0)
    scale = ((high - low) / LEVELS).clamp(min=_LEAST)
    return scale, (-low / scale).round().clamp(0, LEVELS).to(torch.int32)


class InputRange(Float32Module):
    """The range of a product's input, and the input rounded to 256 values in it.

    Within an update the range stays as it is; what the update's batches reach is kept beside it, for
    :class:`Ranges` to average. Until the first update has ended, the range is that of what has been seen.

    Attributes:
        bounds: (2,) float32, smallest and largest value on average; both 0 until they are known.
        seen: (2,) smallest and largest value of the present update; not saved.
        observing: whether what comes in is looked at; None: in training.
    """

    bounds: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bounds", torch.zeros(2, dtype=torch.float32))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.float32), persistent=False)
        self.observing: Optional[bool] = None
        self._known: Optional[bool] = None  # asked once: on a GPU the host would wait in every forward
        self.forget()

    def forget(self) -> None:
        """Begins an update."""
        self.seen.copy_(torch.tensor([math.inf, -math.inf]))

    @property
    def known(self) -> bool:
        """Whether an update, or a file, has given the range."""
        if self._known is None:
            self._known = bool(self.bounds[1] > self.bounds[0])
        return self._known

    def set(self, bounds: Tensor) -> None:
        """Takes a (2,) range over."""
        self.bounds.copy_(bounds)
        self._known = self._known or None

    def forward(self, x: Tensor) -> Tensor:
        """Any shape and floating type to the same."""
        observing = self.training if self.observing is None else self.observing
        bounds = self.bounds
        if x.numel() and (observing or not self.known):
            own = torch.stack(torch.aminmax(x.detach())).float()
            if observing:
                own = torch.stack([torch.minimum(self.seen[0], own[0]), torch.maximum(self.seen[1], own[1])])
                self.seen.copy_(own)
            bounds = self.bounds if self.known else own
        scale, zero = steps_of(bounds)
        wide = torch.promote_types(x.dtype, torch.float32)
        return torch.fake_quantize_per_tensor_affine(x.to(wide), scale, zero, 0, LEVELS).to(x.dtype)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._known = None
        super()._load_from_state_dict(*arguments)


class QuantizedLinear(Prepared):
    """A linear layer whose weight and input are rounded as int8 would; its parameters are those of the layer.

    Args:
        layer: gives its weight (out, in) and bias (out,) or None.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = layer.weight
        self.bias = layer.bias
        self.input_range = InputRange()

    def layout(self) -> Tensor:
        """The rounded weight."""
        return fake_quantize_weight(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return F.linear(self.input_range(x), self.prepared(), self.bias)

    def extra_repr(self) -> str:
        """Shape, for ``print(module)``."""
        return f"{self.in_features}, {self.out_features}, int8"


class QuantizedConv(Prepared):
    """The same of a convolution without padding and groups.

    Args:
        conv: gives its weight (O, C, K), bias (O,) or None, and stride.
    """

    def __init__(self, conv: nn.Conv1d) -> None:
        super().__init__()
        self.weight, self.bias, self.stride = conv.weight, conv.bias, conv.stride
        self.input_range = InputRange()

    def layout(self) -> Tensor:
        """The rounded weight."""
        return fake_quantize_weight(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) to (B, O, T // stride)."""
        return F.conv1d(self.input_range(x), self.prepared(), self.bias, self.stride)


def quantize(encoder: Any) -> None:
    """Puts fake quantisation into the linear layers and convolutions of a :class:`SpeechEncoder`, in place."""
    extractor, transformer = encoder.feature_extractor, encoder.transformer
    for layer in extractor.layers[1:]:
        layer.rounds = True
    for module in transformer.pos_conv.modules():
        if "input_range" in vars(module):  # it is None there
            module.input_range = InputRange()
    if transformer.time_reduction is not None:
        transformer.time_reduction = QuantizedConv(transformer.time_reduction)
    for parent in list(encoder.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name not in KEPT:
                setattr(parent, name, QuantizedLinear(child))


def quantized_modules(encoder: nn.Module) -> Iterator[Tuple[str, Any]]:
    """Every module that rounds its weight, by its name."""
    for name, module in encoder.named_modules():
        if range_of(module) is not None or getattr(module, "rounds", False):
            yield name, module


def range_of(module: nn.Module) -> Optional[InputRange]:
    """The range by which a module rounds its input, None where it does not."""
    found = getattr(module, "input_range", None)
    return found if isinstance(found, InputRange) else None


def whole_weight(module: Any) -> Tensor:
    """The weight (O, ...) that a module of :func:`quantized_modules` rounds."""
    weight = module.conv.weight if hasattr(module, "conv") else module.weight
    return weight() if callable(weight) else weight  # type: ignore[no-any-return]


def without_quantization(encoder: Any) -> Any:
    """A copy with the same weights that rounds nothing, in evaluation mode; what is not quantised is given back."""
    if encoder.config.quantize == "none":
        return encoder
    plain = type(encoder)(encoder.config.replace(quantize="none"), encoder.dropouts)
    plain.to(next(encoder.parameters()))
    plain.load_state_dict({name: t for name, t in encoder.state_dict().items() if not name.endswith(BOUNDS)})
    plain.mask_embedding = encoder.mask_embedding
    return plain.eval()


def check_ranges(encoder: nn.Module) -> None:
    """Makes sure that an encoder has trained ranges.

    Raises:
        ValueError: it has none.
    """
    if not any(isinstance(module, InputRange) and module.known for module in encoder.modules()):
        raise ValueError("quantize: the encoder has no ranges of its int8 inputs; train it with model.quantize=int8")


class Ranges:
    """All ranges of a model, updated together after each update.

    Args:
        model: whose ranges they are; none where it is not quantised.
    """

    def __init__(self, model: nn.Module) -> None:
        self.ranges: Sequence[InputRange] = [m for m in model.modules() if isinstance(m, InputRange)]

    def watch(self, observing: Optional[bool]) -> None:
        """Sets :attr:`InputRange.observing`."""
        for one in self.ranges:
            one.observing = observing

    def forget(self) -> None:
        """Begins an update, on every rank."""
        for one in self.ranges:
            one.forget()

    @torch.no_grad()
    def follow(self, update: int, group: Any = None) -> None:
        """Ends an update: the averages take over what its batches have reached on all ranks.

        Args:
            update: number of the update, from 0: update n counts as 1 / (n + 1), but no less than 1 %.
            group: of ranks; None: torch's default, where that is initialised.

        A range of which nothing was seen, or something that is not finite, stays as it is.
        """
        if not self.ranges:
            return
        seen = torch.stack([one.seen for one in self.ranges])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            largest = torch.stack([-seen[:, 0], seen[:, 1]])
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=group)
            seen = torch.stack([-largest[0], largest[1]], 1)
        before = torch.stack([one.bounds for one in self.ranges])
        first = ~(before[:, 1:] > before[:, :1])
        share = torch.where(first, torch.ones_like(before), torch.full_like(before, max(1 / (update + 1), NEW_SHARE)))
        after = before + share * (seen - before)
        after = torch.where(torch.isfinite(seen).all(1, keepdim=True), after, before)
        for one, bounds in zip(self.ranges, after):
            one.set(bounds)
            one.forget()
