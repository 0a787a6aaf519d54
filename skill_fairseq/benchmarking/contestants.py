"""The two sides of a comparison: this package, and Hugging Face's WavLM or HuBERT in both roles."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from typing import Any, Callable, ContextManager, Dict, List

import torch
from torch import Tensor, nn

from skill_fairseq.benchmarking.setup import PRECISIONS, Setup, equal_groups, student_of
from skill_fairseq.messages import remedy_for, require
from skill_fairseq.modules import kernels
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.low_precision import lower
from skill_fairseq.modules.taps import collect
from skill_fairseq.objectives.group_means import GroupMeans, GroupMeansConfig
from skill_fairseq.objectives.teacher import FrozenTeacher
from skill_fairseq.pruning.expected import expected_parameters, expected_widths
from skill_fairseq.pruning.lagrangian import SizeConstraint

Times = Dict[str, float]
Step = Callable[[], Times]


class Stopwatch:
    """Seconds per phase; synchronises the GPU if there is one."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.times: Times = {}
        self._last = self._now()

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def lap(self, phase: str) -> None:
        """Ends a phase."""
        now = self._now()
        self.times[phase] = now - self._last
        self._last = now


def ours(setup: Setup, what: str) -> tuple[Step, Dict[str, Any]]:
    """This package's encoder.

    Returns:
        a step to measure, and the size of its model: parameters and MACs.
    """
    full = setup.full_encoder()
    audio = setup.audio()
    if what == "infer":
        encoder = _measured_encoder(setup, full)
        facts = _facts(setup, encoder)
        on_cpu = not setup.device.startswith("cuda")
        if setup.precision == "int8" or setup.precision == "bf16" and on_cpu:
            encoder = lower(encoder, setup.precision).prepare("plain" if setup.compile else None)
            facts["precision"] = setup.precision
        else:
            encoder = encoder.to(PRECISIONS[setup.precision]).prepare("plain" if setup.compile else None)
        if setup.compile:
            for layer in encoder.transformer.layers:
                layer.compile(dynamic=True)
        step = _inference(setup, encoder)
        step()
        facts["kernels"] = kernels.chosen() or {"plain": 1}
        return step, facts

    student = student_of(setup, full).train()
    facts = {
        "parameters": student.num_parameters(),
        "expected parameters": round(float(torch.as_tensor(expected_parameters(student)).detach())),
        "macs": student.macs(setup.seconds) * setup.batch,
    }
    teacher = FrozenTeacher(full, setup.teacher_dtype, setup.compile)
    objective = _objective(teacher.config)
    constraint = SizeConstraint(setup.sparsity, 0).to(setup.device) if setup.stage == 1 else None

    def size_term() -> Tensor | float:
        if constraint is None:
            return 0.0
        return constraint(constraint.cost.sparsity(student.config, expected_widths(student)), 0)

    drawn: List[Any] = []

    def targets() -> List[Tensor]:
        drawn[:] = [student.draw_gates()]  # before the teacher is launched, as the criterion does
        return teacher.tap(audio, None, objective.teacher_taps)

    step = _training(
        setup,
        objective,
        targets=targets,
        means=lambda: student.tap(audio, None, objective.student_taps, drawn[0])[0],
        size_term=size_term,
        modules=[student] if constraint is None else [student, constraint],
    )
    return step, facts


def transformers(setup: Setup, what: str) -> tuple[Step, Dict[str, Any]]:
    """Hugging Face's implementation: the full encoder, and in training also an ungated student of the same shape.

    Raises:
        ValueError: transformers is not installed, or has no such encoder.
    """
    config = setup.full_encoder().config
    if config.pos_conv_depth != 1 or not (config.is_full() and config.feature_layer_norm and config.feature_linear):
        raise ValueError("--against transformers: only for unpruned WavLM, HuBERT and wav2vec 2.0 encoders")
    audio = setup.audio()
    encoder = huggingface_encoder(config).to(setup.device)
    facts: Dict[str, Any] = {"parameters": sum(p.numel() for p in encoder.parameters())}
    if what == "infer":
        facts["precision"] = setup.precision if setup.precision in PRECISIONS else "fp32"
        setup = dataclasses.replace(setup, precision=facts["precision"])
        encoder = encoder.eval().to(PRECISIONS[setup.precision])
        return _inference(setup, lambda source: encoder(source, output_hidden_states=True)), facts

    teacher = encoder.eval().requires_grad_(False).to(PRECISIONS[setup.teacher_dtype])
    student = huggingface_encoder(config, hidden_dropout=0.1, attention_dropout=0.1).to(setup.device).train()
    objective = _objective(config)

    def means(model: Any, source: Tensor) -> List[Tensor]:
        states = model(source, output_hidden_states=True).hidden_states
        return collect(objective.student_taps, ((state, None) for state in states))

    def targets() -> List[Tensor]:
        with torch.no_grad():
            return [mean.float() for mean in means(teacher, audio.to(teacher.dtype))]

    step = _training(
        setup,
        objective,
        targets=targets,
        means=lambda: means(student, audio),
        size_term=lambda: 0.0,
        modules=[student],
    )
    return step, facts


