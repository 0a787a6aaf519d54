"""Linear maps and convolutions with frozen weights, using the fastest exact kernel, found by timing.

The fastest library depends on the processor: MKL on many Intel processors, oneDNN by far on AMD's with AVX-512, and on
others it depends on the shape. Kernels differ only in the order of summation.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import threading
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Set

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skill_fairseq.modules.prepared import state_of

KERNELS = ("plain", "onednn_linear", "onednn_conv", "unfolded")
"""Names of kernels. ``plain``: torch's linear, and convolutions as matrix products over blocks, with MKL if torch has
it; ``onednn_linear`` and ``onednn_conv``: oneDNN with weights packed once; ``unfolded``: one product over overlapping
windows."""

SETTING = "SKILL_KERNELS"
"""Environment variable: ``plain`` for identical bits in every process, ``measured``, or a kernel's name to force it
where it is available."""

CACHE = "SKILL_KERNELS_CACHE"
"""Environment variable: a JSON file that stores measurements for other processes."""

LEAST_MACS = 1 << 22
"""Multiply-accumulates below which nothing is measured, because all kernels are fast."""
MOST_FRAMES = 8192
"""Frames to measure at most. Fewer fit into a cache, where kernels differ less."""
REPEATS = 5
ENOUGH_SECONDS = 0.15
"""Timed repeats, of which the minimum counts, and the time limit for them."""
GAIN = 0.92
"""A kernel replaces ``plain`` only if it takes less than this share of its time."""

_measured: Dict[str, str] = {}
_read: Set[str] = set()
_lock = threading.Lock()


def setting(default: str = "measured") -> str:
    """The kernel setting of the environment.

    Raises:
        ValueError: it is neither measured nor a kernel.
    """
    return check_setting(os.environ.get(SETTING) or default, SETTING)


def check_setting(value: str, field: str) -> str:
    """Checks a kernel setting and returns it.

    Raises:
        ValueError: it is neither measured nor a kernel.
    """
    if value not in ("measured", *KERNELS):
        raise ValueError(f"{field}: {value!r}; expected measured or one of {', '.join(KERNELS)}")
    return value


class Product:
    """A linear map or a strided convolution over rows of frames, with constant weights.

    It is neither copied nor saved with its module: a copy has None instead.

    Args:
        weight: (k, C, O), k = 1 for a linear map; float32 or bfloat16 on a CPU, otherwise ``plain`` is used.
        bias: (O,) or None.
        stride: frames.
        choice: "measured" or one of :data:`KERNELS`.
    """

    def __init__(self, weight: Tensor, bias: Optional[Tensor], stride: int = 1, choice: str = "measured") -> None:
        self.weight, self.bias, self.stride, self.choice = weight, bias, stride, choice
        self._made: Dict[str, Callable[[Tensor], Tensor]] = {}

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return _nothing, ()

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C) contiguous frames to (1 + (N - k) // stride, O), without gradients."""
        return self._kernel(self.chosen(x))(x)

    def chosen(self, x: Tensor) -> str:
        """Name of the kernel for such frames, measured if necessary."""
        size, inputs, outputs = self.weight.shape
        plain = x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16)
        if self.choice == "plain" or plain or len(x) * size * inputs * outputs < LEAST_MACS * self.stride:
            return "plain"
        if self.choice != "measured":
            return self.choice if self._kernel(self.choice) is not self._kernel("plain") else "plain"
        x = x[:MOST_FRAMES]
        # Similar numbers of frames share a choice.
        shape = f"{size}x{inputs}x{outputs}/{self.stride}x{1 << (len(x) - 1).bit_length()}"
        key = f"{machine()} {torch.get_num_threads()} {x.dtype} {shape}"
        found = _measured.get(key)
        if found is None:
            with _lock:
                _recall()
                found = _measured.get(key) or self._measure(x)
                _measured[key] = found
                _remember()
        return found

    def seconds(self, x: Tensor, clock: Optional[Callable[[], float]] = None) -> Dict[str, float]:
        """Minimum time of each available kernel that agrees with ``plain``, by a clock."""
        wanted = self._kernel("plain")(x)
        limit = (1e-5 if x.dtype == torch.float32 else 2e-2) * float(wanted.abs().max())
        kernels = {"plain": self._kernel("plain")}
        for name in KERNELS[1:]:
            kernel = self._kernel(name)
            # oneDNN gave wrong results on some processors.
            if kernel is not kernels["plain"] and float((kernel(x) - wanted).abs().max()) <= limit:
                kernels[name] = kernel
        best = {name: float("inf") for name in kernels}
        # A single thread's own time counts, because others may use the processor meanwhile.
        clock = clock or (time.perf_counter if torch.get_num_threads() > 1 else time.thread_time)
        began = time.perf_counter()
        for _ in range(REPEATS):
            for name, kernel in kernels.items():
                start = clock()
                kernel(x)
                best[name] = min(best[name], clock() - start)
            if time.perf_counter() - began > ENOUGH_SECONDS:
                break
        return best

    def _measure(self, x: Tensor) -> str:
        best = self.seconds(x)
        fastest = min(best, key=lambda name: best[name])
        return fastest if best[fastest] < GAIN * best["plain"] else "plain"

    def _kernel(self, name: str) -> Callable[[Tensor], Tensor]:
        """The kernel with a name, or plain if this torch lacks it or it does not support the shape."""
        if name not in self._made:
            try:
                made = getattr(self, f"_make_{name}")()
            except (AttributeError, NotImplementedError, RuntimeError):  # torch < 2.0, or built without oneDNN
                made = None
            self._made[name] = self._kernel("plain") if made is None else made
        return self._made[name]

    def _make_plain(self) -> Callable[[Tensor], Tensor]:
        weight, bias, stride = self.weight, self.bias, self.stride
        if len(weight) == 1 and stride == 1:
            by_output = weight[0].t()
            return lambda x: F.linear(x, by_output, bias)
        parts = [part.reshape(-1, part.size(2)) for part in weight.split(stride)]

        def blocks(x: Tensor) -> Tensor:
            whole = (len(x) - len(weight)) // stride + 1
            x = x if len(x) % stride == 0 else F.pad(x, (0, 0, 0, -len(x) % stride))
            rows = x.view(len(x) // stride, -1)
            out = x.new_empty(len(rows), weight.size(2))
            for shift, part in enumerate(parts):
                used = rows[shift:, : len(part)]
                if shift:
                    out[: len(used)].addmm_(used, part)
                elif bias is None:
                    torch.mm(used, part, out=out)
                else:
                    torch.addmm(bias, used, part, out=out)
            return out[:whole]

        return blocks

    def _make_unfolded(self) -> Optional[Callable[[Tensor], Tensor]]:
        (size, inputs, outputs), stride = self.weight.shape, self.stride
        if size == 1:
            return None
        by_output = self.weight.reshape(-1, outputs).t().contiguous()

        def unfolded(x: Tensor) -> Tensor:
            rows = (len(x) - size) // stride + 1
            return F.linear(x.as_strided((rows, size * inputs), (stride * inputs, 1)), by_output, self.bias)

        return unfolded

    def _make_onednn_linear(self) -> Optional[Callable[[Tensor], Tensor]]:
        if len(self.weight) != 1 or self.stride != 1 or not torch.backends.mkldnn.is_available():
            return None
        multiply = torch.ops.mkldnn._linear_pointwise
        packed = torch.ops.mkldnn._reorder_linear_weight(self.weight[0].t().contiguous())
        return lambda x: multiply(x, packed, self.bias, "none", [], "")

    def _make_onednn_conv(self) -> Optional[Callable[[Tensor], Tensor]]:
        if not torch.backends.mkldnn.is_available():
            return None
        convolve, strides = torch.ops.mkldnn._convolution_pointwise, [1, self.stride]
        kernel = self.weight.permute(2, 1, 0)[:, :, None].contiguous(memory_format=torch.channels_last)
        shape = [1, self.weight.size(1), 1, 512]
        packed = torch.ops.mkldnn._reorder_convolution_weight(kernel, [0, 0], strides, [1, 1], 1, shape)

        def convolution(x: Tensor) -> Tensor:
            image = x.view(1, 1, *x.shape).permute(0, 3, 1, 2)  # (1, C, 1, N), channels last as they are
            y = convolve(image, packed, self.bias, [0, 0], strides, [1, 1], 1, "none", [], "")
            return y.permute(0, 2, 3, 1).reshape(-1, y.size(1))  # type: ignore[no-any-return]

        return convolution


def _nothing() -> None:
    return None


class FrozenLinear(Product):
    """The product of an ``nn.Linear``, valid as long as its weights do not change."""

    def __init__(self, layer: nn.Linear, choice: str) -> None:
        super().__init__(layer.weight.detach().t().unsqueeze(0), _detached(layer.bias), 1, choice)
        self._state = state_of(layer)

    def serves(self, layer: nn.Linear, x: Tensor) -> bool:
        """Whether the layer can be bypassed: no gradients, no hooks, and no changes."""
        return not (
            torch.is_grad_enabled()
            or layer._forward_hooks
            or layer._forward_pre_hooks
            or x.dtype != self.weight.dtype
            or _autocasts(x)
            or self._state != state_of(layer)
        )


def choose_for_linears(module: nn.Module, choice: str) -> None:
    """Makes :func:`linear` measure for all plain linear layers of a module."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__dict__["_kernels"] = None if choice == "plain" else FrozenLinear(layer, choice)


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``, with the kernel chosen for its weights, if any."""
    product = layer.__dict__.get("_kernels")
    if product is None or not product.serves(layer, x):
        return layer(x)  # type: ignore[no-any-return]
    return product(x.reshape(-1, x.size(-1))).view(*x.shape[:-1], -1)  # type: ignore[no-any-return]


def chosen() -> Dict[str, int]:
    """Number of shapes assigned to each kernel in this process."""
    names: List[str] = list(_measured.values())
    return {name: names.count(name) for name in KERNELS if name in names}


@functools.cache
def machine() -> str:
    """Processor and torch version, for which a measurement is valid."""
    return f"{_processor()} torch {torch.__version__}"


@functools.cache
def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    wanted = ("model name", "cpu family", "model\t", "stepping")
    found = list(dict.fromkeys(line.partition(":")[2].strip() for line in lines if line.startswith(wanted)))
    return " ".join(found) or platform.processor() or platform.machine()


@functools.cache
def has_vnni() -> bool:
    """Whether the processor sums products of 8-bit numbers in 32 bits."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "vnni" in cpuinfo.read_text() or platform.machine() in ("aarch64", "arm64")


def _recall() -> None:
    """Reads the file of measurements once; an unreadable file counts as empty."""
    path = os.environ.get(CACHE)
    if not path or path in _read:
        return
    _read.add(path)
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        _measured.update({key: name for key, name in found.items() if name in KERNELS})
    except (OSError, ValueError, AttributeError):
        return


def _remember() -> None:
    """Writes the file of measurements; failures give one warning and no error."""
    path = os.environ.get(CACHE)
    if not path:
        return
    temporary = Path(f"{path}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(_measured, indent=1, sort_keys=True), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        warnings.warn(f"{CACHE}: {path} cannot be written ({error}); measurements are not saved", stacklevel=2)


def _detached(bias: Optional[Tensor]) -> Optional[Tensor]:
    return None if bias is None else bias.detach()


def _autocasts(x: Tensor) -> bool:
    if hasattr(torch, "get_autocast_dtype"):
        return bool(torch.is_autocast_enabled(x.device.type))
    return bool(torch.is_autocast_cpu_enabled())
