"""Models of the Hugging Face hub: `hf://user/repo` and `hf://user/repo@revision` in place of a file."""

from __future__ import annotations

import re
from pathlib import Path

from skill_fairseq.files import PathLike

PREFIX = re.compile(r"hf:/{1,2}")  # a path joins slashes
NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
WANTED = ["*.json", "*.safetensors", "*.bin", "*.pt", "*.py", "*.txt"]
"""Files that an encoder is read from."""


def is_hub_name(path: PathLike) -> bool:
    """Whether this names a repository of the hub, not a file."""
    return PREFIX.match(str(path)) is not None


def local_copy(path: PathLike) -> Path:
    """A folder with the files of a hub's repository; any other path as it is.

    Files are fetched once, into the cache of huggingface_hub (`HF_HOME`), which also knows offline mode
    (`HF_HUB_OFFLINE=1`), tokens (`HF_TOKEN`) and other servers (`HF_ENDPOINT`). The folder is named after the commit.

    Args:
        path: `hf://user/repo`, `hf://user/repo@revision` (a branch, tag or commit), or a path.

    Raises:
        ValueError: the name is none of these, huggingface_hub is missing, or the files cannot be had; says why.
    """
    if not is_hub_name(path):
        return Path(path)
    match = NAME.fullmatch(PREFIX.sub("", str(path)))
    if match is None:
        raise ValueError(f"{path}: no repository of the hub; expected hf://user/repo or hf://user/repo@revision")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(f"{path}: huggingface_hub is missing; run pip install 'skill_fairseq[hub]'") from error
    try:
        return Path(snapshot_download(match["repo"], revision=match["revision"], allow_patterns=WANTED))
    except Exception as error:  # of the hub, of its client and of the network
        raise ValueError(
            f"{path}: cannot be fetched ({_reason(error)}); check the name and revision, the network, and for private "
            "repositories HF_TOKEN"
        ) from error


def push(folder: Path, repo: str, private: bool = False) -> str:
    """Uploads a folder as a model of the hub, which is made where it is missing.

    Args:
        folder: what is uploaded, all of it.
        repo: `user/repo`.
        private: whether a new repository is.

    Returns:
        address of the commit.

    Raises:
        ValueError: huggingface_hub is missing, or the hub refuses; says why.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ValueError("--push: huggingface_hub is missing; run pip install 'skill_fairseq[hub]'") from error
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Written by skill-export"))
    except Exception as error:
        raise ValueError(
            f"--push: {repo}: {_reason(error)}; {folder} is written all the same: log in by hf auth login or HF_TOKEN, "
            f"then hf upload {repo} {folder}"
        ) from error


def _reason(error: Exception) -> str:
    """The first line that says something."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
