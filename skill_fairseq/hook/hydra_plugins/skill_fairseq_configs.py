"""A search path plugin for hydra 1.0, which finds it in the namespace package ``hydra_plugins``."""

from __future__ import annotations

import os

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.plugins.search_path_plugin import SearchPathPlugin

FAIRSEQ = os.path.join("fairseq", "config")


class SkillFairseqConfigs(SearchPathPlugin):
    """``+run=slurm_1gpu`` with any ``--config-dir``, with and without submitit's launcher.

    hydra 1.0 looks for groups in ``--config-dir`` only, and otherwise silently reads ``+run=slurm_1gpu`` as a new key
    "run" (or, if that folder has such a group: "Could not load run/slurm_1gpu"). In fairseq's programs, skill_fairseq's
    folder ``config`` is now searched after all others. Other programs' search path does not change.
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
            # hydra puts --config-dir before the first entry of this name.
            search_path.append("schema", f"file://{config}")
            _open_basic_launcher()


def _open_basic_launcher() -> None:
    """Opens the schema of the basic launcher: a run config sets options of submitit's launcher, for which the basic one
    has no fields ("Error merging run=slurm_1gpu: Key 'name' not in 'BasicLauncherConf'").
    """
    store = ConfigStore.instance()
    basic = dict(store.load("hydra/launcher/basic.yaml").node)
    store.store(group="hydra/launcher", name="basic", node=basic, provider="hydra")
