"""Faults on a cluster: unreadable files, losses that are not finite, full disks, missing teachers."""

from __future__ import annotations

import io
import re
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from disturbed import Run, same_outcome
from messages import says

pytestmark = pytest.mark.slow

TWELVE = ["optimization.max_update=12", "checkpoint.save_interval_updates=4"]


@pytest.fixture
def own_speech(speech: Path, tmp_path: Path) -> Path:
    """A copy of the data to damage."""
    return shutil.copytree(speech, tmp_path / "speech")


def where(speech: Path, teacher_file: Path) -> list[str]:
    return [f"task.data={speech}", f"task.teacher={teacher_file}"]


def spoil(speech: Path, *names: str) -> list[str]:
    """Makes a file unreadable."""
    files = [speech / name for name in names]
    for file in files:
        file.write_bytes(b"RIFF" + bytes(range(256)) * 20)
    return [str(file) for file in files]


def absurd(speech: Path, name: str) -> str:
    """A FLAC whose header claims 2^35 samples, more than fit into memory."""
    content = io.BytesIO()
    soundfile.write(content, soundfile.read(str(speech / name))[0], 16000, format="FLAC")
    data = content.getvalue()
    header = int.from_bytes(data[18:26], "big") | 1 << 35
    (speech / name).write_bytes(data[:18] + header.to_bytes(8, "big") + data[26:])
    return str(speech / name)


def infinite(speech: Path, name: str) -> str:
    """Finite samples whose sums are not finite."""
    frames = soundfile.info(str(speech / name)).frames
    soundfile.write(str(speech / name), np.full(frames, 3.4e38, np.float32), 16000, subtype="FLOAT")
    return str(speech / name)


