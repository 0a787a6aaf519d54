"""Measurements of `skill-bench`: training steps, inference, clustering, data loading."""
