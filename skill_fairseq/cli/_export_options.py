"""Options of `skill-export`, and which of them go together."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from skill_fairseq.checkpoints.export import DTYPES, INT8
from skill_fairseq.checkpoints.own_folders import UPSTREAM
from skill_fairseq.cli._common import Parser, in_range, layer_numbers
from skill_fairseq.exporting.accuracy import LIMIT
from skill_fairseq.exporting.folder import check_folder
from skill_fairseq.exporting.onnx_graph import NEEDED, OPSET
from skill_fairseq.exporting.onnx_precision import PRECISIONS
from skill_fairseq.exporting.traceable import check_torch
from skill_fairseq.files import check_output
from skill_fairseq.messages import require

SUFFIXES = {
    "safetensors": ".safetensors",
    "onnx": ".onnx",
    "openvino": ".xml",
    "torch": ".pt2",
    "huggingface": "",
    "s3prl": "",
}
ONNX_MADE = ("onnx", "openvino")

ONNX_ALONE = ("precision", "layers", "seconds", "calibrate")

EPILOG = f"""examples:
  skill-export outputs/final/checkpoint_last.pt student.safetensors
  skill-export student.safetensors student.onnx --accuracy manifests/test.tsv
  skill-export student.safetensors small.onnx --precision int8 --calibrate manifests/train.tsv --task tasks/digit
  skill-export student.safetensors layer9.onnx --layers 9 --seconds 10 --precision fp16
  skill-export student.safetensors student.xml --precision int8
  skill-export student.safetensors student.pt2 --padding-mask
  skill-export student.safetensors student_hf --to huggingface
  skill-export student.safetensors student_hf --to huggingface --push me/student --private
  skill-export student.safetensors student_s3prl --to s3prl

CHECKPOINT is anything that skill_fairseq.load_encoder reads. Only the encoder is written: no teacher, no
optimizer, no prediction head, nothing of the checkpoint that could run code.
OUT's ending says what is written; folders have none and need --to.
skill-info says what a file is.

  safetensors  one file that describes itself; skill_fairseq.load_encoder needs torch and safetensors to read it
  onnx         opset {OPSET}, for onnxruntime; any batch size, any length from 400 samples on; all hidden states
  openvino     OUT.xml with OUT.bin, by OpenVINO's converter from that graph; with all of its choices
  torch        a torch.export program (torch.export.load); any batch size, any length from 720 samples on
  huggingface  a folder for transformers.AutoModel.from_pretrained(OUT, trust_remote_code=True), with feature
               extractor and model card; a stock WavLM, HuBERT, wav2vec 2.0 or data2vec-audio folder, which needs
               no trust_remote_code, where nothing was pruned
  s3prl        a folder with an upstream: python OUT/run_downstream.py -u {UPSTREAM} ..., all other options of
               s3prl's run_downstream.py

Where the encoder's "normalize" is on, the wave must be brought to zero mean and unit variance first (huggingface:
the folder's feature extractor does so; s3prl: the upstream does). Frames come every 20 ms, and each depends on the
whole utterance: these encoders are not causal. Gates go along to safetensors, huggingface and s3prl; skill-shrink
cuts out what they have closed.

A student that was trained with model.quantize=int8 becomes an int8 graph with the scales of its training, without
--calibrate; --dtype int8 stores it as safetensors at a byte a weight.

--precision of an onnx file: fp16 is for GPUs and accelerators (openvino: of the weights in the
file). int8 computes the linear layers in 8 bits; audio front
end, norms and softmax stay in float. With --calibrate the ranges of activations are fixed from that speech
(QuantizeLinear and DequantizeLinear nodes); without, each utterance has its own, which is nearer to fp32.

--accuracy (or --calibrate) measures OUT beside the float32 encoder: relative L1 and cosine of every state, printed,
in OUT's model card where it has one, and in OUT.accuracy.json (accuracy.json in a folder). Of a folder and of
safetensors, what rounding the weights does is measured.
"""

PRINTS = {
    "file": "path of the file or folder written",
    "format": "what it is",
    "source": "format of the checkpoint",
    "parameters": "number of parameters",
    "precision": "of weights and products",
    "bytes": "size of all files",
    "gates": "kinds of units whose gates went along",
    "accuracy": "distances to the float32 encoder, or null",
    "pushed": "address on the hub, or null",
}


def make_parser() -> Parser:
    """The command's parser."""
    parser = Parser(
        prog="skill-export",
        description="Write the encoder of a checkpoint for other programs.",
        epilog=EPILOG,
        prints=PRINTS,
    )
    add = parser.add_argument
    add("checkpoint", type=Path, nargs="?", metavar="CHECKPOINT", help="file or folder to read")
    add("out", type=Path, nargs="?", metavar="OUT", help="file (.safetensors, .onnx, .xml, .pt2) or folder to write")
    add("--to", choices=list(SUFFIXES), help="format to write (default: by OUT's ending)")
    add("--dtype", choices=[*DTYPES, INT8], default="float32", help="number type of the weights (default: float32)")
    add(
        "--padding-mask",
        action="store_true",
        help="second input of a graph (onnx, torch): (batch, samples) bool, true = padding, at each row's end",
    )
    onnx = parser.add_argument_group("only for onnx and openvino")
    onnx.add_argument("--precision", choices=PRECISIONS, help="precision of weights and products (default: fp32)")
    onnx.add_argument(
        "--calibrate", type=Path, metavar="MANIFEST", help="int8: speech that the ranges of activations are from"
    )
    onnx.add_argument("--layers", metavar="L", help="numbers of layers as in 9,12, or all, or last (default: all)")
    length = in_range(float, least=0.025, most=3600)
    onnx.add_argument(
        "--seconds", type=length, metavar="S", help="fixed length of the only utterance, seconds (default: any)"
    )
    group = parser.add_argument_group("accuracy")
    group.add_argument("--accuracy", type=Path, metavar="MANIFEST", help="speech to measure OUT on, beside float32")
    group.add_argument(
        "--task",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="folder of a task to probe both in; may be given several times",
    )
    seconds = in_range(float, above=0, most=10**6)
    group.add_argument(
        "--max-seconds",
        type=seconds,
        default=120.0,
        metavar="S",
        help="most audio of a manifest, seconds (default: 120)",
    )
    limit = in_range(float, above=0, most=10)
    group.add_argument(
        "--limit",
        type=limit,
        default=LIMIT,
        metavar="F",
        help="relative L1 distance that is warned of, as a fraction (default: %(default)s)",
    )
    hub = parser.add_argument_group("only for huggingface")
    hub.add_argument(
        "--push", metavar="USER/REPO", help="repository of the Hugging Face hub that gets OUT; needs a token"
    )
    hub.add_argument("--private", action="store_true", help="a private repository, where the push makes one")
    add("--info", type=Path, metavar="FILE", help=argparse.SUPPRESS)  # skill-info, by its older name
    parser.add_trust()
    return parser


