"""The result of an importer, and the encoder built from it, which accounts for every weight of the file."""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch
import torch.overrides
from torch import Tensor, nn

from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.size import count_parameters, widths_of

logger = logging.getLogger(__name__)

Rules = tuple[tuple[str, str], ...]
State = dict[str, Tensor]

ADDED_HERE = ("feature_extractor.scale",)
"""Our names that no foreign file has; their initial values are right."""


class EncoderSource(NamedTuple):
    """An encoder as found in a file.

    Attributes:
        format: the recognised kind of file, in words.
        config: the shape.
        state: tensors by the file's names.
        foreign_name: maps our name to the file's.
        ignorable: regular expressions of names that do not belong to the encoder.
        optional: our names that the file may lack.
        provenance: the file's own record of its origin.
        assumed: choices made here because the file leaves them open, in words.
        mask_embedding: the file's name of the mask embedding; empty if it has no trained one.
    """

    format: str
    config: EncoderConfig
    state: State
    foreign_name: Callable[[str], str]
    ignorable: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = {}
    assumed: tuple[str, ...] = ()
    mask_embedding: str = ""


def renaming(rules: Rules) -> Callable[[str], str]:
    """A function that rewrites names by the first matching rule (pattern of the beginning, replacement)."""

    def rename(name: str) -> str:
        for pattern, replacement in rules:
            if re.match(pattern, name):
                return re.sub(pattern, replacement, name, count=1)
        return name

    return rename


def weight_norm_spelling(name: str) -> str:
    """Unifies the names of the positional convolution's weights, which torch has renamed."""
    return name.replace("parametrizations.weight.original0", "weight_g").replace(
        "parametrizations.weight.original1", "weight_v"
    )


def build_encoder(source: EncoderSource, path: Path) -> SpeechEncoder:
    """Builds the encoder in float32 with the source's weights, without copying them if torch can.

    Weights of other parts of a model (heads, quantisers) are ignored; see :func:`left_out`.

    Raises:
        ValueError: weights are missing, left over, not finite, or their shapes differ from the config; lists them.
    """
    with reading_file(path):
        return _build(source, path)


