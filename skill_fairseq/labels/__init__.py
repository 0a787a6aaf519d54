"""Labels for fine-tuning: transcripts of a manifest's recordings, split into letters or SentencePiece units."""