def check(args: argparse.Namespace) -> None:
    """Finds out what is to be written, and refuses what does not go together."""
    if args.to is None:
        args.to = next((to for to, suffix in SUFFIXES.items() if suffix and suffix == args.out.suffix), None)
    if args.to is None:
        endings = ", ".join(filter(None, SUFFIXES.values()))
        folders = " or ".join(f"--to {to}" for to, suffix in SUFFIXES.items() if not suffix)
        raise ValueError(f"OUT: {args.out}; expected a name that ends in {endings}, or {folders} for a folder")
    suffix = SUFFIXES[args.to]
    if suffix and args.out.suffix != suffix:
        raise ValueError(f"OUT: {args.out}; expected a name that ends in {suffix} with --to {args.to}")
    if not suffix and args.out.suffix in SUFFIXES.values() and args.out.suffix:
        raise ValueError(f"OUT: {args.out}; --to {args.to} makes a folder: give a name without {args.out.suffix}")
    for name in ONNX_ALONE:
        if getattr(args, name) is not None and args.to not in ONNX_MADE:
            raise ValueError(f"--{name}: --to {args.to} has no such choice; leave it out, or write an onnx file")
    if args.calibrate is not None and args.precision != "int8":
        raise ValueError(f"--calibrate: {args.calibrate}; expected beside --precision int8")
    if args.task and args.accuracy is None and args.calibrate is None:
        raise ValueError("--task: needs --accuracy MANIFEST beside it; add it")
    if args.push is not None and args.to != "huggingface":
        raise ValueError(f"--push: {args.push}; expected beside --to huggingface")
    if args.push is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.push):
        raise ValueError(f"--push: {args.push!r}; expected user/repo")
    if args.private and args.push is None:
        raise ValueError("--private: expected beside --push user/repo")
    graph = args.to in (*ONNX_MADE, "torch")
    if graph and args.dtype != "float32":
        remedy = "use --precision" if args.to in ONNX_MADE else "leave --dtype out"
        raise ValueError(f"--dtype: {args.dtype}; --to {args.to} takes no --dtype, its weights are float32: {remedy}")
    if args.dtype == INT8 and args.to != "safetensors":
        raise ValueError(f"--dtype: int8; expected with --to safetensors, not {args.to}: use another, or leave it out")
    if args.padding_mask and not graph:
        raise ValueError(f"--padding-mask: --to {args.to} takes padding anyway; leave it out")
    if suffix:
        inputs = [path for path in (args.checkpoint, args.accuracy, args.calibrate) if path is not None]
        check_output(args.out, "OUT", inputs)
        if args.to == "openvino":
            check_output(args.out.with_suffix(".bin"), "OUT", inputs)
        if args.accuracy is not None or args.calibrate is not None:
            check_output(accuracy_file(args), "OUT", inputs)
    else:
        check_folder(args.out, "OUT")
    if graph:
        check_torch()
    if args.to in ONNX_MADE:
        wanted = (args.precision or "fp32") != "fp32" or args.accuracy is not None
        openvino = args.to == "openvino"
        require(f"--to {args.to}", *["openvino"] * openvino, *NEEDED, *["onnxruntime"] * (wanted and not openvino))


def check_trained(args: argparse.Namespace) -> None:
    """Sets the precision of an encoder that was trained in int8, and refuses what does not go with that.

    Raises:
        ValueError: names the option.
    """
    if args.precision not in (None, INT8):
        raise ValueError(
            f"--precision: {args.precision}; {args.checkpoint} was trained in int8 (model.quantize): leave it out"
        )
    if args.calibrate is not None:
        raise ValueError(
            f"--calibrate: {args.calibrate}; {args.checkpoint} was trained in int8 and has its ranges from there: "
            "leave it out; --accuracy MANIFEST measures the file"
        )
    args.precision = INT8


def chosen_layers(text: str | None, depth: int) -> list[int] | None:
    """From --layers to what :func:`make_onnx` takes.

    Raises:
        ValueError: it is neither all, last nor numbers of layers.
    """
    if text in (None, "all"):
        return None
    if text == "last":
        return []
    return layer_numbers(text, depth, "all, last")


def accuracy_file(args: argparse.Namespace) -> Path:
    """Where the accuracy is written: beside a file, inside a folder."""
    return args.out.with_suffix(".accuracy.json") if SUFFIXES[args.to] else args.out / "accuracy.json"
