"""What `import skill_fairseq` brings along: only what registering needs."""

from __future__ import annotations

import subprocess
import sys


def test_importing_the_package_imports_nothing_that_only_commands_need() -> None:
    code = (
        "import sys, fairseq; before = set(sys.modules); import skill_fairseq\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    heavy = "matplotlib transformers sklearn onnx onnxruntime s3prl sentencepiece torchaudio scipy"
    assert "'skill_fairseq'" in found
    assert not [name for name in heavy.split() if f"'{name}'" in found]
