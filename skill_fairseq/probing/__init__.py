"""Probing of frozen features: pooling over time, classification, verification, intervals."""