@pytest.mark.faults(
    "an audio file cannot be read",
    "skipped, named in the log and counted",
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_unreadable_files_are_skipped_and_named(
    own_speech: Path, teacher_file: Path, tmp_path: Path, world_size: int
) -> None:
    files = [*spoil(own_speech, "train/3.wav"), absurd(own_speech, "train/17.wav"), *spoil(own_speech, "valid/1.wav")]
    run = Run(tmp_path / "run", *where(own_speech, teacher_file), *TWELVE, world_size=world_size).finish()
    assert sorted(run.updates()) == list(range(1, 13))
    logs = "".join(run.log(rank) for rank in range(world_size))
    epochs = int(max(entry["epoch"] for entry in run.updates().values()))
    assert epochs >= 2
    for file, why in zip(files, ("cannot be decoded", "its header gives 34")):
        # Once per epoch, on any rank; the last epoch may not have reached it.
        assert logs.count(f"file skipped: {file}: {why}") in (epochs - 1, epochs)
    assert f"file skipped: {files[2]}: cannot be decoded" in logs


@pytest.mark.faults(
    "more than task.max_unreadable_files in an epoch",
    "the run ends, on all ranks together, with their number",
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_too_many_unreadable_files_end_the_run(
    own_speech: Path, teacher_file: Path, tmp_path: Path, world_size: int
) -> None:
    """Ranks get one or two each, and stop together, without waiting for each other."""
    spoil(own_speech, "train/3.wav", "train/9.wav", "train/17.wav")
    limit = "task.max_unreadable_files=2"
    run = Run(tmp_path / "run", *where(own_speech, teacher_file), *TWELVE, limit, world_size=world_size)
    assert run.start().wait() == [1] * world_size
    for rank in range(world_size):
        assert re.search(r"ValueError: 3 .*task\.max_unreadable_files.* 2\b", run.log(rank))


@pytest.mark.faults(
    "a loss is NaN or infinite",
    "the update is skipped on all ranks; the batch's files are named",
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loss_that_is_not_finite_skips_the_update_and_names_the_files(
    own_speech: Path, teacher_file: Path, tmp_path: Path, world_size: int
) -> None:
    file = infinite(own_speech, "train/5.wav")
    run = Run(tmp_path / "run", *where(own_speech, teacher_file), *TWELVE, world_size=world_size).finish()
    assert sorted(run.updates()) == list(range(1, 13))
    skipped = [re.findall(r"update (\d+) is skipped: (.*?); (.*)", run.log(rank)) for rank in range(world_size)]
    assert skipped[0] and all([s[0] for s in skipped[0]] == [s[0] for s in other] for other in skipped)
    for lines in zip(*skipped):  # the rank that had the file names it
        assert all(reason == "a loss is NaN or infinite" for _, reason, _ in lines)
        named = [files for _, _, files in lines if files != "another rank names the files"]
        assert len(named) == 1 and file in named[0]
    state = run.checkpoint()
    assert all(tensor.isfinite().all() for part in ("model", "criterion") for tensor in state[part].values())
    assert all(np.isfinite(list(entry.values())).all() for entry in run.updates().values())


def test_in_bf16_an_update_is_skipped_alone(own_speech: Path, teacher_file: Path, tmp_path: Path) -> None:
    """fairseq's optimizer would multiply the next gradient by the factor of the skipped one."""
    infinite(own_speech, "train/5.wav")
    settings = [*where(own_speech, teacher_file), *TWELVE, "optimization.update_freq=[2]"]
    norms = []
    for name, precision in (("fp32", []), ("bf16", ["common.bf16=true", "common.fp16_no_flatten_grads=true"])):
        run = Run(tmp_path / name, *settings, *precision).finish()
        skipped = [int(update) for update in re.findall(r"update (\d+) is skipped: a loss is NaN", run.log())]
        assert skipped and min(skipped) < 12
        norms.append([entry["gnorm"] for _, entry in sorted(run.updates().items())])
    assert len(norms[0]) == 12 and norms[1] == pytest.approx(norms[0], rel=0.2)


@pytest.mark.faults(
    "more than task.max_skipped_updates in a row",
    "the run ends with an error",
)
def test_too_many_skipped_updates_end_the_run(own_speech: Path, teacher_file: Path, tmp_path: Path) -> None:
    for i in range(24):
        infinite(own_speech, f"train/{i}.wav")
    run = Run(tmp_path / "run", *where(own_speech, teacher_file), *TWELVE, "task.max_skipped_updates=2")
    assert run.start().wait() == [1]
    assert len(re.findall("update 1 is skipped", run.log())) == 3
    assert re.search("FloatingPointError: 3 updates.*task.max_skipped_updates.* 2", run.log())


@pytest.mark.faults(
    "the disk is full",
    "the run ends and names the file, the reason and the free space; older checkpoints are intact",
)
def test_a_full_disk_ends_the_run_and_older_checkpoints_stay_whole(
    data: list[str], straight: Any, tmp_path: Path
) -> None:
    """A limit on file sizes simulates a full disk: the system refuses in the middle of a write."""
    run = Run(tmp_path, *data, "checkpoint.save_interval_updates=5")
    run.start()
    run.wait_for(lambda: (tmp_path / "checkpoint_last.pt").exists())
    run.kill()
    whole = {path.name: path.read_bytes() for path in tmp_path.glob("checkpoint*.pt")}
    size = max(map(len, whole.values()))
    assert size > 200_000
    updates = run.checkpoint()["optimizer_history"][-1]["num_updates"]
    assert updates % 5 == 0 and updates + 5 < 40
    limit = size - 50_000  # logs stay below

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    run.start(preexec_fn=small_disk)
    assert run.wait() == [1]
    number = re.findall(r"Preparing to save checkpoint for epoch \d+ @ (\d+) updates", run.log())[-1]
    assert int(number) == updates + 5
    refused = re.findall(r"CheckpointNotWritten: (?:.*/)?(\S+): the checkpoint could not be written", run.log())
    name = rf"checkpoint_(\d+_{number}|last)\.pt"  # last: at the end of an epoch
    assert len(refused) == 1 and re.fullmatch(name, refused[0])
    assert re.search("File too large.* GB", run.log())
    assert {path.name: path.read_bytes() for path in tmp_path.glob("checkpoint*.pt*")} == whole
    run.finish()
    same_outcome(run, straight(1))


@pytest.mark.faults(
    "checkpoint_last.pt is truncated or damaged",
    "it is named and renamed to *.damaged; the newest undamaged checkpoint before it is used",
)
def test_a_truncated_last_checkpoint_costs_what_came_after_the_one_before(
    data: list[str], straight: Any, tmp_path: Path
) -> None:
    run = Run(tmp_path, *data)
    run.start()
    run.wait_for(lambda: run.last_update() >= 10)
    run.kill()
    last = tmp_path / "checkpoint_last.pt"
    newest = max(tmp_path.glob("checkpoint_*_*.pt"), key=lambda path: int(path.stem.rpartition("_")[2])).name
    with open(last, "r+b") as file:
        file.truncate(last.stat().st_size - 1000)
    run.finish()
    assert re.search("checkpoint_last.pt: .*damaged", run.log())
    assert (tmp_path / "checkpoint_last.pt.damaged").exists()
    assert re.findall(r"Loaded checkpoint (?:.*/)?(checkpoint\S+) ", run.log()) == [newest]
    same_outcome(run, straight(1))


@pytest.mark.faults(
    "the teacher or stage 1's checkpoint is missing",
    "an error before training names the config's field and the path",
)
def test_a_teacher_that_is_gone_is_an_error_before_training(speech: Path, teacher_file: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone.safetensors"
    for field, overrides in (
        ("task.teacher", [f"task.teacher={gone}", f"model.init_from={teacher_file}"]),
        ("model.init_from", [f"task.teacher={teacher_file}", f"model.init_from={gone}"]),
    ):
        run = Run(tmp_path / field, f"task.data={speech}", *overrides)
        assert run.start().wait() == [1]
        assert f"FileNotFoundError: {field}: {gone}" in run.log()
        assert "begin training epoch" not in run.log()


OUT_OF_MEMORY = """
import os
import fairseq_cli.hydra_train
from skill_fairseq.modules.encoder import SpeechEncoder

tap, calls = SpeechEncoder.tap, []

def tap_or_fail(self, *args, **kwargs):
    if self.gates is not None:  # the student
        calls.append(self.training)
        if FAILS and os.environ.get("RANK", "1") == "1":
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return tap(self, *args, **kwargs)

SpeechEncoder.tap = tap_or_fail
fairseq_cli.hydra_train.cli_main()
"""


def out_of_memory(folder: Path, fails: str) -> tuple[str, ...]:
    """A training program with a failing forward; ``calls``: the student's calls, whether in training."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "program.py").write_text(OUT_OF_MEMORY.replace("FAILS", fails))
    return (sys.executable, "program.py")


@pytest.mark.faults(
    "out of memory",
    "fairseq drops the batch and continues; a hint suggests a value for dataset.max_tokens",
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_out_of_memory_drops_the_batch_with_a_hint(data: list[str], tmp_path: Path, world_size: int) -> None:
    """With two ranks, the other rank's batch makes the update."""
    program = out_of_memory(tmp_path, "sum(calls) == 3")
    run = Run(tmp_path, *data, *TWELVE, program=program, world_size=world_size).finish()
    assert sorted(run.updates()) == list(range(1, 13))
    log = run.log(world_size - 1)
    assert "attempting to recover from OOM" in log
    assert re.search("out of memory: .*dataset.max_tokens.* 40000.* 32000", log)


@pytest.mark.faults(
    "out of memory in validation",
    "fairseq tries the batch again; a hint suggests a value for dataset.max_tokens_valid",
)
def test_out_of_memory_in_validation_has_a_hint_of_its_own(data: list[str], tmp_path: Path) -> None:
    program = out_of_memory(tmp_path, "calls.count(False) == 1 and not self.training")
    run = Run(tmp_path, *data, *TWELVE, "dataset.max_tokens_valid=30000", program=program).finish()
    assert "ran out of memory in validation step, retrying batch" in run.log()
    (hint,) = re.findall("out of memory.*(?:max_tokens|update).*", run.log())
    assert re.search(says("validation", "dataset.max_tokens_valid", 30000, 24000), hint)
    assert sorted(run.updates()) == list(range(1, 13)) and "[valid][INFO]" in run.log()
