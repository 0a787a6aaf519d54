#!/usr/bin/env python3
"""The whole method in one file: cluster a teacher's layers, distil the mean of each group, prune with gates, cut.

Plain PyTorch on the small teacher of examples/tiny, without the package. If skill_fairseq is installed, prints the
package's numbers beside this file's. Layer 0 precedes the Transformer, i is the output of layer i.

    pip install 'torch>=1.13' numpy soundfile safetensors     # before 1.13, GELU's gradient is wrong on CPUs
    python examples/method.py                     # about a minute on one core
    python examples/method.py --updates 20        # a quick look
"""

import argparse
import csv
import json
import math
from pathlib import Path

import soundfile
import torch
import torch.nn.functional as F
from safetensors import safe_open

HERE = Path(__file__).resolve().parent / "tiny"
TARGET = 0.75  # sparsity: the fraction of the teacher's parameters to remove
NUM_GROUPS = 4
BETA, LOW, HIGH = 2 / 3, -0.1, 1.1  # hard concrete: temperature, and the interval that is clamped to [0, 1]


def read_teacher():
    """Weights by name, the shape, and the units of each prunable vector."""
    with safe_open(HERE / "teacher" / "teacher.safetensors", "pt") as file:
        shape = json.loads(file.metadata()["config"])
        weights = {name: file.get_tensor(name).float() for name in file.keys() if name != "feature_extractor.scale"}
    layers, heads = shape["encoder_layers"], shape["encoder_attention_heads"]
    fixed = ("pos_conv", "layer_norm", "relative_position")  # never pruned, beside each layer's two norms
    config = {
        "conv": [tuple(map(int, t[2:-2].split(","))) for t in shape["conv_feature_layers"].split(" + ")],
        "layers": layers,
        "width": shape["encoder_embed_dim"],
        "heads": heads,
        "kept_heads": [list(range(heads))] * layers,
        "fixed": sum(w.numel() for name, w in weights.items() if name.split(".")[1] in fixed),
    }
    full = {f"feature_extractor.layers.{i}": channels for i, (channels, _, _) in enumerate(config["conv"])}
    full.update({f"transformer.layers.{i}.attention": heads for i in range(layers)})
    full.update({f"transformer.layers.{i}.ffn": shape["encoder_ffn_embed_dim"] for i in range(layers)})
    return weights, config, full


def read_batches(size=16):
    """Batches of recordings of similar length, cropped to their shortest: (size, N) each, the longest last."""
    with open(HERE / "data" / "train.tsv") as file:
        (root,), *rows = csv.reader(file, delimiter="\t")
    waves = [torch.from_numpy(soundfile.read(HERE / "data" / root / path, dtype="float32")[0]) for path, _ in rows]
    waves.sort(key=len)
    batches = [waves[i : i + size] for i in range(0, len(waves) - size + 1, size)]
    return [torch.stack([wave[: len(batch[0])] for wave in batch]) for batch in batches]


# --- The encoder: a WavLM, written as one function of its weights ---


