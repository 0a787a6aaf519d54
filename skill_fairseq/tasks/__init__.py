"""The fairseq task ``skill_distillation``: reads manifests and holds the frozen teacher beside the model."""
