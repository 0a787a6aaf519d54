"""Gates on transformers models, and conversion to our encoder, without importing transformers."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Callable, List, Optional, Tuple

from torch import Tensor, nn

from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.gate_bank import GateBank, HardConcrete
from skill_fairseq.modules.hard_concrete import hard_concrete_sample
from skill_fairseq.modules.units import UNITS

_LAYER = r"transformer\.layers\.(\d+)\."
_SHRUNK_NAMES = (
    (_LAYER + r"attention\.position_gate\.", r"encoder.layers.\1.attention.position_gate."),
    (r"transformer\.relative_position\.", "encoder.layers.0.attention.relative_position."),
)
"""Our names to a shrunk model's, where these differ from an unpruned model's."""


def encoder_config(model: Any, caller: str) -> EncoderConfig:
    """The config of our encoder for a transformers model.

    Args:
        model: a model, which may have been shrunk.
        caller: the public function's name, for messages.

    Raises:
        TypeError: it is not a supported encoder.
        ValueError: it has a feature that our encoder lacks.
    """
    from skill_fairseq.checkpoints.huggingface import MODEL_TYPES, SUPPORTED, config_of_fields
    from skill_fairseq.checkpoints.source import refuse

    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in MODEL_TYPES or not all(
        hasattr(model, part) for part in ("feature_extractor", "feature_projection", "encoder")
    ):
        inner = f": model.{model.base_model_prefix}" if kind in MODEL_TYPES else ""
        raise TypeError(
            f"{caller}() got {type(model).__name__}; expected SpeechEncoder, or WavLMModel, HubertModel, Wav2Vec2Model "
            f"or Data2VecAudioModel of transformers; from a model with a head, give the encoder inside{inner}"
        )
    shape: Optional[EncoderConfig] = getattr(model, "encoder_shape", None)  # set by shrinking
    if shape is not None:
        return shape
    fields = model.config.to_dict()
    refuse(Path(type(model).__name__), fields, SUPPORTED)
    return config_of_fields(fields)


def as_encoder(model: Any) -> SpeechEncoder:
    """Copies a transformers model, gated or shrunk or neither, to our encoder.

    It computes the same. :func:`skill_fairseq.checkpoints.save_encoder` writes it to a file that
    :func:`skill_fairseq.load_encoder` and ``skill-export`` read, and
    :func:`skill_fairseq.exporting.huggingface_folder.save_huggingface` to a folder for ``AutoModel``. A transformers
    model does not know whether its waveforms are normalised: ``config.normalize`` follows the published models.

    Raises:
        TypeError, ValueError: see :func:`skill_fairseq.pruning.gate`.
    """
    from skill_fairseq.checkpoints.huggingface import ENCODER_NAMES, TASK_HEADS
    from skill_fairseq.checkpoints.source import (
        ADDED_HERE,
        EncoderSource,
        build_encoder,
        renaming,
        weight_norm_spelling,
    )

    config = encoder_config(model, "as_encoder")
    gates = getattr(model, "pruning_gates", None)
    last = len(config.conv_feature_layers) - 1
    scale = (("feature_extractor.scale", f"feature_extractor.conv_layers.{last}.activation.scale"),)
    names = (*scale, *(_SHRUNK_NAMES if hasattr(model, "encoder_shape") else ()), *ENCODER_NAMES)
    source = EncoderSource(
        f"a {type(model).__name__}",
        config if gates is None else gates.encoder.config,
        {weight_norm_spelling(name): tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()},
        renaming(names),
        TASK_HEADS,
        ADDED_HERE,
    )
    return build_encoder(source, Path(type(model).__name__)).eval()


class ModelGates:
    """Applies the gates of an encoder to the modules of a transformers model, through hooks.

    The model stores it as ``pruning_gates``, and its :class:`GateBank` as the submodule ``gates``.

    Attributes:
        encoder: an encoder without weights, which maps gates to modules.
        handles: handles of the hooks.
    """

    def __init__(self, encoder: SpeechEncoder) -> None:
        self.encoder = encoder
        self.handles: List[Any] = []
        self._noise: Optional[Tensor] = None

    @property
    def bank(self) -> GateBank:
        assert self.encoder.gates is not None
        return self.encoder.gates

    def draw(self, *arguments: Any) -> None:
        """Draws the noise of all gates before every forward of the model; recomputed layers use it again."""
        self._noise = self.bank.noise(self.bank.log_alpha.numel()) if self.bank.training else None

    def values(self, gate: HardConcrete, like: Tensor) -> Tensor:
        """(num_units,) values of a vector of gates, in the dtype of ``like``.

        Computed on every call, because reentrant checkpointing must not use a graph twice.
        """
        if not self.bank.training:
            return gate().to(like.dtype)
        if self._noise is None:
            self.draw()
        assert self._noise is not None
        return hard_concrete_sample(gate.log_alpha, self._noise[gate.part]).to(like.dtype)

    def scale_channels(self, gate: HardConcrete, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """Multiplies the (B, C, T) output of a convolutional layer by its gates."""
        return output * self.values(gate, output)[:, None]

    def close_inputs(self, gate: HardConcrete, module: nn.Module, inputs: Tuple[Tensor]) -> Tensor:
        """The (..., C) input of a norm with closed channels at zero, as they count in its statistics after
        shrinking."""
        return inputs[0] * (self.values(gate, inputs[0]) > 0).to(inputs[0].dtype)

    def close_outputs(self, gate: HardConcrete, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """The (..., C) output of a norm with closed channels at zero, without effects of its bias and mean."""
        return output * (self.values(gate, output) > 0).to(output.dtype)

    def scale_columns(self, gate: HardConcrete, width: int, weight: Tensor) -> Tensor:
        """The (out, in) weight times the gates of its inputs, ``width`` columns per unit."""
        return weight * self.values(gate, weight).repeat_interleave(width)

    def scale_sublayer(self, gate: HardConcrete, module: nn.Module, inputs: Any, output: Any) -> Any:
        """The (B, T, D) output of a sublayer, a tensor or the first of a tuple, times its gate."""
        if isinstance(output, tuple):
            return (self.scale_sublayer(gate, module, inputs, output[0]), *output[1:])
        return output * self.values(gate, output)


class GatedLinear(nn.Linear):
    """A linear layer that gates its inputs through its weight: WavLM's attention reads weights and calls no layer."""

    columns: Callable[[Tensor], Tensor]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(out, in), multiplied by the gates."""
        weight = self._parameters["weight"]
        assert weight is not None
        return self.columns(weight)


def attach(model: Any, encoder: SpeechEncoder) -> None:
    """Makes a transformers model apply the gates of an encoder of its shape.

    Raises:
        ValueError: a kind of unit needs our own modules, or a linear layer that reads gated units was replaced by an
            adapter or a quantised layer.
    """
    added = [name for name in encoder.config.pruning_units if UNITS[name].field is None]
    if added:
        raise ValueError(f"units: {added} cannot be gated in a {type(model).__name__}; gate as_encoder(model) instead")
    assert encoder.gates is not None
    layers, on = model.encoder.layers, functools.partial
    readers = {
        vector.index: (f"encoder.layers.{i}.{path}", layers[i].get_submodule(path), width)
        for vector in encoder.gates.gates
        for unit, path, width in (
            ("heads", "attention.out_proj", encoder.config.head_dim),
            ("ffn", "feed_forward.output_dense", 1),
        )
        if vector.unit == unit
        for i in (vector.site.place,)
    }
    for name, linear, _ in readers.values():
        if type(linear) is not nn.Linear:
            raise ValueError(
                f"{name} is a {type(linear).__name__}; expected nn.Linear: gate the model before an adapter or a "
                "quantised layer replaces it"
            )

    gates, bank = ModelGates(encoder), encoder.gates
    encoder.gates = None
    encoder.to("meta")  # its weights are not needed
    like = model.feature_projection.projection.weight
    model.gates = encoder.gates = bank.train(model.training).to(like.device)
    model.pruning_gates = gates
    handles = [model.register_forward_pre_hook(gates.draw)]
    convs = model.feature_extractor.conv_layers
    for vector in bank.gates:
        i = vector.site.place
        if vector.unit == "conv":
            handles.append(convs[i].register_forward_hook(on(gates.scale_channels, vector)))
            if encoder.config.extractor_mode == "layer_norm":
                handles.append(convs[i].layer_norm.register_forward_pre_hook(on(gates.close_inputs, vector)))
            if i == len(convs) - 1 and encoder.config.feature_layer_norm:
                norm = model.feature_projection.layer_norm
                handles.append(norm.register_forward_hook(on(gates.close_outputs, vector)))
        elif vector.index in readers:
            _, linear, width = readers[vector.index]
            linear.__class__ = GatedLinear
            linear.columns = on(gates.scale_columns, vector, width)
        else:
            sublayer = layers[i].attention if vector.unit == "attention_layers" else layers[i].feed_forward
            handles.append(sublayer.register_forward_hook(on(gates.scale_sublayer, vector)))
    gates.handles = handles


def detach(model: Any) -> None:
    """Removes hooks and gates; gated linear layers become plain again."""
    for handle in model.pruning_gates.handles:
        handle.remove()
    for module in model.modules():
        if isinstance(module, GatedLinear):
            del module.columns
            module.__class__ = nn.Linear  # type: ignore[assignment]
    del model.gates, model.pruning_gates