def encode(w, config, wave, z):
    """(B, N) samples to the states of layers 0..L, (B, T, D) each; ``z`` holds the gates of each prunable vector."""
    x = wave[:, None]
    for i, (_, _, stride) in enumerate(config["conv"]):
        x = F.conv1d(x, w[f"feature_extractor.layers.{i}.conv.weight"], stride=stride)
        if i == 0:
            name = "feature_extractor.layers.0.norm"
            x = F.group_norm(x, x.size(1), w[f"{name}.weight"], w[f"{name}.bias"])
        x = F.gelu(x) * z[f"feature_extractor.layers.{i}"][:, None]
    # Closed channels are zero and count in mean and variance, and so do removed ones.
    x, width = x.transpose(1, 2), config["conv"][-1][0]
    mean = x.sum(-1, keepdim=True) / width
    variance = x.square().sum(-1, keepdim=True) / width - mean.square()
    x = (x - mean) * (variance + 1e-5).rsqrt() * w["feature_projection.norm.weight"] + w["feature_projection.norm.bias"]
    x = x * (z[f"feature_extractor.layers.{i}"] != 0)  # removes the norm's bias from closed channels too
    x = F.linear(x, w["feature_projection.linear.weight"], w["feature_projection.linear.bias"])
    states = [x]
    v, g = w["transformer.pos_conv.weight_v"], w["transformer.pos_conv.weight_g"]
    kernel = v * g / v.norm(dim=(0, 1), keepdim=True)
    y = F.conv1d(x.transpose(1, 2), kernel, w["transformer.pos_conv.bias"], padding=kernel.size(2) // 2, groups=16)
    x = x + F.gelu(y[..., :-1]).transpose(1, 2)
    bias = w["transformer.relative_position.weight"][buckets(x.size(1))].permute(2, 0, 1)  # (heads, T, T)
    for i in range(config["layers"]):
        p = f"transformer.layers.{i}"
        x = x + attention(w, f"{p}.attention", norm(w, f"{p}.attention_norm", x), bias, config["kept_heads"][i], z)
        y = F.gelu(linear(w, f"{p}.ffn.fc1", norm(w, f"{p}.ffn_norm", x)))
        x = x + linear(w, f"{p}.ffn.fc2", y * z[f"{p}.ffn"])
        states.append(x)
    return states


def attention(w, p, x, bias, heads, z):
    """WavLM's attention, (B, T, D) to (B, T, D); ``heads`` are the indices of the remaining heads."""
    if not heads:
        return w[f"{p}.out_proj.bias"].expand_as(x)
    q, k, v = (linear(w, f"{p}.{n}_proj", x).unflatten(-1, (len(heads), -1)).transpose(1, 2) for n in "qkv")
    gates = linear(w, f"{p}.position_gate.grep_linear", x.unflatten(-1, (bias.size(0), -1))[:, :, heads])
    update, reset = gates.unflatten(-1, (2, 4)).sum(-1).sigmoid().transpose(1, 2).unsqueeze(-1).unbind(3)
    factor = update * (reset * w[f"{p}.position_gate.grep_a"][:, heads] - 1) + 2
    y = (q @ k.transpose(2, 3) * q.size(-1) ** -0.5 + factor * bias[heads]).softmax(-1) @ v
    return linear(w, f"{p}.out_proj", (y * z[p][:, None, None]).transpose(1, 2).flatten(2))


def linear(w, name, x):
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def norm(w, name, x):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])