def full(setup: Setup, what: str) -> tuple[Step, Dict[str, Any]]:
    """This package's encoder before pruning."""
    return ours(dataclasses.replace(setup, sparsity=0.0, keep_conv=None), what)


def onnxruntime(setup: Setup, what: str) -> tuple[Step, Dict[str, Any]]:
    """The same encoder as ``skill-export --to onnx`` writes it, in onnxruntime; for bf16 it runs fp32."""
    require("--against onnxruntime", "onnx", "onnxscript", "onnxruntime")
    from skill_fairseq.exporting.onnx_encoder import OnnxEncoder

    precision = "fp32" if setup.precision == "bf16" else setup.precision
    encoder, model = _onnx(setup, precision)
    session = OnnxEncoder(model, setup.threads or torch.get_num_threads())
    return _numpy_inference(setup, session), {**_facts(setup, encoder), "precision": precision}


def openvino(setup: Setup, what: str) -> tuple[Step, Dict[str, Any]]:
    """The same encoder as ``skill-export --to openvino`` writes it, in OpenVINO."""
    require("--against openvino", "openvino", "onnx", "onnxscript")
    from skill_fairseq.exporting.openvino_model import OpenvinoEncoder, convert

    encoder, model = _onnx(setup, "int8" if setup.precision == "int8" else "fp32")
    computes = setup.precision if setup.precision in PRECISIONS else "fp32"
    compiled = OpenvinoEncoder(convert(model), setup.threads or torch.get_num_threads(), computes)
    return _numpy_inference(setup, compiled), {**_facts(setup, encoder), "precision": setup.precision}


def products(setup: Setup, what: str) -> tuple[Step, Dict[str, Any]]:
    """A large matrix product with every available kernel; the fastest gives this machine's rate."""
    inputs, outputs, frames, rounds = 1024, 1024, 1024, 3
    precision = setup.precision if setup.precision in PRECISIONS else "fp32"
    dtype = PRECISIONS[precision]
    x = torch.randn(frames, inputs, device=setup.device, dtype=dtype)
    weight = torch.randn(1, inputs, outputs, device=setup.device, dtype=dtype)
    product = kernels.Product(weight, None)
    linear = nn.Linear(inputs, outputs, bias=False)
    by_int8 = lower(linear, "int8") if setup.precision == "int8" else None

    def step() -> Times:
        with torch.inference_mode():
            if by_int8 is not None:
                found = []
                for _ in range(rounds):
                    watch = Stopwatch(setup.device)
                    by_int8(x)
                    watch.lap("product")
                    found.append(watch.times["product"])
                return {"product": min(found)}
            if setup.device.startswith("cuda"):
                watch = Stopwatch(setup.device)
                torch.matmul(x, weight[0])
                watch.lap("product")
                return watch.times
            return {"product": min(product.seconds(x, time.perf_counter).values())}

    step()
    return step, {"macs": frames * inputs * outputs, "parameters": 0}


def _measured_encoder(setup: Setup, full: SpeechEncoder) -> SpeechEncoder:
    return student_of(dataclasses.replace(setup, stage=2), full) if setup.sparsity else full


def _facts(setup: Setup, encoder: SpeechEncoder) -> Dict[str, Any]:
    return {"parameters": encoder.num_parameters(), "macs": encoder.macs(setup.seconds) * setup.batch}


def _onnx(setup: Setup, precision: str) -> tuple[SpeechEncoder, bytes]:
    from skill_fairseq.exporting.onnx_graph import describe, make_onnx
    from skill_fairseq.exporting.onnx_precision import to_float16, to_int8

    encoder = _measured_encoder(setup, setup.full_encoder()).cpu().eval()
    model = make_onnx(encoder)
    if precision == "fp16":
        model = to_float16(model)
    elif precision == "int8":
        model = to_int8(model)
    describe(model, encoder, {})
    return encoder, model.SerializeToString()


