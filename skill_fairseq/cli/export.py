"""`skill-export`: from any checkpoint that holds an encoder to one self-describing safetensors file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from skill_fairseq import __version__
from skill_fairseq.checkpoints.export import DTYPES, save_encoder
from skill_fairseq.checkpoints.load import read_source
from skill_fairseq.checkpoints.source import EncoderSource, build_encoder
from skill_fairseq.cli._common import run
from skill_fairseq.files import sha256
from skill_fairseq.modules.config import format_conv_layers
from skill_fairseq.modules.encoder import SpeechEncoder

EPILOG = """examples:
  skill-export outputs/final/checkpoint_last.pt student.safetensors
  skill-export WavLM-Base+.pt teacher.safetensors --dtype float16
  skill-export --info student.safetensors

CHECKPOINT is anything that skill_fairseq.load_encoder reads: Microsoft's WavLM files, Hugging Face folders of
WavLM, HuBERT and wav2vec 2.0, fairseq checkpoints of HuBERT, wav2vec 2.0 and of this package's models, and
exported files. The encoder alone is written: no teacher, no optimizer, no prediction head, nothing that could
run code. Gates go along where there are any; skill-shrink cuts out what they have closed.
"""


@run
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.info is not None:
        if args.checkpoint is not None:
            parser.error("--info FILE takes no other file")
        source = read_source(args.info, args.trust)
        print("\n".join(describe(source, build_encoder(source, args.info))))
        return 0
    if args.out is None:
        parser.error("CHECKPOINT and OUT are needed, or --info FILE")
    if args.out.suffix != ".safetensors":
        raise ValueError(f"OUT: {args.out}; expected a name that ends in .safetensors")
    source = read_source(args.checkpoint, args.trust)
    encoder = build_encoder(source, args.checkpoint)
    save_encoder(encoder, args.out, provenance(source, args.checkpoint), args.dtype)
    print(
        f"{args.out}: {encoder.num_parameters():,} parameters in {args.dtype}, "
        f"{args.out.stat().st_size / 1e6:.2f} MB, from {source.format}"
    )
    if encoder.config.pruning_units:
        print(f"its gates ({', '.join(encoder.config.pruning_units)}) went along; skill-shrink cuts them out")
    return 0


def provenance(source: EncoderSource, path: Path) -> dict[str, object]:
    """Where an encoder comes from: format, name and hash of its file; an exported file hands its own on."""
    if source.provenance.get("exported_by"):
        return dict(source.provenance)
    return {
        "source": path.resolve().name,
        "source_format": source.format,
        **({"source_sha256": sha256(path)} if path.is_file() else {}),
        **source.provenance,
        "exported_by": f"skill_fairseq {__version__}",
    }


def describe(source: EncoderSource, encoder: SpeechEncoder) -> Iterator[str]:
    """Lines on format, shape, parameters and provenance."""
    config = encoder.config
    assert config.conv_channels is not None and config.heads is not None and config.ffn_dims is not None
    types = sorted({str(tensor.dtype).replace("torch.", "") for tensor in source.state.values()})
    yield f"format        {source.format}, stored as {', '.join(types)}"
    original = config.original_parameters
    pruned_from = f" of {original:,} before pruning" if original else ""
    yield f"parameters    {encoder.num_parameters():,}{pruned_from}"
    yield f"MACs          {encoder.macs(1.0):,} for a second of audio"
    yield f"convolutions  {format_conv_layers(config.conv_feature_layers)} originally"
    yield f"channels      {' '.join(map(str, config.conv_channels))}"
    yield (
        f"layers        {config.encoder_layers} of width {config.encoder_embed_dim}, originally with "
        f"{config.encoder_attention_heads} heads and {config.encoder_ffn_embed_dim} FFN units"
    )
    yield f"heads         {' '.join('-' if h is None else str(len(h)) for h in config.heads)}"
    yield f"FFN units     {' '.join('-' if f is None else str(f) for f in config.ffn_dims)}"
    yield f"LayerNorm     {'before' if config.layer_norm_first else 'after'} each sublayer"
    yield f"extractor     {config.extractor_mode}"
    yield f"positions     {'relative and ' if config.relative_position else ''}convolutional"
    yield f"waveforms     {config.sample_rate} Hz, {'normalised' if config.normalize else 'as they are'}"
    yield f"gates         {', '.join(config.pruning_units) or 'none'}"
    yield f"provenance    {json.dumps(dict(source.provenance))}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="skill-export",
        description="Write the encoder of a checkpoint as one self-describing safetensors file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", type=Path, nargs="?", metavar="CHECKPOINT", help="file or folder to read")
    add("out", type=Path, nargs="?", metavar="OUT", help="file to write, ending in .safetensors")
    add("--dtype", choices=list(DTYPES), default="float32", help="of the weights (default: float32)")
    add("--info", type=Path, metavar="FILE", help="print what is in a file, write nothing")
    add(
        "--trust",
        action="store_true",
        help="read checkpoints with unknown pickled classes, which runs code of whoever made them",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
