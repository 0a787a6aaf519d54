"""Audio files, manifests, and spectral features."""
