"""`skill-export`: from any checkpoint that holds an encoder to the files and folders that other programs read."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from skill_fairseq import __version__
from skill_fairseq.audio.manifest import Manifest, check_manifest, read_manifest
from skill_fairseq.checkpoints.export import DTYPES, INT8, save_encoder
from skill_fairseq.checkpoints.hub import push
from skill_fairseq.checkpoints.load import load_encoder, read_source
from skill_fairseq.checkpoints.own_folders import UPSTREAM
from skill_fairseq.checkpoints.source import EncoderSource, build_encoder
from skill_fairseq.cli import info
from skill_fairseq.cli._common import Done, Parser, in_range, layer_numbers, run
from skill_fairseq.exporting.accuracy import LIMIT, Accuracy, Speech, rounded, run_encoder, sources
from skill_fairseq.exporting.folder import check_folder
from skill_fairseq.exporting.huggingface_folder import save_huggingface
from skill_fairseq.exporting.onnx_encoder import OnnxEncoder
from skill_fairseq.exporting.onnx_graph import NEEDED, OPSET, describe, make_onnx, output_names
from skill_fairseq.exporting.onnx_precision import PRECISIONS, to_float16, to_int8
from skill_fairseq.exporting.onnx_trained import to_trained_int8
from skill_fairseq.exporting.openvino_model import OpenvinoEncoder, save_openvino
from skill_fairseq.exporting.s3prl_folder import save_s3prl
from skill_fairseq.exporting.torch_program import run_program, save_torch_program
from skill_fairseq.exporting.traceable import check_torch
from skill_fairseq.files import check_output, named, sha256, size_of, write_file, write_json
from skill_fairseq.messages import printable, require
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.probing.evaluate import require_scikit_learn
from skill_fairseq.probing.tasks import read_task
from skill_fairseq.text_tables import aligned

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


@run
def main(argv: Sequence[str] | None = None) -> Done:
    """Run the command; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.info is not None:
        return info.show(args.info, args.trust)
    if args.out is None:
        parser.error("CHECKPOINT and OUT are needed")
    _check(args)
    manifest = None if args.accuracy is None else read_manifest(args.accuracy)
    calibration = None if args.calibrate is None else read_manifest(args.calibrate)
    for option, given in (("--accuracy", manifest), ("--calibrate", calibration)):
        if given is not None:
            with named(option):
                check_manifest(given)
    tasks = [read_task(folder) for folder in args.task]
    require_scikit_learn(tasks)
    source = read_source(args.checkpoint, args.trust)
    encoder = build_encoder(source, args.checkpoint).eval()
    origin = provenance(source, args.checkpoint)
    format, found = _write(args, encoder, origin, Speech(manifest or calibration, tasks, args.max_seconds), calibration)
    parameters, precision, size = encoder.num_parameters(), args.precision or args.dtype, size_of(args.out)
    print(
        f"{args.out}: {format} of {parameters:,} parameters in {precision}, {size / 1e6:.2f} MB, from {source.format}"
    )
    _report(args, found, "the encoder as trained" if encoder.config.quantize == INT8 else "the float32 encoder")
    pushed = push(args.out, args.push, args.private) if args.push else None
    if pushed:
        print(f"pushed: {pushed}")
    gates = encoder.config.pruning_units
    if gates:
        print(f"its gates ({', '.join(gates)}) went along; skill-shrink cuts them out")
    return Done(
        {
            "file": str(args.out),
            "format": format,
            "source": source.format,
            "parameters": parameters,
            "precision": precision,
            "bytes": size,
            "gates": gates,
            "accuracy": found.as_dict() if found else None,
            "pushed": pushed,
        }
    )


def _check(args: argparse.Namespace) -> None:
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
            check_output(_accuracy_file(args), "OUT", inputs)
    else:
        check_folder(args.out, "OUT")
    if graph:
        check_torch()
    if args.to in ONNX_MADE:
        wanted = (args.precision or "fp32") != "fp32" or args.accuracy is not None
        openvino = args.to == "openvino"
        require(f"--to {args.to}", *["openvino"] * openvino, *NEEDED, *["onnxruntime"] * (wanted and not openvino))


