"""Compares students: distance to the teacher, costs, and statistics over seeds and speakers."""
