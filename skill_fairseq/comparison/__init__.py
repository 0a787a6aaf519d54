"""Comparing ways of choosing what is distilled: their groups, measurements of a student, and statistics."""
