"""`skill-cluster` on the command line, with the repository's speech and a small random teacher."""

import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from messages import says

from skill_fairseq.audio.manifest import read_manifest, write_manifest
from skill_fairseq.checkpoints import load_encoder, save_encoder
from skill_fairseq.cli.cluster import main
from skill_fairseq.clustering import linkage
from skill_fairseq.clustering.calibration import choose_utterances, layer_similarity
from skill_fairseq.clustering.similarity import CHEAP_MEASURES, MEASURES
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.objectives.groups import parse_groups, read_groups
from skill_fairseq.reporting.run_report import cluster_command
from skill_fairseq.reporting.shapes import check_clusters

SPEECH = Path(__file__).parents[2] / "examples" / "tiny" / "data" / "valid.tsv"
LAYERS = 5


def make_teacher(path, layers=LAYERS, width=16, **changes):
    torch.manual_seed(0)
    shape = EncoderConfig(
        conv_feature_layers="[(8,10,5)] + [(8,3,2)] * 4 + [(8,2,2)] * 2",
        encoder_layers=layers,
        encoder_embed_dim=width,
        encoder_ffn_embed_dim=32,
        encoder_attention_heads=2,
        conv_pos=8,
        conv_pos_groups=2,
    ).replace(**changes)
    encoder = SpeechEncoder(shape)
    for parameter in encoder.transformer.layers.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)  # otherwise all layers would be alike
    save_encoder(encoder, path)
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("teacher") / "teacher.safetensors")


@pytest.fixture
def command(teacher, tmp_path, capsys):
    def call(*words, manifest=SPEECH, out=tmp_path / "out"):
        code = main(
            ["--teacher", str(teacher), "--manifest", str(manifest), "--out", str(out), "--max-seconds", "8"]
            + [str(word) for word in words]
        )
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def record(tmp_path, folder="out"):
    return json.loads((tmp_path / folder / "clusters.json").read_text())


def test_recordings_that_cannot_be_read_are_skipped_named_and_counted(command, tmp_path):
    manifest = read_manifest(SPEECH)
    chosen = [i for i in range(len(manifest)) if 8000 <= manifest.sizes[i] <= 32000][:5]
    rows = [(str(manifest.files[i]), manifest.sizes[i]) for i in chosen]
    write_manifest(tmp_path / "good.tsv", tmp_path, *zip(*rows))
    (tmp_path / "broken.raw").write_bytes(bytes(32000))
    write_manifest(tmp_path / "all.tsv", tmp_path, *zip(*rows, ("broken.raw", 16000)))
    assert command(manifest=tmp_path / "good.tsv", out=tmp_path / "good")[0] == 0
    code, _, err = command(manifest=tmp_path / "all.tsv", out=tmp_path / "all")
    assert code == 0 and re.search(says("skipped", "1 of 6"), err)
    found, expected = record(tmp_path, "all"), record(tmp_path, "good")
    assert found["calibration"]["skipped"] == ["broken.raw"] and expected["calibration"]["skipped"] == []
    for name in ("num_utterances", "num_frames", "seconds"):
        assert found["calibration"][name] == expected["calibration"][name]
    assert sorted(found["calibration"]["utterances"]) == sorted(file for file, _ in rows)


