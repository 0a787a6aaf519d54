"""The model card holds the known facts about the run, and nothing else."""

from __future__ import annotations

import yaml

from skill_fairseq.exporting.model_card import facts, model_card


def test_card(small):
    encoder = small.random_encoder(
        heads=[[1, 2], [], None], ffn_dims=[0, None, 7], original_parameters=100_000, normalize=True
    )
    provenance = {"teacher": "WavLM-Base+.pt", "groups": [[0, 1], [2, 3]], "target_sparsity": 0.75, "other": "a|b"}
    text = model_card(encoder, provenance, "load()", "transformers", ("wavlm",))
    _, header, body = text.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "transformers",
        "pipeline_tag": "feature-extraction",
        "tags": ["speech", "skill_fairseq", "wavlm"],
    }
    rows = dict(line[2:-2].split(" | ", 1) for line in body.splitlines() if line.startswith("| ") and line != "| | |")
    size = encoder.num_parameters()
    assert rows == {
        "parameters": f"{size:,}",
        "before pruning": f"100,000 (sparsity {(1 - size / 100_000) * 100:.1f} %)",
        "MACs per second of audio": f"{encoder.macs(1.0):,}",
        "conv channels": "16 16 16 16 16 16 16",
        "attention heads": "2 0 -",
        "FFN units": "0 - 7",
        "teacher": "WavLM-Base+.pt",
        "groups of teacher layers": "[[0, 1], [2, 3]]",
        "target sparsity": "0.75",
        "other": r"a\|b",
    }
    assert "```python\nload()\n```" in body and "normalised to zero mean" in body and "(20 ms)" in body


def test_what_is_unknown_is_left_out(small):
    names = [name for name, _ in facts(small.random_encoder(), {})]
    assert names == ["parameters", "MACs per second of audio", "conv channels", "attention heads", "FFN units"]
