"""Labels for fine-tuning: transcripts of a manifest's recordings, cut into letters or SentencePiece units."""
