"""fairseq models: ``wavlm`` (unpruned, for pre-training) and ``skill_student`` (gated or shrunk)."""