def buckets(frames, num=320, furthest=800):
    """(T, T) buckets of relative position, as in T5."""
    offset = torch.arange(frames)[None] - torch.arange(frames)[:, None]
    distance, exact = offset.abs(), num // 4
    far = exact + (distance.clamp(min=1).float() / exact).log() / math.log(furthest / exact) * exact
    return (offset > 0) * (num // 2) + torch.where(distance < exact, distance, far.long().clamp(max=num // 2 - 1))


# --- Step 1: find similar layers ---


def cka(states):
    """1 - linear CKA between all layers (Kornblith et al. 2019): (L + 1, L + 1), float64."""
    x = torch.stack([s.flatten(0, 1) for s in states]).double()
    x = x - x.mean(1, keepdim=True)
    hsic = torch.stack([torch.stack([(a.T @ b).square().sum() for b in x]) for a in x])
    return 1 - hsic / torch.outer(hsic.diagonal(), hsic.diagonal()).sqrt()


def cluster(distance, number):
    """Average linkage: merges the two clusters with the smallest mean distance until ``number`` are left."""
    groups = [[i] for i in range(len(distance))]
    while len(groups) > number:
        pairs = [(float(distance[a][:, b].mean()), a, b) for i, a in enumerate(groups) for b in groups[i + 1 :]]
        _, a, b = min(pairs)
        groups = sorted([g for g in groups if g not in (a, b)] + [sorted(a + b)])
    return groups


# --- Step 2: distil the mean of each group, and prune ---


def group_means(states, groups):
    """Mean of each group's states, each normalised per frame, as pre-LayerNorm teachers need."""
    return [torch.stack([F.layer_norm(states[i], states[i].shape[-1:]) for i in g]).mean(0) for g in groups]


def group_loss(student, teacher, projection):
    """L1 less cosine, averaged over frames, features and groups (DPHuBERT's distance, SKILL's targets)."""
    pairs = [(F.linear(s, *projection), t) for s, t in zip(student, teacher)]
    return sum(F.l1_loss(s, t) - F.cosine_similarity(s, t, dim=-1).mean() for s, t in pairs) / len(pairs)


def sample(alpha):
    """Hard-concrete gates in [0, 1], some of them exactly 0 (Louizos et al. 2018)."""
    u = torch.rand_like(alpha) * (1 - 2e-6) + 1e-6
    return (((u.logit() + alpha) / BETA).sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)


def open_probability(alpha):
    return (alpha - BETA * math.log(-LOW / HIGH)).sigmoid()


def decide(alpha):
    """Gates without noise: the expected number of gates is 0, the others keep a soft value."""
    closed = round(len(alpha) - float(open_probability(alpha).double().sum()))
    z = (0.8 * alpha / BETA).sigmoid()
    z[alpha.sort(stable=True, descending=True).indices[len(alpha) - closed :]] = 0
    return z


def count(config, width):
    """Parameters for these numbers of units per prunable vector, or expected numbers with a gradient."""
    d, head, total, last = config["width"], config["width"] // config["heads"], 0, 1
    for i, (_, kernel, _) in enumerate(config["conv"]):
        channels = width[f"feature_extractor.layers.{i}"]
        total, last = total + last * channels * kernel + 2 * channels * (i == 0), channels
    total = total + 2 * last + (last + 1) * d + config["fixed"]
    for i in range(config["layers"]):
        heads, units = width[f"transformer.layers.{i}.attention"], width[f"transformer.layers.{i}.ffn"]
        total = total + heads * (3 * (d + 1) * head + head * d) + d + units * (2 * d + 1) + d + 4 * d
        total = total + 8 * head + 8 + config["heads"]  # the small gate of relative position
    return total


def expected_sparsity(config, alphas, size):
    return 1 - count(config, {name: open_probability(alpha).sum() for name, alpha in alphas.items()}) / size


def size_term(sparsity, target, multipliers):
    """Augmented Lagrangian: the student descends, the two multipliers ascend, with a negated gradient."""
    first, second = 2 * multipliers.detach() - multipliers
    return first * (sparsity - target) + second * (sparsity - target) ** 2


# --- Step 3: remove units with closed gates ---


def cut(w, config, alphas):
    """Weights and config of the smaller student, which computes what the gated one does, and its gates, all 1."""
    w, z = dict(w), {name: decide(alpha.detach()) for name, alpha in alphas.items()}
    kept = {name: gates.nonzero().flatten() for name, gates in z.items()}
    head = config["width"] // config["heads"]
    for i in range(len(config["conv"])):
        name = f"feature_extractor.layers.{i}"
        for part in (f"{name}.conv.weight", f"{name}.norm.weight", f"{name}.norm.bias"):
            if part in w:
                w[part] = w[part][kept[name]]
        if i:
            before = f"feature_extractor.layers.{i - 1}"
            w[f"{name}.conv.weight"] = (w[f"{name}.conv.weight"] * z[before][:, None])[:, kept[before]]
    for part in ("norm.weight", "norm.bias", "linear.weight"):
        w[f"feature_projection.{part}"] = w[f"feature_projection.{part}"][..., kept[name]]
    ones = {other: torch.ones(len(units)) for other, units in kept.items()}
    ones[name] = z[name][kept[name]]  # a LayerNorm follows, into which the last channels' soft gates cannot fold
    for i in range(config["layers"]):
        p = f"transformer.layers.{i}.attention"
        rows = (kept[p][:, None] * head + torch.arange(head)).flatten()
        for part in "qkv":
            for kind in ("weight", "bias"):
                w[f"{p}.{part}_proj.{kind}"] = w[f"{p}.{part}_proj.{kind}"][rows]
        w[f"{p}.out_proj.weight"] = (w[f"{p}.out_proj.weight"] * z[p].repeat_interleave(head))[:, rows]
        if not len(rows):  # the small gate of relative position is removed with the last head
            w = {name: value for name, value in w.items() if not name.startswith(f"{p}.position_gate")}
        p = f"transformer.layers.{i}.ffn"
        w[f"{p}.fc1.weight"], w[f"{p}.fc1.bias"] = w[f"{p}.fc1.weight"][kept[p]], w[f"{p}.fc1.bias"][kept[p]]
        w[f"{p}.fc2.weight"] = (w[f"{p}.fc2.weight"] * z[p])[:, kept[p]]
    heads = [kept[f"transformer.layers.{i}.attention"].tolist() for i in range(config["layers"])]
    return w, {**config, "kept_heads": heads}, ones


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=200, help="training updates (default 200)")
    updates = parser.parse_args().updates
    torch.manual_seed(1)
    teacher, config, full = read_teacher()
    size, ones = count(config, full), {name: torch.ones(units) for name, units in full.items()}
    batches = read_batches()

    with torch.no_grad():
        calibration = encode(teacher, config, batches[-1], ones)
    distance = cka(calibration)
    groups = cluster(distance, NUM_GROUPS)

    student = {name: w.clone().requires_grad_() for name, w in teacher.items()}
    projection = [torch.eye(config["width"]).requires_grad_(), torch.zeros(config["width"], requires_grad=True)]
    alphas = {n: (math.log(99) + 0.01 * torch.randn(units)).requires_grad_() for n, units in full.items()}
    multipliers = torch.zeros(2, requires_grad=True)
    rates = {0.001: [*student.values(), *projection], 60 / updates: [*alphas.values()], 13 / updates: [multipliers]}
    adam = torch.optim.Adam([{"params": params, "lr": rate} for rate, params in rates.items()])
    warmup = 0.15 * updates
    rate = torch.optim.lr_scheduler.LambdaLR(adam, lambda u: min((u + 1) / warmup, (updates - u) / (updates - warmup)))
    for update in range(updates):
        wave = batches[int(torch.randint(len(batches), ()))]
        with torch.no_grad():
            targets = group_means(encode(teacher, config, wave, ones), groups)
        means = group_means(encode(student, config, wave, {n: sample(a) for n, a in alphas.items()}), groups)
        distilled = group_loss(means, targets, projection)
        sparsity = expected_sparsity(config, alphas, size)
        target = TARGET * min(1, update / (0.3 * updates))
        adam.zero_grad()
        (distilled + size_term(sparsity, target, multipliers)).backward()
        adam.step()
        rate.step()
        if update % 20 == 0 or update == updates - 1:
            print(f"update {update}: loss {distilled.item():.3f}, sparsity {sparsity.item():.3f}, target {target:.3f}")

    with torch.no_grad():
        small, small_config, left = cut(student, config, alphas)
        gated = encode(student, config, batches[0], {n: decide(a) for n, a in alphas.items()})[-1]
        output = encode(small, small_config, batches[0], left)[-1]
        mine = {
            "1 - CKA of layers 0 and 12": distance[0, -1].item(),
            "groups of layers": groups,
            "loss of the last batch": group_loss(means, targets, projection).item(),
            "parameters of the teacher": size,
            "sparsity expected by the gates": expected_sparsity(config, alphas, size).item(),
            "parameters of the student": sum(w.numel() for w in small.values()),
            "largest output": gated.abs().max().item(),
            "its change by the cut": (gated - output).abs().max().item(),
        }
        theirs = by_the_package(calibration, (means, targets, projection), student, alphas, batches[0], gated)
    print(f"\n{'':32}  {'this file':>42}  {'skill_fairseq':>42}")
    for name, value in mine.items():
        print(f"{name:32}" + "".join(f"  {_short(v):>42}" for v in (value, theirs.get(name))))


