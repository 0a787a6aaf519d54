"""Reduces the logged values of batches to means over all frames."""

from typing import Any, Dict, List

from fairseq import metrics

OF = "/of"
"""Suffix of a logged sum's name that gives the name of the count to divide it by."""


def reduce_metrics(logging_outputs: List[Dict[str, Any]]) -> None:
    """Logs means over all frames, quotients of sums, and audio per second of training."""
    frames = sum(log.get("frames", 0) for log in logging_outputs)
    if not frames:
        return
    counted = {"frames", "nsentences", "ntokens", "audio_seconds"}
    for name in logging_outputs[0]:
        if f"{name}{OF}" in logging_outputs[0]:
            above, below = (sum(float(log.get(key, 0)) for log in logging_outputs) for key in (name, f"{name}{OF}"))
            if below:
                metrics.log_scalar(name, above / below, below, round=4)
        elif name not in counted and not name.endswith(OF):
            mean = sum(log.get(name, 0.0) for log in logging_outputs) / frames
            metrics.log_scalar(name, mean, frames, round=4)
    metrics.log_speed("audio_s_per_s", sum(log.get("audio_seconds", 0.0) for log in logging_outputs), round=1)
