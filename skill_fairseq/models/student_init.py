"""Initialises a student: its shape, the parts and layers that it copies from a teacher, and random weights."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skill_fairseq.checkpoints.load import read_source
from skill_fairseq.checkpoints.safe_load import plain
from skill_fairseq.checkpoints.source import EncoderSource, build_encoder
from skill_fairseq.files import named
from skill_fairseq.modules.config import EncoderConfig, format_conv_layers, parse_conv_layers
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.fake_quantize import BOUNDS
from skill_fairseq.modules.units import with_units
from skill_fairseq.pruning.costs import saved_cost
from skill_fairseq.pruning.elastic import read_sizes
from skill_fairseq.pruning.expected import full_parameters
from skill_fairseq.pruning.nested import is_settled, settle
from skill_fairseq.pruning.reach import far_from_gates
from skill_fairseq.pruning.shrink import shrink
from skill_fairseq.pruning.targets import saved_targets

logger = logging.getLogger(__name__)


class Part(NamedTuple):
    """A part of an encoder that is copied completely or not at all.

    Attributes:
        prefixes: prefixes of its names in a state dict.
        needs: fields of the shape that must be equal in student and teacher to copy it.
    """

    prefixes: tuple[str, ...]
    needs: tuple[str, ...]


PARTS = {
    "conv": Part(
        ("feature_extractor.",),
        ("extractor_mode", "conv_feature_layers", "mel_bins", "conv_bias", "normalize", "sample_rate"),
    ),
    "projection": Part(("feature_projection.",), ("conv_feature_layers", "encoder_embed_dim")),
    "pos_conv": Part(
        ("transformer.pos_conv.",), ("encoder_embed_dim", "conv_pos", "conv_pos_groups", "pos_conv_depth")
    ),
    "layer_norm": Part(("transformer.layer_norm.",), ("encoder_embed_dim", "layer_norm_first")),
    "layers": Part(
        ("transformer.layers.", "transformer.relative_position.", "transformer.time_reduction."),
        ("encoder_layers", "encoder_embed_dim", "encoder_ffn_embed_dim", "encoder_attention_heads", "activation_fn")
        + ("layer_norm_first", "num_buckets", "max_distance"),
    ),
}
LAYERS = PARTS["layers"].prefixes[0]
PRUNED = ("conv_channels", "heads", "ffn_dims", "original_parameters")
"""Fields with the results of pruning. They are recorded, not chosen."""


def parts_of(cfg: Any) -> list[str]:
    """The parts in ``cfg.init_parts``; all of them if it is null.

    Raises:
        ValueError: one is unknown.
    """
    chosen = plain(getattr(cfg, "init_parts", None))
    if chosen is None:
        return list(PARTS)
    if not isinstance(chosen, list) or not all(isinstance(part, str) and part in PARTS for part in chosen):
        raise ValueError(
            f"model.init_parts: {chosen}; expected a list with some of {list(PARTS)}; [] copies nothing, null "
            "everything"
        )
    return chosen


def layers_of(cfg: Any, teacher: EncoderConfig) -> list[int | None] | None:
    """The teacher's layer, from 1, that each of the student's layers copies; None in the list means random.

    Returns:
        ``cfg.init_layers``, or None if it is null.

    Raises:
        ValueError: it is not a list, names a layer that the teacher lacks, or does not match the other fields.
    """
    layers = plain(getattr(cfg, "init_layers", None))
    if layers is None:
        return None
    most, given = teacher.encoder_layers, f"model.init_layers: {layers}"
    if not isinstance(layers, list) or not layers:
        raise ValueError(f"{given}; expected a layer of the teacher for each of the student's, such as [1, {most}]")
    for layer in layers:
        if layer is not None and (type(layer) is not int or not 1 <= layer <= most):
            raise ValueError(
                f"{given} names layer {layer!r}, but model.init_from={cfg.init_from} has the layers 1 to {most}; give "
                "some of these, or null for a random layer"
            )
    if "layers" not in parts_of(cfg):
        raise ValueError(
            f"{given}, but model.init_parts={plain(cfg.init_parts)} copies no layers; add 'layers' to it, or set "
            "model.encoder_layers instead of model.init_layers"
        )
    if getattr(cfg, "encoder_layers", None) not in (None, len(layers)):
        raise ValueError(
            f"model.encoder_layers: {cfg.encoder_layers}, but model.init_layers={layers} gives the student "
            f"{len(layers)} layers; remove model.encoder_layers"
        )
    return layers


def student_shape(teacher: EncoderConfig, cfg: Any) -> EncoderConfig:
    """The teacher's shape with the fields that are set in ``cfg``. Copied parts must keep the teacher's.

    Args:
        teacher: shape of the encoder in ``cfg.init_from``.
        cfg: a run's model config.

    Returns:
        the shape, without gates.

    Raises:
        ValueError: a field has a value that copied or pruned parts cannot have; names the field.
    """
    parts, layers = parts_of(cfg), layers_of(cfg, teacher)
    for name in ("init_parts", "init_layers"):
        if getattr(cfg, name, None) is not None and not teacher.is_full():
            raise ValueError(
                f"model.{name}: {plain(getattr(cfg, name))}, but model.init_from={cfg.init_from} is pruned, and can "
                f"only be copied completely; remove model.{name}, or give the teacher in model.init_from"
            )
    changes: dict[str, Any] = {} if layers is None else {"encoder_layers": len(layers)}
    for name, found in {**vars(teacher), **teacher.to_dict()}.items():
        value = plain(getattr(cfg, name, None))
        if value is not None and name == "conv_feature_layers":
            value = format_conv_layers(parse_conv_layers(value))
        if value in (None, found) or name in ("pruning_units", "unit_widths", "quantize", *PRUNED, *changes):
            continue
        needing = [part for part in parts if name in PARTS[part].needs]
        if not needing and teacher.is_full():
            changes[name] = value
            continue
        remedy = f"remove {needing} from model.init_parts" if needing else "give an encoder that is not pruned"
        if name == "encoder_layers":
            remedy = "choose the layers to copy in model.init_layers"
        raise ValueError(
            f"model.{name}: {value}, but the student copies {needing or 'all'} of model.init_from={cfg.init_from}, "
            f"which has {found}; remove the field, or {remedy}"
        )
    shape = teacher.replace(**changes, original_parameters=None) if changes else teacher
    shape = _with_widths(shape, cfg)
    quantize = plain(getattr(cfg, "quantize", None))
    shape = shape if quantize is None else shape.replace(quantize=quantize)
    for name in PRUNED:
        value, found = plain(getattr(cfg, name, None)), getattr(shape, name)
        if value is not None and value != found:
            raise ValueError(
                f"model.{name}: {value}, but the student made from model.init_from={cfg.init_from} has {found}; "
                "remove the field, which pruning fills in"
            )
    return shape


def _with_widths(shape: EncoderConfig, cfg: Any) -> EncoderConfig:
    """The shape with ``cfg.unit_widths``, such as ``{rank: 96}``, which factorises linear maps at the start.

    Raises:
        ValueError: they are not usable, or the encoder already has others.
    """
    asked = plain(getattr(cfg, "unit_widths", None))
    if asked in (None, {}, shape.unit_widths):
        return shape
    try:
        wanted = shape.replace(unit_widths=asked)
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"model.unit_widths: {asked}; expected a rank for all linear maps, or for each: {{rank: 96}}"
        ) from error
    if shape.unit_widths and wanted != shape:
        raise ValueError(
            f"model.unit_widths: {asked}, but the student made from model.init_from={cfg.init_from} has "
            f"{shape.unit_widths}; remove the field, which pruning fills in"
        )
    return wanted.replace(original_parameters=shape.original_parameters or full_parameters(shape))


def copied_state(
    teacher: Mapping[str, Tensor], parts: Sequence[str], layers: Sequence[int | None] | None
) -> dict[str, Tensor]:
    """The teacher's tensors by their names in the student.

    Args:
        teacher: state dict of a :class:`SpeechEncoder`.
        parts: names from :data:`PARTS`.
        layers: see :func:`layers_of`; None: all in order.
    """
    state = {}
    for name, tensor in teacher.items():
        if not name.startswith(tuple(prefix for part in parts for prefix in PARTS[part].prefixes)):
            continue
        if layers is None or not name.startswith(LAYERS):
            state[name] = tensor
            continue
        number, _, rest = name[len(LAYERS) :].partition(".")
        for own, layer in enumerate(layers):
            if layer == int(number) + 1:
                state[f"{LAYERS}{own}.{rest}"] = tensor
    return state


def make_student(teacher: SpeechEncoder, cfg: Any) -> SpeechEncoder:
    """Builds the student of ``cfg``, with gates on ``cfg.pruning_units``.

    Parts that only one of the two has, such as relative position, are dropped or random. Random weights depend only on
    ``cfg.seed``, so they are equal on all ranks.

    Args:
        teacher: without gates.
        cfg: model config of a run.

    Returns:
        the student; the teacher itself if it is copied completely and gets no gates.

    Raises:
        ValueError: the fields of ``cfg`` do not match the teacher or each other; names one.
    """
    parts, layers = parts_of(cfg), layers_of(cfg, teacher.config)
    shape = student_shape(teacher.config, cfg)
    units = list(cfg.pruning_units or ())
    whole = shape == teacher.config and set(parts) == set(PARTS) and layers is None
    if whole and not units:
        return teacher
    if units:
        original = shape.original_parameters or (teacher.num_parameters() if whole else full_parameters(shape))
        shape = shape.replace(pruning_units=units, original_parameters=original)
    with contextlib.nullcontext() if whole else _random_by(cfg.seed):
        student = SpeechEncoder(shape)
    own = student.state_dict()
    state = with_units(shape, copied_state(teacher.state_dict(), parts, layers), teacher.config)
    copied = {k: v for k, v in state.items() if k in own}
    student.load_state_dict(copied, strict=False)
    if "projection" in parts:  # its module belongs to that part
        student.mask_embedding = teacher.mask_embedding
    drawn = sum(v.numel() for k, v in own.items() if not (k in copied or k.startswith("gates.") or k.endswith(BOUNDS)))
    if not whole:
        logger.info(f"the student copies {parts} of {cfg.init_from}; {drawn:,} weights start at random")
    return student.eval()


@contextlib.contextmanager
def _random_by(seed: int) -> Iterator[None]:
    """Seeds torch's CPU generator inside the block, and restores its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def initial_student(cfg: Any) -> SpeechEncoder:
    """Builds the initial student from the file ``cfg.init_from``.

    Shrinks a gated stage-1 checkpoint to its target sparsity. For other encoders it calls :func:`make_student`.

    Raises:
        FileNotFoundError, ValueError: the file is missing or not a known encoder, or fields of ``cfg`` do not match it.
    """
    path = Path(cfg.init_from or "")
    with named("model.init_from"):
        source = read_source(path)
        encoder = build_encoder(source, path).eval()
    if getattr(cfg, "nested", False):
        return _nested(encoder, source, cfg)
    if encoder.config.pruning_units:
        if cfg.pruning_units:
            raise ValueError(
                f"model.init_from: {cfg.init_from} already has gates; leave model.pruning_units empty to shrink it and "
                "distil further, or give an ungated teacher"
            )
        encoder = _shrunk(encoder, source, cfg)
    return make_student(encoder, cfg)