def _short(value):
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value).replace(", ", ",")


def by_the_package(calibration, loss_inputs, student, alphas, wave, gated_output):
    """The same with skill_fairseq, for the same teacher, states, weights and gates; empty if it is not installed."""
    try:
        import skill_fairseq
    except ImportError:
        return {}
    from skill_fairseq.clustering.linkage import cut_to_number, link
    from skill_fairseq.clustering.similarity import LayerSimilarity
    from skill_fairseq.modules.encoder import SpeechEncoder
    from skill_fairseq.objectives.loss import distillation_loss
    from skill_fairseq.pruning.expected import expected_sparsity

    similarity = LayerSimilarity(["cka"])
    similarity.update(calibration)
    distance = similarity.distances()["cka"]
    means, targets, projection = loss_inputs
    losses = [distillation_loss(F.linear(s, *projection), t).total.item() for s, t in zip(means, targets)]
    encoder = skill_fairseq.load_encoder(HERE / "teacher" / "teacher.safetensors")
    gated = SpeechEncoder(encoder.config.replace(pruning_units=["conv", "heads", "ffn"])).eval()
    gated.load_state_dict(student, strict=False)
    for name, gate in gated.named_gates():
        gate.log_alpha.copy_(alphas[name[: -len(".gate")]])
    small = skill_fairseq.shrink(gated)
    output = gated(wave).hidden_states[-1]
    return {
        "1 - CKA of layers 0 and 12": float(distance[0, -1]),
        "groups of layers": cut_to_number(link(distance), NUM_GROUPS),
        "loss of the last batch": sum(losses) / len(losses),
        "parameters of the teacher": encoder.num_parameters(),
        "sparsity expected by the gates": expected_sparsity(gated),
        "parameters of the student": small.num_parameters(),
        "largest output": output.abs().max().item(),
        "its change by the cut": (output - small(wave).hidden_states[-1]).abs().max().item(),
    }


if __name__ == "__main__":
    main()