def _numpy_inference(setup: Setup, encode: Callable[[Any], Any]) -> Step:
    audio = setup.audio().cpu().numpy()

    def step() -> Times:
        watch = Stopwatch("cpu")
        encode(audio)
        watch.lap("forward")
        return watch.times

    return step


def _inference(setup: Setup, encode: Callable[[Tensor], Any]) -> Step:
    lowered = setup.precision == "int8" or setup.precision == "bf16" and isinstance(encode, SpeechEncoder)
    audio = setup.audio().to(torch.float32 if lowered else PRECISIONS[setup.precision])

    def step() -> Times:
        watch = Stopwatch(setup.device)
        with torch.inference_mode():
            encode(audio)
        watch.lap("forward")
        return watch.times

    return step


def _objective(config: EncoderConfig) -> GroupMeans:
    groups = equal_groups(config.encoder_layers)
    return GroupMeans(GroupMeansConfig(groups=groups, normalize_states=False), config, [config])


def _training(
    setup: Setup,
    objective: GroupMeans,
    targets: Callable[[], List[Tensor]],
    means: Callable[[], List[Tensor]],
    size_term: Callable[[], Tensor | float],
    modules: List[nn.Module],
) -> Step:
    """The training step of both sides: same loss, projections and optimizer. It learns nothing (rate 0)."""
    objective = objective.to(setup.device)
    parameters = [p for module in [*modules, objective] for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)

    def step() -> Times:
        optimizer.zero_grad(set_to_none=True)
        watch = Stopwatch(setup.device)
        teacher = targets()
        watch.lap("teacher")
        with _autocast(setup):
            loss = objective(means(), teacher)[0] + size_term()
        watch.lap("student forward, loss")
        loss.backward()
        watch.lap("backward")
        optimizer.step()
        watch.lap("optimizer")
        return watch.times

    return step


CONTESTANTS: Dict[str, Callable[[Setup, str], tuple[Step, Dict[str, Any]]]] = {
    "skill_fairseq": ours,
    "transformers": transformers,
    "full": full,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "products": products,
}


def huggingface_encoder(config: EncoderConfig, **dropouts: float) -> Any:
    """Hugging Face's encoder of the same original shape, with random weights and no masking or layerdrop.

    Raises:
        ValueError: transformers is missing, or has no such encoder.
    """
    if config.mel_bins:
        raise ValueError(
            "--against transformers: its encoders read waveforms, this one reads log-mel features (mel_bins="
            f"{config.mel_bins}); compare with onnxruntime, or use an encoder with mel_bins=0"
        )
    # PyPI's torchaudio cannot be imported beside a CPU torch, and transformers tries.
    with contextlib.suppress(ImportError, OSError):
        import torchaudio  # noqa: F401
    if "torchaudio" not in sys.modules:
        sys.modules["torchaudio"] = None  # type: ignore[assignment]
    try:
        from transformers import HubertConfig, HubertModel, WavLMConfig, WavLMModel
    except ImportError as error:
        raise ValueError(f"--against transformers: {error}; run {remedy_for('transformers')}") from error
    make: Any = WavLMConfig if config.relative_position else HubertConfig
    model: Any = WavLMModel if config.relative_position else HubertModel
    channels, kernels, strides = zip(*config.conv_feature_layers)
    settings = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0}
    return model(
        make(
            hidden_size=config.encoder_embed_dim,
            num_hidden_layers=config.encoder_layers,
            num_attention_heads=config.encoder_attention_heads,
            intermediate_size=config.encoder_ffn_embed_dim,
            conv_dim=channels,
            conv_kernel=kernels,
            conv_stride=strides,
            conv_bias=config.conv_bias,
            feat_extract_norm="layer" if config.extractor_mode == "layer_norm" else "group",
            do_stable_layer_norm=config.layer_norm_first,
            num_conv_pos_embeddings=config.conv_pos,
            num_conv_pos_embedding_groups=config.conv_pos_groups,
            apply_spec_augment=False,
            layerdrop=0.0,
            hidden_act=config.activation_fn,
            **{**settings, **dropouts},
        )
    )


def _autocast(setup: Setup) -> ContextManager[Any]:
    if setup.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(setup.device).type, PRECISIONS[setup.precision])
