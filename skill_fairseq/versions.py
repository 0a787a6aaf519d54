"""Versions that produced a result."""

from __future__ import annotations

import platform
from importlib import metadata

import numpy as np
import torch

import skill_fairseq


def versions(*packages: str) -> dict[str, str]:
    """Versions to record beside a result.

    Args:
        packages: further installed packages, by their pip names.

    Returns:
        name -> version: for this package, Python, torch (with its build, such as "+cpu"), numpy, and `packages`.

    Raises:
        importlib.metadata.PackageNotFoundError: one of them is not installed.
    """
    return {
        "skill_fairseq": skill_fairseq.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        **{name: metadata.version(name) for name in packages},
    }
