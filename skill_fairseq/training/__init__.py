"""Training that survives a cluster: whole checkpoints, preemption, unreadable files, losses that are not finite.

fairseq's trainer is subclassed, and put in its place when the user dir is imported by ``fairseq-hydra-train``.
"""
