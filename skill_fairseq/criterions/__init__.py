"""fairseq criterions: ``distillation``, a sum of objectives, and ``skill_group_kd``, SKILL's one; size constraint."""
