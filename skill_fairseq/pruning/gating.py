"""Gates for any training loop: adding them to a model in place, expected costs, and optimizer groups."""

from __future__ import annotations

from typing import Any, Dict, List, Sequence

import torch
from torch import Tensor, nn

from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.gate_bank import GateBank
from skill_fairseq.modules.units import UNITS, new_units, with_units
from skill_fairseq.pruning.costs import PARAMETERS, Cost
from skill_fairseq.pruning.expected import expected_widths, full_parameters


class Gates:
    """The gates that :func:`gate` added to a model.

    Attributes:
        encoder: an encoder with these gates: the model itself if it is a :class:`SpeechEncoder`; for a transformers
            model an encoder of the same shape without weights, for counting sizes.
    """

    def __init__(self, encoder: SpeechEncoder) -> None:
        self.encoder = encoder

    def expected_cost(self, cost: Cost = PARAMETERS) -> Tensor:
        """The encoder's expected cost, a float32 scalar with gradient.

        Counts the conv stack, feature projection, positional convolution and Transformer, but not the mask embedding of
        transformers models, heads and the gates themselves.
        """
        return cost(self.encoder.config, expected_widths(self.encoder))  # type: ignore[return-value]

    def expected_sparsity(self, cost: Cost = PARAMETERS) -> Tensor:
        """Expected removed fraction of the unpruned encoder's cost, a float32 scalar with gradient."""
        return cost.sparsity(self.encoder.config, expected_widths(self.encoder))  # type: ignore[no-any-return]


def gate(model: nn.Module, units: Sequence[str] = ("conv", "heads", "ffn"), drop_rate: float = 0.01) -> Gates:
    """Adds hard-concrete gates to an encoder in place; its forward and your loss do not change.

    In training every forward draws new gates, one value per unit for the whole batch. In evaluation they are
    deterministic. Build the optimizer afterwards, because the gates are a new parameter of the model.

    Args:
        model: a :class:`SpeechEncoder`, or a ``WavLMModel``, ``HubertModel``, ``Wav2Vec2Model`` or
            ``Data2VecAudioModel`` of transformers, without gates. It may have been shrunk before.
        units: units to prune: "conv" (channels of the convolutions), "heads", "ffn" (units of the feed-forward
            sublayers), "attention_layers" and "ffn_layers" (whole sublayers); for our encoder also "rank" (components
            of its linear maps) and registered kinds.
        drop_rate: initial drop rate of the gates, in (0, 1).

    Raises:
        TypeError: the model is of another class.
        ValueError: the model already has gates, a unit or the drop rate is not usable, or the model has a feature
            that :class:`SpeechEncoder` lacks.
    """
    if not units or not set(units) <= set(UNITS):
        raise ValueError(f"units: {units!r}; expected some of {', '.join(UNITS)}")
    if not 0.0 < drop_rate < 1.0:
        raise ValueError(f"drop_rate: {drop_rate}; expected a number in (0, 1), such as 0.01")
    if getattr(model, "gates", None) is not None:
        raise ValueError(f"{type(model).__name__} has gates already; shrink() it first")
    if isinstance(model, SpeechEncoder):
        encoder = model
        _place(encoder, _gated(encoder.config, units))
    else:
        from skill_fairseq.pruning.huggingface import attach, encoder_config

        encoder = SpeechEncoder(_gated(encoder_config(model, "gate"), units))
        attach(model, encoder)
    for _, vector in encoder.named_gates():
        vector.drop_rate = drop_rate
        vector.reset_parameters()
    return Gates(encoder)


def _gated(config: EncoderConfig, units: Sequence[str]) -> EncoderConfig:
    return config.replace(pruning_units=list(units), original_parameters=full_parameters(config))


def _place(encoder: SpeechEncoder, config: EncoderConfig) -> None:
    """Adds the gates of ``config.pruning_units`` to an encoder without gates."""
    state, new = with_units(config, encoder.state_dict(), encoder.config), new_units(config, encoder.config)
    encoder.config = encoder.feature_extractor.config = config
    for unit in new:
        unit.build(encoder)
    encoder.gates = GateBank()
    encoder.gates.place(encoder)
    state.update({f"gates.{name}": value for name, value in encoder.gates.state_dict().items()})
    encoder.load_state_dict(state)
    like = encoder.feature_extractor.layers[0].conv.weight
    encoder.to(like.device, like.dtype).train(encoder.training)


def parameter_groups(
    *modules: nn.Module,
    lr: float,
    gates_lr: float = 0.02,
    multipliers_lr: float = 0.02,
    weight_decay: float = 0.0,
) -> List[Dict[str, Any]]:
    """Parameter groups for a torch optimizer, with separate learning rates of weights, gates and multipliers.

    Gates need a far higher rate than weights (DPHuBERT, arXiv:2305.17651, uses 0.02 with weights at 2e-4). Gates and
    multipliers get no weight decay. A schedule that multiplies every group's rate suits all three.

    Args:
        modules: the gated model, its constraint, and other trained modules.
        lr, weight_decay: learning rate and weight decay of the weights.
        gates_lr, multipliers_lr: learning rates of the gates and of the constraint's multipliers.

    Returns:
        the non-empty groups, each with ``name``, ``params``, ``lr`` and ``weight_decay``.
    """
    groups: Dict[str, Dict[str, Any]] = {
        "weights": {"lr": lr, "weight_decay": weight_decay},
        "gates": {"lr": gates_lr, "weight_decay": 0.0},
        "multipliers": {"lr": multipliers_lr, "weight_decay": 0.0},
    }
    seen: Dict[torch.nn.Parameter, str] = {}
    for module in modules:
        for parameter in module.parameters():
            if parameter.requires_grad:
                seen.setdefault(parameter, getattr(parameter, "param_group", "weights"))
    for name, group in groups.items():
        group.update(name=name, params=[parameter for parameter, owner in seen.items() if owner == name])
    return [group for group in groups.values() if group["params"]]
