"""The encoder's building blocks in plain torch, with individual widths per layer."""
