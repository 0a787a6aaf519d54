"""Versions that are recorded beside results."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError

import numpy
import pytest
import scipy
import sklearn
import torch

import skill_fairseq
from skill_fairseq.versions import versions


def test_they_are_those_of_what_runs_here() -> None:
    assert versions("scipy", "scikit-learn") == {
        "skill_fairseq": skill_fairseq.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
        "scikit-learn": sklearn.__version__,
    }


def test_a_package_that_is_not_there_is_named() -> None:
    with pytest.raises(PackageNotFoundError, match="no-such-package"):
        versions("no-such-package")
