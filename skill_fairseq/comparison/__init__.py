"""Comparing students: how far each is from its teacher, what it costs, and statistics over seeds and speakers."""
