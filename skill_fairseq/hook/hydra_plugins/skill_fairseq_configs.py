"""A search path plugin of hydra 1.0, which looks for such in the namespace package ``hydra_plugins``."""

from __future__ import annotations

import os

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.plugins.search_path_plugin import SearchPathPlugin

FAIRSEQ = os.path.join("fairseq", "config")


class SkillFairseqConfigs(SearchPathPlugin):
    """``+run=slurm_1gpu`` beside any ``--config-dir``, with and without a launcher of submitit.

    hydra 1.0 looks for groups in the one ``--config-dir``, and takes ``+run=slurm_1gpu`` without a word for a new key
    "run" (or, where that folder has a group of the name: "Could not load run/slurm_1gpu"): in fairseq's programs the
    folder ``config`` of skill_fairseq now comes after all others. The search path of other programs stays as it is.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by hydra before it adds ``--config-dir`` and its own last entry, "schema"."""
        if os.environ.get("SKILL_FAIRSEQ_HOOK") == "0":
            return
        package = os.environ.get("SKILL_FAIRSEQ_USER_DIR", "")
        folders = [os.path.join(parent, "config") for parent in (package, os.path.dirname(package))]
        config = next((folder for folder in folders if os.path.isdir(os.path.join(folder, "run"))), None)
        main = [str(entry.path) for entry in search_path.get_path() if entry.provider == "main"]
        if config and any(path.endswith(FAIRSEQ) or path.startswith((config, f"file://{config}")) for path in main):
            # --config-dir is put before the first entry of this name.
            search_path.append("schema", f"file://{config}")
            _open_basic_launcher()


def _open_basic_launcher() -> None:
    """A run config sets options of submitit's launcher, for which the launcher of a plain run, which does not look at
    them, has no field ("Error merging run=slurm_1gpu: Key 'name' not in 'BasicLauncherConf'"): its schema becomes open.
    """
    store = ConfigStore.instance()
    basic = dict(store.load("hydra/launcher/basic.yaml").node)
    store.store(group="hydra/launcher", name="basic", node=basic, provider="hydra")
