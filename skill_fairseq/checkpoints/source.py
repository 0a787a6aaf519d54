"""What an importer hands over, and how it becomes an encoder: every weight in the file is accounted for."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Callable, NamedTuple

from torch import Tensor

from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.encoder import SpeechEncoder

Rules = tuple[tuple[str, str], ...]
State = dict[str, Tensor]

ADDED_HERE = ("feature_extractor.scale",)
"""Names of our encoder that no foreign file has; their initial value is the right one."""


class EncoderSource(NamedTuple):
    """An encoder as it was found in a file.

    Attributes:
        format: what the file was recognised as, in words.
        config: the shape.
        state: tensors under the file's own names.
        foreign_name: turns a name of our encoder into the file's.
        ignorable: regular expressions of names that are known not to belong to the encoder.
        optional: names of our encoder that the file may lack.
        provenance: what the file says about where it comes from.
    """

    format: str
    config: EncoderConfig
    state: State
    foreign_name: Callable[[str], str]
    ignorable: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = {}


def renaming(rules: Rules) -> Callable[[str], str]:
    """A function that rewrites a name by the first rule (pattern of its beginning, replacement) that fits."""

    def rename(name: str) -> str:
        for pattern, replacement in rules:
            if re.match(pattern, name):
                return re.sub(pattern, replacement, name, count=1)
        return name

    return rename


def weight_norm_spelling(name: str) -> str:
    """One spelling of the positional convolution's weights, whether saved before or after torch renamed them."""
    return name.replace("parametrizations.weight.original0", "weight_g").replace(
        "parametrizations.weight.original1", "weight_v"
    )


def build_encoder(source: EncoderSource, path: Path) -> SpeechEncoder:
    """Makes the encoder in float32 and fills it.

    Raises:
        ValueError: a weight is missing, left over, or of another shape than the config says; lists them.
    """
    encoder = SpeechEncoder(source.config)
    encoder.gather_gates(source.state, source.foreign_name("gates.log_alpha")[: -len("gates.log_alpha")])
    state: State = {}
    missing, misshapen, used = [], [], set()
    for name, wanted in encoder.state_dict().items():
        foreign = source.foreign_name(name)
        found = source.state.get(foreign)
        used.add(foreign)
        if found is None:
            if name not in source.optional:
                missing.append(foreign)
            state[name] = wanted
        elif found.shape != wanted.shape:
            misshapen.append(f"{foreign} {tuple(found.shape)} instead of {tuple(wanted.shape)}")
        else:
            state[name] = found.to(wanted.dtype)
    ignorable = re.compile("|".join(source.ignorable) or r"(?!)")
    left_over = [name for name in source.state if name not in used and not ignorable.fullmatch(name)]
    problems = [
        f"{len(names)} {kind}: {_shorten(names)}"
        for kind, names in (("missing", missing), ("left over", left_over), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise ValueError(
            f"{path}: recognised as {source.format}, but its weights do not fit its config; " + "; ".join(problems)
        )
    encoder.load_state_dict(state)
    return encoder


def _shorten(names: list[str], limit: int = 20) -> str:
    return ", ".join(names[:limit]) + (f", ... ({len(names) - limit} more)" if len(names) > limit else "")


def tensors_of(state: Any, path: Path) -> State:
    """Checks that a loaded state dict maps names to tensors.

    Raises:
        ValueError: it does not.
    """
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: its weights are {type(state).__name__}; expected a state dict of tensors")
    return dict(state)


@contextlib.contextmanager
def reading_config(path: Path) -> Iterator[None]:
    """Names the file in the error of whatever makes a shape of its config.

    Raises:
        ValueError: the block found a field that is missing or not usable.
    """
    try:
        yield
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: its config cannot be used: {error}") from error


def refuse(path: Path, config: Mapping[str, Any], supported: Mapping[str, Any]) -> None:
    """Raises ValueError where a field of a foreign config asks for something that this encoder does not have.

    Args:
        config: the foreign config.
        supported: the only value of each field that is supported; absent fields are fine.
    """
    for field, value in supported.items():
        if config.get(field, value) != value:
            raise ValueError(
                f"{path}: its config has {field} = {config[field]!r}, which this encoder does not support; "
                f"expected {value!r}"
            )
