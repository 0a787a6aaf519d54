"""Private names of libraries that this package relies on, and why.

Start here when one of these libraries changes: ``tests/test_private_names.py`` looks up each name in every tested
environment (Python 3.10 with torch 1.12.1; 3.11, 3.12 and 3.13 with torch 2.13; fairseq 0.12.2, hydra-core 1.0.7 and
omegaconf 2.0.6 throughout), and checks that the source uses no other private name of theirs.

This file imports nothing, and the names stay where they are used: the start-up hook and ``checkpoints/unpickling.py``
run without the package.
"""

from __future__ import annotations

PRIVATE_NAMES: dict[str, tuple[str, str]] = {
    "dataclasses._get_field": (
        "hook/_skill_fairseq_hook.py",
        "the one place that sees a default before Python >= 3.11 refuses it",
    ),
    "hydra._internal.utils.print_exception": (
        "hook/_skill_fairseq_hook.py",
        "hydra 1.0 calls it with a keyword that Python >= 3.10 does not have",
    ),
    "pickle._Unpickler": (
        "checkpoints/unpickling.py",
        "the unpickler written in Python, whose steps can be checked one by one; the one in C only has find_class",
    ),
    "omegaconf.dictconfig.DictConfig._get_parent": (
        "tasks/skill_distillation.py",
        "fairseq passes a task its own block, but reads and saves the whole config",
    ),
    "torch.utils.data.dataloader._MultiProcessingDataLoaderIter._workers": (
        "training/loading.py",
        "the worker processes, to end them with a signal other than SIGTERM",
    ),
    "multiprocessing.process.BaseProcess._popen": (
        "training/loading.py",
        "ends a worker, in terminate() and at exit",
    ),
    "multiprocessing.popen_fork.Popen._send_signal": ("training/loading.py", "ends a worker with a chosen signal"),
    "multiprocessing.process.ORIGINAL_DIR": (
        "training/paths.py",
        "where a rank's parent was started: hydra has since changed the folder without telling its children",
    ),
    "torch.nn.Module._register_load_state_dict_pre_hook": (
        "training/half_precision.py",
        "sees float32 weights before a half-precision model rounds them; the public name is newer than torch 1.12",
    ),
    "torch.nn.Module._apply": ("modules/fp32.py", "half() and to() call it: gates and sizes stay float32"),
    "torch.nn.Module._load_from_state_dict": ("modules/encoder.py", "old files' gates become a bank"),
    "torch.nn.modules.module.Module._load_from_state_dict": (
        "modules/fake_quantize.py",
        "a loaded range is known, which was asked of the one before",
    ),
    "torch._make_per_channel_quantized_tensor": (
        "modules/low_precision.py",
        "a weight in given int8 steps; the public function would round again",
    ),
    "torch.nn.Module._parameters": ("pruning/huggingface.py", "the plain weight, where the attribute returns it gated"),
    "torch.nn.Module._replicate_for_data_parallel": (
        "modules/prepared.py",
        "a replica must not keep weights prepared on another device",
    ),
    "torch.Tensor._version": ("modules/prepared.py", "whether a weight changed in place since it was prepared"),
    "torch.ops.aten._softmax_backward_data": (
        "modules/attention_core.py",
        "the gradient of softmax from its output, without the input",
    ),
    **{
        f"torch.nn.Module.{name}": ("modules/kernels.py", "whether a layer has hooks")
        for name in ("_forward_hooks", "_forward_pre_hooks")
    },
    **{
        f"torch.ops.mkldnn.{name}": ("modules/kernels.py", "oneDNN with weights packed once; torch >= 2.0 has it")
        for name in (
            "_linear_pointwise",
            "_reorder_linear_weight",
            "_convolution_pointwise",
            "_reorder_convolution_weight",
        )
    },
    "fairseq.trainer.Trainer._build_optimizer": ("training/trainer.py", "float32 weights from before the cast"),
    "fairseq.trainer.Trainer._optimizer": ("training/trainer.py", "the same; the property would build it again"),
    "fairseq.trainer.Trainer._set_seed": ("training/trainer.py", "also seeds numpy, at each update"),
    "fairseq.trainer.Trainer._dummy_batch": ("training/trainer.py", "must not be an unreadable batch"),
    "fairseq.trainer.Trainer._prepare_sample": ("training/trainer.py", "the same"),
    "fairseq.trainer.Trainer._aggregate_logging_outputs": (
        "training/trainer.py",
        "the sum over ranks, which carries what all ranks must act on together",
    ),
    "fairseq.trainer.Trainer._reduce_and_log_stats": ("training/trainer.py", "fetches all numbers at once"),
    "fairseq.trainer.Trainer._log_oom": ("training/trainer.py", "says which field to lower"),
    "fairseq.optim.fp16_optimizer._FP16OptimizerMixin._multiply_factor": (
        "training/trainer.py",
        "in bf16 zero_grad() keeps the gradient of a skipped update",
    ),
    **{
        f"fairseq.optim.dynamic_loss_scaler.DynamicLossScaler.{name}": (
            "training/half_precision.py",
            "fairseq saves the loss scale, but not the updates until its next rise",
        )
        for name in ("_iter", "_last_overflow_iter", "_last_rescale_iter", "_overflows_since_rescale")
    },
    "transformers.PreTrainedModel._init_weights": ("exporting/modeling_skill.py", "the encoder initialises itself"),
}
"""Full name -> file of this package that uses it, and the reason."""
