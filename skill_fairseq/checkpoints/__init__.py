"""Reads encoders from foreign and own files, and writes them."""

from skill_fairseq.checkpoints.export import save_encoder
from skill_fairseq.checkpoints.load import load_encoder

__all__ = ["load_encoder", "save_encoder"]
