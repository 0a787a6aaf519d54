"""Distillation of groups of teacher layers: the loss, the groups and their projections."""