def test_only_the_sampled_files_of_a_large_manifest_are_looked_at(command, tmp_path, monkeypatch):
    """The others may be missing, and no work or message is repeated for each of them."""
    manifest = read_manifest(SPEECH)
    names = [f"gone/{i}.flac" for i in range(100_000)]
    write_manifest(tmp_path / "large.tsv", manifest.root, names, [9 * 16000] * len(names))  # none fits into 8 s
    short = [i for i, size in enumerate(manifest.sizes) if size <= 32000][:2]
    with open(tmp_path / "large.tsv", "a") as lines:
        lines.writelines(f"{manifest.paths[i]}\t{manifest.sizes[i]}\n" for i in short)
    made = []
    joined = Path.__truediv__
    monkeypatch.setattr(Path, "__truediv__", lambda path, name: made.append(name) or joined(path, name))
    assert command(manifest=tmp_path / "large.tsv")[0] == 0
    assert sorted(record(tmp_path)["calibration"]["utterances"]) == sorted(manifest.paths[i] for i in short)
    assert len(made) < 100
    (tmp_path / "few.tsv").write_text(f"{manifest.root}\ngone/a.flac\t16000\n{manifest.paths[short[0]]}\t16000\n")
    code, _, err = command(manifest=tmp_path / "few.tsv")
    assert code == 2 and re.search(says("1 of 2", "missing", "gone/a.flac"), err)


