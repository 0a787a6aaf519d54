"""Structured pruning: expected cost, the constraint on it, and what follows from learned gates.

The names in ``__all__`` are a library of their own: gates for any training loop and any loss. They need only torch
(and numpy); what they do follows the package's semantic version. ::

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
``CostConstraint`` takes another :class:`Cost`, ``MacCost()`` or one's own, which ``gates.expected_sparsity(cost)`` and
``shrink(model, sparsity, cost)`` then take too; or a list of :class:`Target`, all of which are to be met.
``ExactConstraint`` needs no multipliers: called as ``constraint.impose(gates, update)`` before each forward, it keeps
the expected cost at its target. ``as_encoder`` turns a model of transformers into a ``SpeechEncoder``,
which this package writes into files.
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
