"""fairseq criterions (``distillation``, a sum of objectives; ``skill_group_kd``, SKILL's) and the size constraint."""