def test_files_agree_with_the_library(command, teacher, tmp_path):
    code, out, err = command("--num-groups", "3")
    assert code == 0

    manifest = read_manifest(SPEECH)
    chosen = choose_utterances(manifest, max_seconds=8)
    similarity = layer_similarity(load_encoder(teacher), [manifest.files[i] for i in chosen])
    expected = similarity.distances()
    found = record(tmp_path)
    assert set(found["matrices"]) == set(CHEAP_MEASURES)
    for measure, matrix in found["matrices"].items():
        np.testing.assert_allclose(matrix, expected[measure], rtol=1e-6, atol=1e-9)
    tree = linkage.link(np.array(found["matrices"]["cka_minibatch"]))
    np.testing.assert_array_equal(found["linkage"], tree)
    groups = linkage.cut_to_number(tree, 3)
    assert found["groups"] == groups and len(groups) == 3
    assert found["layers"] == list(range(LAYERS + 1)) and found["measure"] == "cka_minibatch"
    assert found["teacher"] == {
        "name": "teacher.safetensors",
        "sha256": hashlib.sha256(teacher.read_bytes()).hexdigest(),
    }
    calibration = found["calibration"]
    assert calibration["manifest"] == "valid.tsv" and calibration["num_utterances"] == len(chosen)
    assert calibration["utterances"] == [manifest.paths[i] for i in chosen]
    assert calibration["seconds"] == sum(manifest.sizes[i] for i in chosen) / 16000 <= 8
    assert calibration["num_frames"] == similarity.num_frames
    assert found["settings"]["max_seconds"] == 8 and found["settings"]["linkage"] == "average"
    assert found["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in json.dumps(found)  # nothing of this machine

    text = (tmp_path / "out" / "groups.yaml").read_text()
    assert yaml.safe_load(text) == {"groups": groups}
    override = "criterion.groups=" + json.dumps(groups).replace(" ", "")
    assert f"'{override}'" in out and override in text
    assert (tmp_path / "out" / "clusters.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "clusters.json",
        "clusters.png",
        "groups.yaml",
    ]
    rows = [line.split() for line in out.splitlines() if line[:5].strip().isdigit()]
    assert [row[0] for row in rows] == ["0", "1", "2"]


def test_manifest_order_and_batch_size_change_nothing(command, tmp_path):
    manifest = read_manifest(SPEECH)
    order = list(range(len(manifest)))[::-1]
    write_manifest(
        tmp_path / "back.tsv",
        manifest.root,
        [manifest.paths[i] for i in order],
        [manifest.sizes[i] for i in order],
    )
    assert command()[0] == 0
    one = record(tmp_path)
    assert command("--batch-size", 16, manifest=tmp_path / "back.tsv")[0] == 0
    two = record(tmp_path)
    assert one["groups"] == two["groups"]
    assert one["calibration"]["utterances"] == two["calibration"]["utterances"]
    for measure in one["matrices"]:
        np.testing.assert_allclose(two["matrices"][measure], one["matrices"][measure], rtol=1e-5, atol=1e-7)


def test_groups_go_into_a_training_config(command, tmp_path):
    config = tmp_path / "mine.yaml"
    text = "task: {_name: x}\ncriterion:\n  _name: skill_group_kd\n  groups: ???  # filled in\n"
    config.write_text(text)
    code, out, _ = command("--config", config, "--num-groups", 2)
    assert code == 0 and str(config) in out
    groups = record(tmp_path)["groups"]
    assert config.read_text() == text.replace("???", str(groups))


def test_without_layer_0(command, tmp_path):
    assert command("--no-layer-0", "--measure", "l2", "--linkage", "ward", "--num-groups", 2)[0] == 0
    found = record(tmp_path)
    assert found["layers"] == [1, 2, 3, 4, 5]
    assert sorted(sum(found["groups"], [])) == [1, 2, 3, 4, 5]
    matrix = np.array(found["matrices"]["l2"])
    assert matrix.shape == (LAYERS, LAYERS)
    tree = linkage.link(matrix, "ward")
    assert found["groups"] == [[i + 1 for i in group] for group in linkage.cut_to_number(tree, 2)]


def test_teachers_of_two_widths_are_clustered_together(command, teacher, tmp_path):
    """CKA between all layers equals the library's; criterion.groups_file accepts groups.yaml."""
    wider = make_teacher(tmp_path / "wider.safetensors", layers=3, width=24)
    code, out, err = command("--teacher", wider, "--num-groups", 3, "--no-layer-0", "--compare")
    assert code == 0, err
    found = record(tmp_path)
    names = [1, 2, 3, 4, 5, "1/1", "1/2", "1/3"]
    assert found["layers"] == names and set(found["matrices"]) == {"cka", "cka_minibatch"}
    assert [each["name"] for each in found["teacher"]] == ["teacher.safetensors", "wider.safetensors"]
    manifest = read_manifest(SPEECH)
    files = [manifest.files[i] for i in choose_utterances(manifest, max_seconds=8)]
    encoders = [load_encoder(teacher), load_encoder(wider)]
    expected = layer_similarity(encoders, files, ["cka"]).distances()["cka"]
    kept = [1, 2, 3, 4, 5, 7, 8, 9]
    np.testing.assert_allclose(found["matrices"]["cka"], expected[np.ix_(kept, kept)], rtol=1e-6, atol=1e-9)
    one = layer_similarity(encoders[0], files, ["cka"]).distances()["cka"]
    np.testing.assert_allclose(expected[:6, :6], one, rtol=1e-6, atol=1e-9)
    groups = linkage.cut_to_number(linkage.link(np.array(found["matrices"]["cka_minibatch"])), 3)
    assert found["groups"] == [[names[i] for i in group] for group in groups]
    text = (tmp_path / "out" / "groups.yaml").read_text()
    read = parse_groups(read_groups(None, tmp_path / "out" / "groups.yaml"), [5, 3])
    assert read == tuple(map(tuple, found["groups"]))
    override = f"'criterion.groups={json.dumps(found['groups']).replace(' ', '')}'"
    assert override in text and override in out
    check_clusters(found)
    assert cluster_command(found)[:4] == ["skill-cluster", "--teacher", "teacher.safetensors", "wider.safetensors"]


def test_teachers_that_do_not_fit_together(command, tmp_path):
    wider = make_teacher(tmp_path / "wider.safetensors", width=24)
    slower = make_teacher(tmp_path / "slower.safetensors", sample_rate=8000)
    for words, said in (
        (["--teacher", wider, "--measure", "cosine"], ["cosine", "[16, 24]", "cka"]),
        (["--teacher", wider, "--neighbours-only"], ["--neighbours-only", "2 teachers"]),
        (["--teacher", slower], ["--teacher", "slower.safetensors", "sample_rate", 8000, 16000]),
    ):
        code, out, err = command(*words)
        assert code == 2 and out == "" and re.search(says(*said), err), err
    assert not (tmp_path / "out").exists()


def test_height_silhouette_and_neighbours(command, tmp_path):
    assert command("--measure", "loss", "--neighbours-only", "--silhouette", 2, 4)[0] == 0
    found = record(tmp_path)
    distances = np.array(found["matrices"]["loss"])
    tree = linkage.link(distances, neighbours_only=True)
    groups, scores = linkage.cut_by_silhouette(tree, distances, 2, 4)
    assert found["groups"] == groups
    assert found["cut"]["silhouettes"] == {str(number): score for number, score in scores.items()}

    height = float(np.mean(tree[1:3, 2]))
    assert command("--measure", "loss", "--neighbours-only", "--height", height)[0] == 0
    assert record(tmp_path)["groups"] == linkage.cut_at_height(tree, height)
    assert record(tmp_path)["cut"] == {"by": "height", "height": height}


def test_comparison_shows_every_measure(command, tmp_path):
    code, out, _ = command("--compare", "--num-groups", 3)
    assert code == 0
    matrices = record(tmp_path)["matrices"]
    assert set(matrices) == set(MEASURES)
    lines = {
        line.split()[0]: line for line in out.split("3 groups by each measure:")[1].splitlines() if line[:2] == "  "
    }
    for measure in MEASURES:
        groups = linkage.cut_to_number(linkage.link(np.array(matrices[measure])), 3)
        shown = lines[measure].split(maxsplit=1)[1].split(" | ")
        assert [part.split(",")[0].split("-")[0] for part in shown] == [str(group[0]) for group in groups]


def test_without_matplotlib_there_is_no_picture_but_all_else(command, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # how Python itself blocks an import
    code, _, err = command()
    assert code == 0
    assert len(err.strip().splitlines()) == 1 and "pip install '.[plots]'" in err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["clusters.json", "groups.yaml"]


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["--linkage", "ward"],
            ["ward", "'cka_minibatch'", "measure l2"],
        ),
        (["--num-groups", "7"], ["groups: 7", "1 to 6"]),
        (["--silhouette", "2", "6"], ["silhouette", "2 to 6", "MIN <= MAX", "2 to 5"]),
        (["--height", "-1"], ["--height: -1.0", "at least 0"]),
        (["--max-seconds", "0"], ["--max-seconds: 0.0", "above 0"]),
        (["--max-seconds", "0.01"], ["0.01 s", "--max-seconds"]),
        (["--max-utterances", "0"], ["--max-utterances: 0", "at least 1"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "config"]),
        (["--manifest", "nowhere.tsv"], ["nowhere.tsv", "manifest"]),
        (["--teacher", "nowhere.pt"], ["nowhere.pt"]),
        (["--teacher", str(SPEECH)], ["valid.tsv"]),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(command, tmp_path, words, said):
    code, out, err = command(*words)
    assert code == 2 and out == ""
    assert re.search(says("error", *said), err) and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_missing_audio_and_empty_manifest(command, tmp_path):
    (tmp_path / "missing.tsv").write_text(".\nnot_there.flac\t16000\n")
    code, _, err = command(manifest=tmp_path / "missing.tsv")
    assert code == 2 and re.search(says("not_there.flac", "1 of 1", "missing"), err)
    (tmp_path / "empty.tsv").write_text(".\n")
    code, _, err = command(manifest=tmp_path / "empty.tsv")
    assert code == 2 and re.search(says("empty.tsv", "no audio"), err)


def test_unusable_config_is_refused_before_the_work(command, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("task: {}\n")
    code, _, err = command("--config", config)
    assert code == 2 and re.search(says(config, "'criterion:'"), err)
    assert config.read_text() == "task: {}\n" and not (tmp_path / "out").exists()


def test_two_cuts_at_once_are_refused(command):
    code, _, err = command("--num-groups", 3, "--height", 0.5)
    assert code == 2 and re.search(says("error", "--height", "--num-groups"), err) and err.count("\n") == 1
