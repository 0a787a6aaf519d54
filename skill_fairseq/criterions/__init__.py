"""fairseq criterion ``skill_group_kd``: group distillation and size constraint."""