def _write(
    args: argparse.Namespace,
    encoder: SpeechEncoder,
    origin: Mapping[str, object],
    speech: Speech,
    calibration: Manifest | None,
) -> tuple[str, Accuracy | None]:
    """Writes OUT; returns what it is, in words, and how near to the float32 encoder."""
    if args.to in ONNX_MADE:
        return _write_onnx(args, encoder, origin, speech, calibration)
    names = output_names(encoder.config.encoder_layers)
    if args.to == "torch":
        save_torch_program(encoder, args.out, origin, args.padding_mask)
        found = None if speech.manifest is None else speech.measure(encoder, names, run_program(args.out))
        return "a torch.export program", found
    if args.to == "safetensors":
        save_encoder(encoder, args.out, origin, args.dtype)
        exported = None if speech.manifest is None else run_encoder(load_encoder(args.out), names)
        return "an encoder", None if exported is None else speech.measure(encoder, names, exported)
    notes, found = "", None
    if speech.manifest is not None:  # before the folder is written: its model card has the numbers
        found = speech.measure(encoder, names, run_encoder(rounded(encoder, DTYPES[args.dtype]), names))
        notes = found.markdown()
    if args.to == "huggingface":
        kind = save_huggingface(encoder, args.out, origin, args.dtype, notes)
        return f"a Hugging Face folder ({kind})", found
    save_s3prl(encoder, args.out, origin, args.dtype, notes)
    return f"an s3prl upstream ({UPSTREAM})", found


def _write_onnx(
    args: argparse.Namespace,
    encoder: SpeechEncoder,
    origin: Mapping[str, object],
    speech: Speech,
    calibration: Manifest | None,
) -> tuple[str, Accuracy | None]:
    config = encoder.config
    trained = config.quantize == INT8
    if trained:
        _check_trained(args)
    layers = _layers(args.layers, config.encoder_layers)
    samples = None if args.seconds is None else round(args.seconds * config.sample_rate)
    model = make_onnx(encoder, args.padding_mask, layers, samples)
    facts: dict[str, object] = {"precision": args.precision or "fp32", "layers": args.layers or "all"}
    openvino = args.to == "openvino"
    if trained:
        model = to_trained_int8(model, encoder)
    elif args.precision == "fp16":
        model = model if openvino else to_float16(model)
    elif calibration is not None:
        heard = sources(calibration, encoder, args.max_seconds, samples)
        model = to_int8(model, (source.numpy() for source in heard))
        facts["calibration"] = {"manifest": calibration.source.name, "max_seconds": args.max_seconds}
    elif args.precision == "int8":
        model = to_int8(model)
    names = output_names(config.encoder_layers, layers)
    describe(model, encoder, origin, **facts)
    found = None
    if openvino:
        save_openvino(model.SerializeToString(), args.out, encoder, origin, facts)
        if speech.manifest is not None:
            found = speech.measure(encoder, names, OpenvinoEncoder(args.out).states, samples)
        return "a model of OpenVINO", found
    if speech.manifest is not None:
        found = speech.measure(encoder, names, OnnxEncoder(model.SerializeToString()).states, samples)
        describe(model, encoder, origin, **facts, accuracy=found.as_dict())
    write_file(args.out, model.SerializeToString())
    return f"an ONNX graph (opset {OPSET})", found


def _check_trained(args: argparse.Namespace) -> None:
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


def _layers(text: str | None, depth: int) -> list[int] | None:
    """From --layers to what :func:`make_onnx` takes.

    Raises:
        ValueError: it is neither all, last nor numbers of layers.
    """
    if text in (None, "all"):
        return None
    if text == "last":
        return []
    return layer_numbers(text, depth, "all, last")


def _report(args: argparse.Namespace, found: Accuracy | None, reference: str) -> None:
    """Prints how near OUT is, writes it beside OUT, and warns above the limit."""
    if found is None:
        return
    itself = "the calibration's own " if args.accuracy is None else ""
    print(f"beside {reference}, on {itself}{found.about()}:")
    for rows in filter(None, [found.rows(), found.probe_rows()]):
        print(aligned(rows))
    write_json(_accuracy_file(args), found.as_dict())
    name, worst = found.worst()
    if worst > args.limit:
        sys.stdout.flush()
        print(
            f"warning: {name} differs by {100 * worst:.2f} %, more than --limit {100 * args.limit:g} %; use fp32, "
            "or int8 without --calibrate",
            file=sys.stderr,
        )


def _accuracy_file(args: argparse.Namespace) -> Path:
    return args.out.with_suffix(".accuracy.json") if SUFFIXES[args.to] else args.out / "accuracy.json"


def provenance(source: EncoderSource, path: Path) -> dict[str, object]:
    """Where an encoder comes from: format, name and hash of its file; an exported file hands its own on."""
    if source.provenance.get("exported_by"):
        return dict(source.provenance)
    return {
        "source": printable(path.resolve().name),
        "source_format": source.format,
        **({"source_sha256": sha256(path)} if path.is_file() else {}),
        **source.provenance,
        "exported_by": f"skill_fairseq {__version__}",
    }


def _parser() -> argparse.ArgumentParser:
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