def _nested(encoder: SpeechEncoder, source: EncoderSource, cfg: Any) -> SpeechEncoder:
    """The largest size of an elastic run's stage 1, with the order of its units; a student of stage 2 is unchanged.

    Raises:
        ValueError: the file is not from an elastic run.
    """
    trained = source.provenance.get("elastic")
    if trained is None or not encoder.config.pruning_units:
        raise ValueError(
            f"model.nested: true, but model.init_from={cfg.init_from} was not trained with criterion.elastic; give a "
            "stage-1 checkpoint that was, or remove model.nested"
        )
    if is_settled(encoder):
        return encoder
    largest = read_sizes(trained, f"{cfg.init_from}: elastic").largest
    before, small = encoder.num_parameters(), settle(encoder, largest, saved_cost(source.provenance))
    logger.info(f"cut {cfg.init_from} to its largest size: {before:,} to {small.num_parameters():,} parameters")
    return small


def _shrunk(encoder: SpeechEncoder, source: EncoderSource, cfg: Any) -> SpeechEncoder:
    before, targets = encoder.num_parameters(), saved_targets(source.provenance)
    warning = far_from_gates(encoder, targets, f"model.init_from: {cfg.init_from}: target_sparsity")
    if warning is not None:
        logger.warning(warning)
    encoder = shrink(encoder, targets or None)
    logger.info(f"shrunk {cfg.init_from}: {before:,} to {encoder.num_parameters():,} parameters")
    return encoder
