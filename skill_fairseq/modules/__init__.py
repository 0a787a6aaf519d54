"""The encoder's building blocks in plain torch; per-layer widths are passed in."""
