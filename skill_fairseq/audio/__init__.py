"""Audio files and manifests, and the classic spectral features."""
