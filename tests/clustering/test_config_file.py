"""Writing groups into a training config changes nothing else."""

import os

import pytest
import yaml
from messages import says

from skill_fairseq.clustering.config_file import format_groups, merge_groups, read_config
from skill_fairseq.files import write_file

GROUPS = [[0], [1, 2]]
LINE = "groups: [[0], [1, 2]]"

CONFIG = """# @package _group_

task:
  _name: skill_distillation   # the task
  groups: 3  # not these
criterion:
  _name: skill_group_kd
  # which layers
  groups: [[0], [4], [8], [12]]  # DPHuBERT's
  cos_weight: 1.0

optimization:
  lr: [2e-4]
  save_dir: ${env:SAVE}
"""


def test_only_the_groups_change():
    assert merge_groups(CONFIG, GROUPS) == CONFIG.replace("groups: [[0], [4], [8], [12]]", LINE)
    assert merge_groups(merge_groups(CONFIG, GROUPS), GROUPS) == merge_groups(CONFIG, GROUPS)


@pytest.mark.parametrize(
    "before, after",
    [
        ("  groups: ???  # fill\n  a: 1\n", f"  {LINE}  # fill\n  a: 1\n"),
        ("  groups:\n  a: 1\n", f"  {LINE}\n  a: 1\n"),
        ("  groups: null\n", f"  {LINE}\n"),
        ("  'groups' : []\n", "  'groups' : [[0], [1, 2]]\n"),
        ("  groups: [[0],\n    [1]]  # end\n  a: 1\n", f"  {LINE}  # end\n  a: 1\n"),
        ("  groups:\n  - [0]\n  - [1]\n\n  # next\n  a: 1\n", f"  {LINE}\n\n  # next\n  a: 1\n"),
        ("  groups:\n    - - 0\n    - - 4\n      - 5  # last\n  a: 1\n", f"  {LINE}  # last\n  a: 1\n"),
        ("  groups:  # why\n    # so\n    - [0]\n", f"  {LINE}  # why\n    # so\n"),
        ("  _name: x  # kind\n  a: 1\n", f"  {LINE}\n  _name: x  # kind\n  a: 1\n"),
        ("  _name: x", f"  {LINE}\n  _name: x"),
        ("    a: 1  # one\n", f"    {LINE}\n    a: 1  # one\n"),
        ("  a: 1\r\n  b: 2\r\n", f"  {LINE}\r\n  a: 1\r\n  b: 2\r\n"),
    ],
)
def test_every_notation(before, after):
    assert merge_groups("x: 1\ncriterion:\n" + before, GROUPS) == "x: 1\ncriterion:\n" + after


def test_flow_notation():
    text = "criterion: {_name: x, groups: [[3]], b: 2}  # c\n"
    assert merge_groups(text, GROUPS) == "criterion: {_name: x, groups: [[0], [1, 2]], b: 2}  # c\n"
    assert merge_groups("criterion: {b: 2}\n", GROUPS) == "criterion: {groups: [[0], [1, 2]], b: 2}\n"


@pytest.mark.parametrize(
    "text, said",
    [
        ("task: {a: 1}\n", ["mine.yaml", "'criterion:'"]),
        ("", ["mine.yaml", "'criterion:'"]),
        ("criterion:\n", ["mine.yaml", "'criterion:'"]),
        ("criterion: [\n", ["mine.yaml", "YAML"]),
        (
            "criterion:\n  groups_file: a.yaml\n",
            ["criterion.groups_file", "'a.yaml'", "criterion.groups"],
        ),
        (
            "old: &g [[3]]\ncriterion:\n  groups: *g\n",
            ["mine.yaml", "replaced", "alias", "by hand"],
        ),
        ("criterion:\n  groups: &g [[3]]\n  other: *g\n", ["mine.yaml", "replaced", "alias", "by hand"]),
    ],
)
def test_what_cannot_be_edited_is_refused(text, said):
    with pytest.raises(ValueError, match=says(*said)):
        merge_groups(text, GROUPS, "mine.yaml")


def test_file_is_replaced_in_place(tmp_path):
    real, link = tmp_path / "real.yaml", tmp_path / "link.yaml"
    real.write_bytes(CONFIG.replace("\n", "\r\n").encode())
    real.chmod(0o640)
    link.symlink_to(real)
    write_file(link, merge_groups(read_config(link), GROUPS))
    assert link.is_symlink()
    assert real.read_bytes() == merge_groups(CONFIG, GROUPS).replace("\n", "\r\n").encode()
    assert os.stat(real).st_mode & 0o777 == 0o640
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link.yaml", "real.yaml"]


def test_missing_file():
    with pytest.raises(FileNotFoundError, match=says("nowhere.yaml", "config")):
        read_config("nowhere.yaml")


def test_one_line_for_all_readers():
    from hydra.core.override_parser.overrides_parser import OverridesParser

    line = format_groups(GROUPS, ",")
    assert line == "[[0],[1,2]]" and yaml.safe_load(line) == GROUPS
    override = OverridesParser.create().parse_override(f"criterion.groups={line}")
    assert override.key_or_group == "criterion.groups" and override.value() == GROUPS