def _build(source: EncoderSource, path: Path) -> SpeechEncoder:
    _check_size(source, path)
    encoder = _hollow(source.config)
    encoder.gather_gates(source.state, source.foreign_name("gates.log_alpha")[: -len("gates.log_alpha")])
    state: State = {}
    missing, misshapen, not_finite, used = [], [], [], {source.mask_embedding}
    for name, wanted in encoder.state_dict().items():
        foreign = source.foreign_name(name)
        found = source.state.get(foreign)
        used.add(foreign)
        if found is None:
            if name not in source.optional:
                missing.append(foreign)
            state[name] = wanted
        elif found.shape != wanted.shape or found.is_floating_point() != wanted.is_floating_point():
            misshapen.append(f"{foreign} {_shape(found)} instead of {_shape(wanted)}")
        elif not torch.isfinite(found).all():
            not_finite.append(foreign)
        else:
            state[name] = found.detach().to(wanted.dtype)
    problems = [
        f"{len(names)} {kind}: {_shorten(names)}"
        for kind, names in (
            ("missing", missing),
            ("left over", _left_over(source, used, of_the_encoder=True)),
            ("with another shape", misshapen),
            ("with NaN or infinite values", not_finite),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"{path}: recognised as {source.format}, but its weights do not fit its config; " + "; ".join(problems)
            if len(problems) > 1 or not not_finite
            else f"{path}: recognised as {source.format}, but its weights are damaged; {problems[0]}"
        )
    _fill(encoder, state)
    encoder.mask_embedding = _mask_embedding(source, path)
    for assumption in source.assumed:
        logger.warning(f"{path}: {assumption}")
    unused = _left_over(source, used, of_the_encoder=False)
    if unused:
        logger.info(f"{path}: ignored, as the encoder does not need them: {_shorten(unused)}")
    return encoder


def _mask_embedding(source: EncoderSource, path: Path) -> Tensor | None:
    """(D,) float32, or None and a warning if the file's is not usable, since most encoders do not need it."""
    found = source.state.get(source.mask_embedding)
    if found is None:
        return None
    if found.numel() != source.config.encoder_embed_dim or not torch.isfinite(found).all():
        logger.warning(
            f"{path}: its mask embedding {source.mask_embedding} {_shape(found)} is ignored; expected "
            f"{source.config.encoder_embed_dim} finite numbers"
        )
        return None
    return found.detach().float().flatten().clone()


def left_out(source: EncoderSource, encoder: SpeechEncoder) -> list[str]:
    """Names of weights of other parts of the model, such as unknown heads, which the encoder does not need."""
    used = {source.foreign_name(name) for name in encoder.state_dict()} | {source.mask_embedding}
    return _left_over(source, used, of_the_encoder=False)


def _left_over(source: EncoderSource, used: set[str], of_the_encoder: bool) -> list[str]:
    """Unused weights, of the encoder's own parts (by the first word of a name) or of others."""
    ignorable = re.compile("|".join(source.ignorable) or r"(?!)")
    parts = {name.partition(".")[0] for name in used}
    return [
        name
        for name in source.state
        if name not in used and (name.partition(".")[0] in parts) == of_the_encoder and not ignorable.fullmatch(name)
    ]


def _check_size(source: EncoderSource, path: Path) -> None:
    """Raises ValueError, before allocating memory, if a config needs far more numbers than the file holds."""
    wanted = int(count_parameters(source.config, widths_of(source.config)))
    storages = {_storage(tensor).data_ptr(): tensor for tensor in source.state.values()}
    held = sum(_storage(tensor).nbytes() // tensor.element_size() for tensor in storages.values())
    if wanted > 2 * held + 1_000_000:
        raise ValueError(
            f"{path}: recognised as {source.format}, but its weights do not fit its config, which needs {wanted:,} "
            f"parameters; the file holds {held:,} numbers"
        )


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage() if hasattr(tensor, "untyped_storage") else tensor.storage()


_ASSIGNS = "assign" in inspect.signature(nn.Module.load_state_dict).parameters  # torch >= 2.1


def _hollow(config: EncoderConfig) -> SpeechEncoder:
    """An encoder to fill, with uninitialised weights, which take no memory yet."""
    with _NoDraws() if _ASSIGNS else contextlib.nullcontext():
        return SpeechEncoder(config)


class _NoDraws(*((torch.overrides.TorchFunctionMode,) if _ASSIGNS else ())):  # type: ignore[misc]
    """Skips random initialisation inside the block."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.randn:
            function = torch.empty
        elif getattr(function, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return (*args, *(kwargs or {}).values())[0]
        return function(*args, **(kwargs or {}))


def _fill(encoder: SpeechEncoder, state: State) -> None:
    """Assigns the tensors to the encoder, each with its own memory; gates are copied, as they may share memory."""
    if not _ASSIGNS or encoder.config.pruning_units:
        encoder.load_state_dict(state)
        return
    taken: set[int] = set()
    for name, tensor in state.items():
        whole = tensor.is_contiguous() and _storage(tensor).nbytes() == tensor.numel() * tensor.element_size()
        if not whole or tensor.data_ptr() in taken:
            state[name] = tensor.clone(memory_format=torch.contiguous_format)
        taken.add(tensor.data_ptr())
    encoder.load_state_dict(state, assign=True)


def _shape(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}{'' if tensor.is_floating_point() else f' {tensor.dtype}'}"


def _shorten(names: list[str], limit: int = 20) -> str:
    shown = ", ".join(name if len(name) <= 200 else name[:200] + "..." for name in names[:limit])
    return shown + (f", ... ({len(names) - limit} more)" if len(names) > limit else "")


def tensors_of(state: Any, path: Path) -> State:
    """Checks that a loaded state dict maps names to tensors.

    Raises:
        ValueError: it does not.
    """
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise ValueError(f"{path}: its weights are {type(state).__name__}; expected a state dict of tensors")
    return dict(state)


@contextlib.contextmanager
def reading_config(path: Path) -> Iterator[None]:
    """Names the file in errors from converting its config to a shape.

    Raises:
        ValueError: a field is missing or not usable.
    """
    try:
        yield
    except Exception as error:  # fields of other types raise almost anything
        raise ValueError(f"{path}: its config cannot be used: {_short(error)}") from error


@contextlib.contextmanager
def reading_file(path: Path) -> Iterator[None]:
    """Turns any error from a broken file into one that names the file.

    Raises:
        ValueError, OSError: the file is broken, unknown, missing or unreadable.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(f"{path}: is damaged or of an unknown kind ({_short(error)})") from error


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    kind = "" if type(error) is ValueError and text else f"{type(error).__name__}: "
    return kind + (text if len(text) <= 1000 else text[:1000] + "...")


def refuse(path: Path, config: Mapping[str, Any], supported: Mapping[str, Any]) -> None:
    """Raises ValueError if a foreign config needs a feature that this encoder lacks.

    Args:
        config: the foreign config.
        supported: the only supported value of each field; absent fields are fine.
    """
    for field, value in supported.items():
        if config.get(field, value) != value:
            raise ValueError(
                f"{path}: its config has {field} = {config[field]!r}, which this encoder does not support; "
                f"expected {value!r}"
            )
