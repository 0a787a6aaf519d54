"""`skill-export`: from any checkpoint that holds an encoder to the files and folders that other programs read."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from skill_fairseq import __version__
from skill_fairseq.checkpoints.export import DTYPES, save_encoder
from skill_fairseq.checkpoints.load import read_source
from skill_fairseq.checkpoints.own_folders import UPSTREAM
from skill_fairseq.checkpoints.source import EncoderSource, build_encoder
from skill_fairseq.cli import info
from skill_fairseq.cli._common import Parser, run
from skill_fairseq.exporting.folder import check_folder
from skill_fairseq.exporting.huggingface_folder import save_huggingface
from skill_fairseq.exporting.onnx_graph import NEEDED, OPSET, save_onnx
from skill_fairseq.exporting.s3prl_folder import save_s3prl
from skill_fairseq.exporting.torch_program import save_torch_program
from skill_fairseq.exporting.traceable import check_torch
from skill_fairseq.files import check_output, sha256, size_of
from skill_fairseq.messages import printable, require
from skill_fairseq.modules.encoder import SpeechEncoder

SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torch": ".pt2", "huggingface": "", "s3prl": ""}

EPILOG = f"""examples:
  skill-export outputs/final/checkpoint_last.pt student.safetensors
  skill-export student.safetensors student.onnx
  skill-export student.safetensors student.pt2 --padding-mask
  skill-export student.safetensors student_hf --to huggingface
  skill-export student.safetensors student_s3prl --to s3prl

CHECKPOINT is anything that skill_fairseq.load_encoder reads. The encoder alone is written: no teacher, no
optimizer, no prediction head, nothing of the checkpoint that could run code.
OUT's ending says what is written; folders have none and need --to.
skill-info says what a file is.

  safetensors  one file that describes itself; skill_fairseq.load_encoder needs torch and safetensors to read it
  onnx         opset {OPSET}, for onnxruntime; any batch size, any length from 400 samples on; all hidden states
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
"""


@run
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.info is not None:
        return info.main([str(args.info), *["--json"] * args.json, *["--trust"] * args.trust])
    if args.out is None:
        parser.error("CHECKPOINT and OUT are needed")
    _check(args)
    source = read_source(args.checkpoint, args.trust)
    encoder = build_encoder(source, args.checkpoint).eval()
    format = _write(args, encoder, provenance(source, args.checkpoint))
    print(
        f"{args.out}: {format} of {encoder.num_parameters():,} parameters in {args.dtype}, "
        f"{size_of(args.out) / 1e6:.2f} MB, from {source.format}"
    )
    if encoder.config.pruning_units:
        print(f"its gates ({', '.join(encoder.config.pruning_units)}) went along; skill-shrink cuts them out")
    return 0


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
    graph = args.to in ("onnx", "torch")
    if graph and args.dtype != "float32":
        raise ValueError(f"--dtype: {args.dtype}; --to {args.to} writes float32 only: leave --dtype out")
    if args.padding_mask and not graph:
        raise ValueError(f"--padding-mask: --to {args.to} takes padding anyway; leave it out")
    if suffix:
        check_output(args.out, "OUT", [args.checkpoint])
    else:
        check_folder(args.out, "OUT")
    if graph:
        check_torch()
    if args.to == "onnx":
        require("--to onnx", *NEEDED)


def _write(args: argparse.Namespace, encoder: SpeechEncoder, origin: Mapping[str, object]) -> str:
    """Writes OUT; returns what it is, in words."""
    if args.to == "onnx":
        save_onnx(encoder, args.out, origin, args.padding_mask)
        return f"an ONNX graph (opset {OPSET})"
    if args.to == "torch":
        save_torch_program(encoder, args.out, origin, args.padding_mask)
        return "a torch.export program"
    if args.to == "huggingface":
        return f"a Hugging Face folder ({save_huggingface(encoder, args.out, origin, args.dtype)})"
    if args.to == "s3prl":
        save_s3prl(encoder, args.out, origin, args.dtype)
        return f"an s3prl upstream ({UPSTREAM})"
    save_encoder(encoder, args.out, origin, args.dtype)
    return "an encoder"


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
        prog="skill-export", description="Write the encoder of a checkpoint for other programs.", epilog=EPILOG
    )
    add = parser.add_argument
    add("checkpoint", type=Path, nargs="?", metavar="CHECKPOINT", help="file or folder to read")
    add("out", type=Path, nargs="?", metavar="OUT", help="file (.safetensors, .onnx, .pt2) or folder to write")
    add("--to", choices=list(SUFFIXES), help="what to write (default: what OUT's ending says)")
    add("--dtype", choices=list(DTYPES), default="float32", help="of the weights (default: float32)")
    add(
        "--padding-mask",
        action="store_true",
        help="give a graph (onnx, torch) a second input: (batch, samples) bool, true = padding, at each row's end",
    )
    add("--info", type=Path, metavar="FILE", help=argparse.SUPPRESS)  # skill-info, by its older name
    add("--json", action="store_true", help=argparse.SUPPRESS)
    parser.add_trust()
    return parser
