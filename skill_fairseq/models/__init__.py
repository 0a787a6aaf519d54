"""fairseq models: ``wavlm`` (full shape, pre-trainable) and ``skill_student`` (gated or shrunk)."""
