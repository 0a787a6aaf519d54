"""Structured pruning: expected size, the size constraint, and what follows from learned gates."""
