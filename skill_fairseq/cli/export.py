"""`skill-export`: from any checkpoint that holds an encoder to the files and folders that other programs read."""

from __future__ import annotations

import argparse
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
from skill_fairseq.cli._common import Done, run
from skill_fairseq.cli._export_options import (
    ONNX_MADE,
    accuracy_file,
    check,
    check_trained,
    chosen_layers,
    make_parser,
)
from skill_fairseq.exporting.accuracy import Accuracy, Speech, rounded, run_encoder, sources
from skill_fairseq.exporting.huggingface_folder import save_huggingface
from skill_fairseq.exporting.onnx_encoder import OnnxEncoder
from skill_fairseq.exporting.onnx_graph import OPSET, describe, make_onnx, output_names
from skill_fairseq.exporting.onnx_precision import to_float16, to_int8
from skill_fairseq.exporting.onnx_trained import to_trained_int8
from skill_fairseq.exporting.openvino_model import OpenvinoEncoder, save_openvino
from skill_fairseq.exporting.s3prl_folder import save_s3prl
from skill_fairseq.exporting.torch_program import run_program, save_torch_program
from skill_fairseq.files import named, sha256, size_of, write_file, write_json
from skill_fairseq.messages import printable
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.probing.evaluate import require_scikit_learn
from skill_fairseq.probing.tasks import read_task
from skill_fairseq.text_tables import aligned

_parser = make_parser  # the name in every command


@run
def main(argv: Sequence[str] | None = None) -> Done:
    """Run the command; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.info is not None:
        return info.show(args.info, args.trust)
    if args.out is None:
        parser.error("CHECKPOINT and OUT are needed")
    check(args)
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
        check_trained(args)
    layers = chosen_layers(args.layers, config.encoder_layers)
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


def _report(args: argparse.Namespace, found: Accuracy | None, reference: str) -> None:
    """Prints how near OUT is, writes it beside OUT, and warns above the limit."""
    if found is None:
        return
    itself = "the calibration's own " if args.accuracy is None else ""
    print(f"beside {reference}, on {itself}{found.about()}:")
    for rows in filter(None, [found.rows(), found.probe_rows()]):
        print(aligned(rows))
    write_json(accuracy_file(args), found.as_dict())
    name, worst = found.worst()
    if worst > args.limit:
        sys.stdout.flush()
        print(
            f"warning: {name} differs by {100 * worst:.2f} %, more than --limit {100 * args.limit:g} %; use fp32, "
            "or int8 without --calibrate",
            file=sys.stderr,
        )


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
