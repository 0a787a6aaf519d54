"""Reading encoders from the files of others and our own, and writing them."""

from skill_fairseq.checkpoints.export import save_encoder
from skill_fairseq.checkpoints.load import load_encoder

__all__ = ["load_encoder", "save_encoder"]
