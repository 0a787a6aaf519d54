"""fairseq learning-rate schedulers ``linear_warmup_decay`` and ``by_epoch``."""
