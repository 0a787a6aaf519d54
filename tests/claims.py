"""Claims of the pages, with the evidence for each: a test, or the command that prints it.

``python tests/claims.py`` prints the table; ``tests/test_claims.py`` checks that every claim is in its page and
that every test exists. A claim that loses its evidence leaves its page.
"""

from __future__ import annotations

from typing import NamedTuple


class Claim(NamedTuple):
    """One claim.

    Attributes:
        page: path of the page.
        words: the claim as written there, apart from line breaks.
        evidence: "tests/FILE.py::TEST", or a command.
    """

    page: str
    words: str
    evidence: str


README = "README.md"
CLUSTER = "examples/librispeech/README.md"
FORMATS = "examples/formats/README.md"
SPEED = "examples/speed/README.md"
HOOK = "skill_fairseq/hook/README.md"
BENCHMARK = "examples/benchmark/README.md"
CONFIGS = "config/README.md"
PRUNE = "examples/prune_your_own/README.md"
CLAIMS = [
    Claim(
        PRUNE,
        "Your forward, your loss and your loop stay yours; fairseq is not needed",
        "tests/pruning/test_prune_your_own.py::test_it_prunes_by_70_percent_without_fairseq",
    ),
    Claim(
        PRUNE,
        "the outputs agree to float rounding, padded or not, eager or sdpa",
        "tests/pruning/test_huggingface.py::test_the_smaller_model_computes_the_same",
    ),
    Claim(
        PRUNE,
        "makes a `SpeechEncoder` of it that computes the same",
        "tests/pruning/test_huggingface.py::test_gated_and_shrunk_models_go_into_files_of_our_encoder",
    ),
    Claim(
        README,
        "torch and safetensors are enough",
        "tests/test_import.py::test_a_broken_fairseq_is_in_the_way_of_training_alone",
    ),
    Claim(
        HOOK,
        "a patch that fails says so on stderr and breaks no import",
        "tests/hook/test_hook.py::test_a_patch_that_fails_breaks_no_import",
    ),
    Claim(
        HOOK,
        "quotes paths that hydra's grammar cannot read",
        "tests/hook/test_hook.py::test_fairseq_hydra_train_takes_any_path",
    ),
    Claim(
        HOOK,
        "other programs of hydra keep theirs",
        "tests/hook/test_hook.py::test_other_programs_of_hydra_are_as_without_the_hook",
    ),
    Claim(
        HOOK,
        "`pip uninstall skill_fairseq` removes them",
        "tests/hook/test_install.py::test_uninstall_leaves_nothing",
    ),
    Claim(
        CLUSTER,
        "the student has 23,595,303 parameters",
        "skill-shrink, as the page runs it",
    ),
    Claim(
        CLUSTER,
        "11 more than a quarter of 94,381,168",
        "tests/modules/test_size.py::test_full_models",
    ),
    Claim(
        CLUSTER,
        "it continues exactly: in the test, the student equals that of an undisturbed run, bit for bit",
        "tests/training/test_resume.py::test_three_kills_change_nothing",
    ),
    Claim(
        CLUSTER,
        "exits with code 75, on all ranks",
        "tests/training/test_preemption.py::test_signals_to_every_process_lose_no_update",
    ),
    Claim(
        CLUSTER,
        "A run that has not started training yet exits with 75 at once",
        "tests/training/test_preemption.py::test_a_signal_while_a_run_starts_up",
    ),
    Claim(
        CLUSTER,
        "requeues a job whose training exits with 75",
        "bash tests/slurm/run.sh",
    ),
    Claim(
        CLUSTER,
        "Every rank gets as many batches as the others in an epoch, and no utterance twice",
        "tests/training/test_data_parallel.py::test_every_utterance_is_seen_once_an_epoch_and_no_rank_idles",
    ),
    Claim(
        CLUSTER,
        "gradients of one batch with all their frames (to 1e-5 of the largest), whatever their lengths",
        "tests/training/test_data_parallel.py::test_gradients_of_unequal_batches_are_weighed_by_their_frames",
    ),
    Claim(
        CLUSTER,
        "every rank draws the same gates",
        "tests/training/test_data_parallel.py::test_gates_are_those_of_the_update_on_every_rank_and_in_every_batch",
    ),
    Claim(
        CLUSTER,
        "If the epoch's batches have changed, it continues with the next epoch",
        "tests/training/test_epoch_batches.py::test_a_run_goes_on_with_the_next_epoch",
    ),
    Claim(
        CLUSTER,
        "a warning names the changed settings with old and new values",
        "tests/training/test_changed_settings.py::test_a_run_that_goes_on_names_what_has_changed",
    ),
    Claim(
        CLUSTER,
        "the loss depends neither on `dataset.max_tokens_valid` nor on the number of ranks",
        "tests/criterions/test_skill_group_kd.py::test_validation_does_not_depend_on_the_batch_size",
    ),
    Claim(
        CLUSTER,
        "`fully_sharded`, `slowmo` and BMUF are refused",
        "tests/training/test_data_parallel.py::test_backends_that_cannot_train_one_student_are_refused",
    ),
    Claim(
        CLUSTER,
        "cuts to within 0.1 %",
        "tests/pruning/test_shrink.py::test_base_size_within_a_thousandth",
    ),
    Claim(
        FORMATS,
        "Pickles from others are read without running their code, also by fairseq",
        "tests/hook/test_patches.py::test_fairseq_runs_no_code_of_a_checkpoint_unless_it_is_trusted",
    ),
    Claim(
        FORMATS,
        "All hidden states agree with the original's to 1e-5 on import, and to 1e-4 on export",
        "python tests/tables.py",
    ),
    Claim(
        SPEED,
        "outputs and every gradient in float64 to 1e-9",
        "tests/modules/test_fast_path.py::test_same_outputs_and_gradients",
    ),
    Claim(
        SPEED,
        "in float32 outputs and the gradients together to 1e-5",
        "tests/modules/test_fast_path.py::test_in_float32_to_1e_5",
    ),
    Claim(
        SPEED,
        "The kernels that a GPU takes are held against textbook operations on a CPU",
        "tests/modules/test_attention_kernels.py::",
    ),
    Claim(
        SPEED,
        "it is tried on a CPU with small shapes",
        "tests/test_gpu.py::test_the_checks_for_a_gpu_run_on_a_cpu",
    ),
    Claim(
        SPEED,
        "instead of keeping its activations, with the same gradients",
        "tests/modules/test_checkpoint_activations.py::",
    ),
    Claim(
        SPEED,
        "restarts are exact",
        "tests/training/test_half_precision.py::test_kills_change_nothing",
    ),
    Claim(
        SPEED,
        "50 updates stay beside float32",
        "tests/test_mixed_precision.py::test_fifty_updates_stay_beside_float32",
    ),
    Claim(
        README,
        "bash examples/tiny/run.sh",
        "python tests/learned.py examples/tiny/out",
    ),
    Claim(
        SPEED,
        "`--against transformers`: the same audio and loss",
        "skill-bench train --seconds 30 --against transformers",
    ),
    Claim(
        BENCHMARK,
        "normalisation statistics keep running over the original channels, so shrinking changes no output",
        "tests/pruning/test_shrink.py::test_outputs_stay",
    ),
    Claim(
        BENCHMARK,
        "an emptied sublayer keeps its bias",
        "tests/pruning/test_shrink.py::test_removed_and_emptied_sublayers",
    ),
    Claim(
        BENCHMARK,
        "relative position outlives the first layer",
        "tests/pruning/test_shrink.py::test_first_layer_may_lose_its_attention_and_relative_position_stays",
    ),
    Claim(
        BENCHMARK,
        "as means over sparsities 0.5, 0.75 and 0.875 and 3 seeds",
        "tests/comparison/test_results.py::test_means_are_those_of_the_runs",
    ),
    Claim(
        FORMATS,
        "The convolutions' states are those of the whole, in Base models too, where the audio is read twice",
        "tests/exporting/test_streaming.py::test_the_convolutions_of_a_stream_are_those_of_the_whole",
    ),
    Claim(
        FORMATS,
        "with a context as long as the audio, the result is the same as without chunks",
        "tests/exporting/test_streaming.py::test_a_stream_with_all_of_the_audio_as_context_is_the_whole",
    ),
    Claim(
        FORMATS,
        "one layer or all, resumable, as fairseq's k-means scripts read them",
        "tests/cli/test_features.py::test_fairseqs_k_means_takes_them",
    ),
    Claim(
        FORMATS,
        "The audio front end, norms and softmax stay in float",
        "tests/exporting/test_onnx_forms.py::test_int8_of_speech_stays_about_a_hundredth",
    ),
    Claim(
        FORMATS,
        "| int8, `--calibrate` with 120 s | 1.34 | 0.53 % | 0.78 % | 0.95 % | 0.97 % |",
        "skill-export T.safetensors T.onnx --precision int8 --calibrate train.tsv --accuracy test.tsv in examples/tiny",
    ),
    Claim(
        FORMATS,
        "onnxruntime's own quantisers take the fp32 file as it is",
        "tests/exporting/test_graphs.py::test_onnxruntime_quantises_a_graph",
    ),
    Claim(
        CONFIGS,
        "The four values to look at first",
        "tests/test_configs.py::",
    ),
    Claim(
        CONFIGS,
        "Seconds of audio in a batch of one GPU",
        "tests/test_batch_sizes.py::",
    ),
    Claim(
        CONFIGS,
        "tests run two updates of both stages on small random teachers of these kinds",
        "tests/test_recipes_run.py::",
    ),
    Claim(
        CONFIGS,
        "in `distill` and `final` are relative to where the command is typed",
        "tests/training/test_paths.py::test_both_stages_by_relative_paths",
    ),
]


def table() -> str:
    """The claims as Markdown."""
    rows = ["| page | claim | evidence |", "|---|---|---|"]
    return "\n".join([*rows, *(f"| {claim.page} | {claim.words} | `{claim.evidence}` |" for claim in CLAIMS)])


if __name__ == "__main__":
    print(table())
