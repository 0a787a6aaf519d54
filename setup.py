"""Build of skill_fairseq: its requirements, its start-up hook, its configs."""

import atexit
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from setuptools import find_packages, setup  # first: provides distutils on Python >= 3.12
from distutils.command.install_headers import install_headers

HOOK_PTH = "skill_fairseq_hook.pth"
HOOK_LINE = "import _skill_fairseq_hook; _skill_fairseq_hook.install()\n"


class InstallHookPth(install_headers):
    """Writes the hook's one-line ``.pth`` to the root of site-packages.

    ``headers`` is the only kind of non-module file that setuptools installs both for ``pip install .``
    and for ``pip install -e .`` (an editable build runs no ``install_data``). In both, ``install_lib``
    is the root of the wheel being made: the file is in RECORD, and ``pip uninstall`` removes it.
    """

    def run(self):
        root = self.get_finalized_command("install").install_lib
        self.mkpath(root)
        path = os.path.join(root, HOOK_PTH)
        Path(path).write_text(HOOK_LINE)
        self.outfiles.append(path)


def refuse_pip_without_omegaconf():
    """Stops with one line under pip >= 24.1, which rejects the metadata of omegaconf 2.0.6.

    Otherwise pip reports "ResolutionImpossible" only after downloading everything. pip runs this file through its own
    copy of pyproject_hooks, so the main module is inside the running pip, unlike under uv and build. PIP_NO_DEPS=1
    installs without the requirements, with any pip.
    """
    main = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
    pip = next((folder for folder in main.parents if folder.name == "pip"), None)
    if pip is None or os.environ.get("PIP_NO_DEPS", "").lower() in ("1", "true", "yes", "on"):
        return
    version = re.search(r'__version__ = "(\d+)\.(\d+)', (pip / "__init__.py").read_text())
    if version and tuple(map(int, version.groups())) >= (24, 1):
        sys.exit(
            f"skill_fairseq: pip {'.'.join(version.groups())} cannot install omegaconf 2.0.6, which fairseq "
            "0.12.2 needs; run \"python -m pip install 'pip<24.1'\" first, or install with uv"
        )


def build_folder():
    """A folder for this process only: a kept ./build would put deleted modules into the next wheel."""
    folder = tempfile.mkdtemp(prefix="skill_fairseq_build_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


PLOTS = ["matplotlib"]
PROBE = ["scikit-learn"]
HF = ["transformers"]
HUB = ["huggingface_hub"]
ONNX = ["onnx", "onnxscript", "onnxruntime"]
OPENVINO = ["openvino", *ONNX]
SLURM = ["hydra-submitit-launcher==1.1.1", "submitit"]  # the last launcher for hydra 1.0
# The old torch tested with Python 3.10 lacks torch.export, which the ONNX export needs.
ONNX_TESTS = [f"{package}; python_version >= '3.11'" for package in OPENVINO]
COMMANDS = "manifest cluster shrink export info probe compare bench labels features report".split()
BUILD = ["build", "setuptools>=64", "wheel"]
TESTS = ["pytest", "pytest-xdist", "ruff", "mypy", *BUILD, *PLOTS, *PROBE, *HF, *ONNX_TESTS, *SLURM]

refuse_pip_without_omegaconf()
build = build_folder()
setup(
    name="skill_fairseq",
    version=re.findall(r'__version__ = "(.+)"', Path("skill_fairseq/__init__.py").read_text())[0],
    description="SKILL: similarity-aware distillation and pruning of speech encoders, as a fairseq plugin",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="skill_fairseq contributors",
    license="MIT",
    classifiers=["Operating System :: POSIX :: Linux"],
    python_requires=">=3.10,<3.14",
    install_requires=[
        "fairseq==0.12.2",
        "hydra-core==1.0.7",
        "omegaconf==2.0.6",
        "torch>=1.12",
        "numpy",
        "scipy",
        "soundfile",
        "safetensors",
        "tqdm",
        "PyYAML",
        "sentencepiece",  # fairseq uses these three without requiring them
        "tensorboardX",
        "editdistance",
    ],
    extras_require={
        "plots": PLOTS,
        "probe": PROBE,
        "hf": HF,
        "hub": HUB,
        "onnx": ONNX,
        "openvino": OPENVINO,
        "slurm": SLURM,
        "tests": TESTS,
    },
    # The hook is a top-level module, so that starting it imports neither torch nor fairseq; the configs are part of the
    # package, so that wheels include them.
    packages=[*find_packages(include=["skill_fairseq", "skill_fairseq.*"]), "skill_fairseq.config", "hydra_plugins"],
    package_dir={
        "": "skill_fairseq/hook",
        "skill_fairseq": "skill_fairseq",
        "skill_fairseq.config": "config",
        "hydra_plugins": "skill_fairseq/hook/hydra_plugins",  # a namespace package, shared with hydra's other plugins
    },
    package_data={"skill_fairseq.config": ["**/*.yaml"]},
    py_modules=["_skill_fairseq_hook"],
    headers=[HOOK_PTH],
    cmdclass={"install_headers": InstallHookPth},
    options={"build": {"build_base": build}, "egg_info": {"egg_base": build}},
    entry_points={"console_scripts": [f"skill-{name} = skill_fairseq.cli.{name}:main" for name in COMMANDS]},
)
