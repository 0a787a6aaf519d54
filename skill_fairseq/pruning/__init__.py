"""Structured pruning: gates, expected costs and constraints on them, and shrinking.

The names in ``__all__`` are a library for any training loop and any loss. They need only torch and numpy; their
behaviour follows the package's semantic version. ::

    from transformers import WavLMForSequenceClassification

    from skill_fairseq.pruning import SizeConstraint, gate, parameter_groups, shrink

    model = WavLMForSequenceClassification.from_pretrained("microsoft/wavlm-base-plus", num_labels=40)
    gates = gate(model.wavlm, units=("conv", "heads", "ffn"))
    constraint = SizeConstraint(target=0.7, warmup=5000)
    optimizer = torch.optim.AdamW(parameter_groups(model, constraint, lr=1e-4))
    for update, (waves, labels) in enumerate(batches):
        loss = model(waves, labels=labels).loss + constraint(gates.expected_sparsity(), update)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.wavlm = shrink(model.wavlm, sparsity=0.7)

``SpeechEncoder``, ``WavLMModel``, ``HubertModel``, ``Wav2Vec2Model`` and ``Data2VecAudioModel`` can be gated.
``CostConstraint`` takes any :class:`Cost`, such as ``MacCost()`` or your own; then pass it also to
``gates.expected_sparsity(cost)`` and ``shrink(model, sparsity, cost)``. It also takes a list of :class:`Target`, all of
which must be met.
``ExactConstraint`` needs no multipliers: ``constraint.impose(gates, update)`` before each forward keeps the expected
cost at its target. ``as_encoder`` turns a transformers model into a ``SpeechEncoder``, which this package can save.
"""

from skill_fairseq.pruning.costs import Cost, MacCost, ParameterCost, register_cost
from skill_fairseq.pruning.exact import ExactConstraint
from skill_fairseq.pruning.gating import Gates, gate, parameter_groups
from skill_fairseq.pruning.huggingface import as_encoder
from skill_fairseq.pruning.lagrangian import CostConstraint, SizeConstraint
from skill_fairseq.pruning.shrink import shrink
from skill_fairseq.pruning.targets import Target

__all__ = [
    "Cost",
    "CostConstraint",
    "ExactConstraint",
    "Gates",
    "MacCost",
    "ParameterCost",
    "SizeConstraint",
    "Target",
    "as_encoder",
    "gate",
    "parameter_groups",
    "register_cost",
    "shrink",
]
