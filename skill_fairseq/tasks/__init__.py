"""fairseq task ``skill_distillation``: manifests in, frozen teacher beside the model."""
