"""Models on the Hugging Face hub: `hf://user/repo` and `hf://user/repo@revision` as paths."""

from __future__ import annotations

import re
from pathlib import Path

from skill_fairseq.files import PathLike

PREFIX = re.compile(r"hf:/{1,2}")  # pathlib merges slashes
NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
WANTED = ["*.json", "*.safetensors", "*.bin", "*.pt", "*.py", "*.txt"]
"""Files needed to read an encoder."""


def is_hub_name(path: PathLike) -> bool:
    """Whether a path names a hub repository."""
    return PREFIX.match(str(path)) is not None


def local_copy(path: PathLike) -> Path:
    """Downloads a hub repository and returns its folder; returns any other path unchanged.

    Files are downloaded once into huggingface_hub's cache (`HF_HOME`); its offline mode (`HF_HUB_OFFLINE=1`), tokens
    (`HF_TOKEN`) and other servers (`HF_ENDPOINT`) work too. The folder's name is the commit.

    Args:
        path: `hf://user/repo`, `hf://user/repo@revision` (a branch, tag or commit), or a path.

    Raises:
        ValueError: the name is malformed, huggingface_hub is missing, or the download fails; says why.
    """
    if not is_hub_name(path):
        return Path(path)
    match = NAME.fullmatch(PREFIX.sub("", str(path)))
    if match is None:
        raise ValueError(f"{path}: not a hub repository; expected hf://user/repo or hf://user/repo@revision")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(f"{path}: huggingface_hub is missing; run pip install 'skill_fairseq[hub]'") from error
    try:
        return Path(snapshot_download(match["repo"], revision=match["revision"], allow_patterns=WANTED))
    except Exception as error:  # errors of hub, client and network
        raise ValueError(
            f"{path}: cannot be downloaded ({_reason(error)}); check the name and revision, the network, and for "
            "private repositories HF_TOKEN"
        ) from error


def push(folder: Path, repo: str, private: bool = False) -> str:
    """Uploads a folder to a model repository on the hub, which is created if it does not exist.

    Args:
        folder: the folder; all its files are uploaded.
        repo: `user/repo`.
        private: whether to make a new repository private.

    Returns:
        URL of the commit.

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
            f"--push: {repo}: {_reason(error)}; {folder} was written: log in with hf auth login or HF_TOKEN, then run "
            f"hf upload {repo} {folder}"
        ) from error


def _reason(error: Exception) -> str:
    """The first non-empty line of an error."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
