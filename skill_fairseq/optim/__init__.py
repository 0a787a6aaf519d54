"""fairseq learning-rate scheduler ``linear_warmup_decay``."""
