"""Fault-tolerant training: complete checkpoints, preemption, unreadable files, losses that are not finite.

A subclass of fairseq's trainer replaces it when ``fairseq-hydra-train`` imports the user dir.
"""
