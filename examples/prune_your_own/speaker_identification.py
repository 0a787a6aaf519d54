#!/usr/bin/env python3
"""Fine-tunes a small speech encoder to identify speakers, and prunes it by 70 % with only that task's loss.

Plain PyTorch on the speech of examples/tiny; fairseq is not needed.

    python examples/prune_your_own/speaker_identification.py      # about two minutes on one core
"""

import argparse
import csv
from pathlib import Path

import soundfile
import torch
import torch.nn.functional as F

from skill_fairseq import load_encoder
from skill_fairseq.probing.intervals import accuracy_interval
from skill_fairseq.pruning import SizeConstraint, gate, parameter_groups, shrink

TINY = Path(__file__).resolve().parent.parent / "tiny"
SAMPLES = 8000  # each recording is repeated or cropped to half a second


def read(split):
    """(N, SAMPLES) waves, (N,) speakers."""
    folder = TINY / "data" / "tasks" / "speaker"
    (root,), *rows = csv.reader(open(folder / f"{split}.tsv"), delimiter="\t")
    waves = [torch.from_numpy(soundfile.read(folder / root / path, dtype="float32")[0]) for path, _ in rows]
    _, *labels = csv.reader(open(folder / f"{split}.labels.tsv"), delimiter="\t")
    names = sorted({name for *_, name in labels})
    return torch.stack([w.repeat(4)[:SAMPLES] for w in waves]), torch.tensor([names.index(n) for *_, n in labels])


class Classifier(torch.nn.Module):
    def __init__(self, encoder, speakers):
        super().__init__()
        self.encoder = encoder
        self.head = torch.nn.Linear(encoder.config.encoder_embed_dim, speakers)

    def forward(self, waves):
        return self.head(self.encoder(waves).x.mean(1))


def train(model, data, updates, lr, gates=None, constraint=None):
    waves, speakers = data
    parts = [model] if constraint is None else [model, constraint]
    optimizer = torch.optim.AdamW(parameter_groups(*parts, lr=lr, gates_lr=0.1, multipliers_lr=0.1))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, updates)
    model.train()
    for update in range(updates):
        batch = torch.randint(len(waves), (16,))
        shifted = waves[batch].roll(int(torch.randint(SAMPLES, ())), 1)
        loss = F.cross_entropy(model(shifted), speakers[batch])
        if gates is not None:
            loss = loss + constraint(gates.expected_sparsity(), update)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def report(name, model, data):
    waves, speakers = data
    right = (model.eval()(waves).argmax(1) == speakers).tolist()
    low, high = accuracy_interval(right, [str(int(s)) for s in speakers])
    accuracy, size = sum(right) / len(right), model.encoder.num_parameters()
    print(f"{name}: {size:,} parameters, accuracy {accuracy:.1%} (95 % interval over speakers {low:.1%} to {high:.1%})")


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--updates", type=int, default=300, help="updates of each of the three trainings")
parser.add_argument("--seed", type=int, default=1)
args = parser.parse_args()
torch.manual_seed(args.seed)
training, test = read("train"), read("test")
model = Classifier(load_encoder(TINY / "teacher" / "teacher.safetensors"), speakers=6)
train(model, training, args.updates, lr=5e-4)
report("before", model, test)
gates = gate(model.encoder, units=("conv", "heads", "ffn"))
train(model, training, args.updates, 5e-4, gates, SizeConstraint(target=0.7, warmup=args.updates // 2))
print(f"sparsity that the gates expect: {gates.expected_sparsity():.3f}")
model.encoder = shrink(model.encoder, sparsity=0.7)
report("pruned", model, test)
train(model, training, args.updates, lr=2e-4)
report("after", model, test)
