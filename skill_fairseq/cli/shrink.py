"""`skill-shrink`: cuts what the gates of a stage-1 checkpoint have closed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Dict, Optional

from skill_fairseq import __version__
from skill_fairseq.checkpoints.export import save_encoder
from skill_fairseq.checkpoints.load import read_source
from skill_fairseq.checkpoints.source import EncoderSource, build_encoder
from skill_fairseq.cli._common import Done, Parser, in_range, run
from skill_fairseq.cli._sizes import add_sizes, asked_sizes, names_of
from skill_fairseq.files import check_output, sha256
from skill_fairseq.messages import printable
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.size import widths_of
from skill_fairseq.pruning.costs import COSTS, PARAMETERS, Cost, make_cost, saved_cost
from skill_fairseq.pruning.expected import expected_sparsity
from skill_fairseq.pruning.nested import cut_sizes
from skill_fairseq.pruning.reach import far_from_gates
from skill_fairseq.pruning.selection import check_reachable
from skill_fairseq.pruning.shrink import kept_tables, shrink
from skill_fairseq.pruning.targets import Target, saved_targets
from skill_fairseq.text_tables import aligned

SECONDS = 10.0
Sizes = Dict[str, Optional[float]]
EPILOG = """sparsity: the share of the teacher's parameters that goes, or of its MACs, see --cost. By default it is the
target that stage 1 trained for, of several targets all of them: units are first kept as each gate rounds, then opened
or closed one by one, the least certain first, until the size is right (with several, no cost above its target).
--by-rounding leaves that correction out: the student computes exactly what the gated one computes in evaluation, and
its size misses the target a little.

--size says what is left of a checkpoint that was trained with criterion.elastic, of stage 1 or 2, and may be given
several times; --all cuts every 5 % from the smallest to the largest that was trained. Sizes of one call are nested: the
units of a smaller student are among those of a larger one. Of several sizes OUT becomes OUT-0.15.safetensors and so on.

examples:
  skill-shrink outputs/distill/checkpoint_last.pt shrunk.safetensors
  skill-shrink outputs/distill/checkpoint_last.pt --table-only --sparsity 0.8
  skill-shrink outputs/distill/checkpoint_last.pt shrunk.safetensors --by-rounding
  skill-shrink outputs/final/checkpoint_last.pt student.safetensors --size 0.3 --size 0.15

The gates of one run serve for sparsities near the one it was trained for, 0.73 to 0.77 after 0.75 for example. Farther
off, units are chosen by gates that were trained for another size, and a warning says so.

For the sparsity that it was trained for, stage 2 needs no file of this command: model.init_from=<stage-1 checkpoint>
shrinks by itself, to the same size. For another one: model.init_from=OUT criterion.init_from=<stage-1 checkpoint>,
which has the projections.
"""

PRINTS = {
    "source": "format of the checkpoint",
    "gates": "kinds of units with gates",
    "students": "for each: path (null with --table-only); sparsity asked, expected and actual by each cost; parameters "
    "and multiply-accumulates for 10 s, before and after",
}


@run
def main(argv: Sequence[str] | None = None) -> Done:
    """Run the command; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.out is None and not args.table_only:
        parser.error("OUT is needed, or --table-only")
    if args.out is not None and args.out.suffix != ".safetensors":
        raise ValueError(f"OUT: {args.out}; expected a name that ends in .safetensors")
    if args.out is not None and not args.table_only:
        for out in names_of(args.out, args.size or ()):
            check_output(out, "OUT", [args.checkpoint])
    source = read_source(args.checkpoint, args.trust)
    if not source.config.pruning_units:
        raise ValueError(
            f"{args.checkpoint}: recognised as {source.format}, but it has no gates: it is a teacher or already "
            "shrunk; give a stage-1 checkpoint, trained with model.pruning_units"
        )
    saved = saved_targets(source.provenance)
    cost = saved[0].cost if saved else saved_cost(source.provenance)
    if args.cost not in (None, cost.name) or args.seconds is not None:
        cost = make_cost(args.cost or cost.name, cost_seconds=args.seconds)
    gated = build_encoder(source, args.checkpoint).eval()
    sizes = asked_sizes(args, source, gated, cost)
    if sizes:
        cut = zip(sizes, cut_sizes(gated, sizes, cost), names_of(args.out, sizes))
        students = [
            _finish(args, source, gated, each, {cost: sparsities(gated, each, 1 - size, cost)}, out)
            for size, each, out in cut
        ]
    else:
        targets = () if args.by_rounding else _targets(args, source, cost, saved)
        field = "--sparsity" if args.sparsity is not None else f"{args.checkpoint}: target_sparsity"
        warning = far_from_gates(gated, targets, field)
        if warning is not None:
            print(f"warning: {warning}", file=sys.stderr)
        small = shrink(gated, targets or None)
        costs = [each.cost for each in targets] or [cost]
        asked = dict(targets)
        found = {each: sparsities(gated, small, asked.get(each), each) for each in costs}
        students = [_finish(args, source, gated, small, found, args.out)]
    return Done({"source": source.format, "gates": gated.config.pruning_units, "students": students})


def _finish(
    args: argparse.Namespace,
    source: EncoderSource,
    gated: SpeechEncoder,
    small: SpeechEncoder,
    found: dict[Cost, Sizes],
    out: Optional[Path],
) -> dict[str, Any]:
    """Prints the tables and writes the file, unless only tables are wanted; returns what --json says of it."""
    print(f"{args.checkpoint}: {source.format}, gates on {', '.join(gated.config.pruning_units)}\n")
    print(describe(gated, small, found))
    if out is not None and not args.table_only:
        save_encoder(small, out, provenance(source, args.checkpoint, found))
        print(f"\nwrote {out}, {out.stat().st_size / 1e6:.2f} MB")
    return {
        "file": None if out is None or args.table_only else str(out),
        "sparsity": {cost.name: sizes for cost, sizes in found.items()},
        **{name: {"before": before, "after": after} for name, before, after in costs_of(gated, small)},
    }


def costs_of(gated: SpeechEncoder, small: SpeechEncoder) -> list[tuple[str, int, int]]:
    """Names of costs, each before and after."""
    return [
        ("parameters", int(PARAMETERS(gated.config, widths_of(gated.config))), small.num_parameters()),
        ("macs", gated.macs(SECONDS), small.macs(SECONDS)),
    ]


def sparsities(gated: SpeechEncoder, small: SpeechEncoder, asked: float | None, cost: Cost = PARAMETERS) -> Sizes:
    """Fraction of the original cost that is gone: as asked for (None: by rounding), as the gates expect, and as it
    has become."""
    return {
        "asked": asked,
        "expected": expected_sparsity(gated, cost=cost),
        "actual": float(cost.sparsity(small.config, widths_of(small.config))),
    }


def provenance(source: EncoderSource, path: Path, sizes: dict[Cost, Sizes]) -> dict[str, Any]:
    """Where a shrunk encoder comes from: its file's name and hash, what that says of itself, and sparsities: of several
    costs each by its name."""
    first, *others = sizes
    shown: Any = sizes[first]
    if others:
        shown = {what: {cost.name: found[what] for cost, found in sizes.items()} for what in sizes[first]}
    kept = dict(source.provenance)
    if list(sizes) != [target.cost for target in saved_targets(kept)] and first != saved_cost(kept):
        kept.pop("target", None)
        kept.update(first.settings())
    return {
        **kept,
        "source": printable(path.resolve().name),
        "source_format": source.format,
        "source_sha256": sha256(path),
        "sparsity": shown,
        "exported_by": f"skill_fairseq {__version__}",
    }


def describe(gated: SpeechEncoder, small: SpeechEncoder, sizes: dict[Cost, Sizes]) -> str:
    """The tables: units kept a layer, costs before and after, sparsity."""
    costs = [["", "before", "after", "left"]]
    for name, before, after in costs_of(gated, small):
        name = f"MACs, {SECONDS:g} s of audio" if name == "macs" else name
        costs.append([name, f"{before:,}", f"{after:,}", f"{after / before:.2%}"])

    tables = [*kept_tables(small.config).values(), costs]
    for cost, found in sizes.items():
        rows = [[f"  {name}", "by rounding" if value is None else f"{value:.4f}"] for name, value in found.items()]
        tables.append([[f"sparsity of {cost.original(gated.config):,} {cost}", ""], *rows])
    return "\n\n".join(aligned(table) for table in tables)


def _targets(
    args: argparse.Namespace, source: EncoderSource, cost: Cost, saved: Sequence[Target]
) -> tuple[Target, ...]:
    """What to shrink to: the option's sparsity, or what the checkpoint was trained for."""
    if args.sparsity is not None:
        found, field = [Target(cost, args.sparsity)], "--sparsity"
    else:
        found, field = list(saved), f"{args.checkpoint}: target_sparsity"
        if not saved or cost != saved[0].cost:
            raise ValueError(
                f"{args.checkpoint}: was trained without criterion.target_sparsity of {cost}; say how much is to go, "
                "--sparsity 0.75 for example, or give --by-rounding"
            )
    for target in found:
        check_reachable(source.config, target.sparsity, field, target.cost)
    return tuple(found)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="skill-shrink",
        description="Cut what the gates of a stage-1 checkpoint have closed: a smaller student with the same outputs.",
        epilog=EPILOG,
        prints=PRINTS,
    )
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="STAGE1", help="checkpoint of stage 1, or an export with gates")
    add("out", type=Path, nargs="?", metavar="OUT", help="file to write, .safetensors")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--sparsity",
        type=in_range(float, least=0, below=1),
        metavar="S",
        help="fraction to remove, from 0 to below 1 (default: stage 1's target)",
    )
    add_sizes(parser, size)
    size.add_argument("--by-rounding", action="store_true", help="exactly the units whose gates round to 1")
    add("--cost", choices=COSTS, help="cost that the sparsity is of (default: as in stage 1)")
    length = in_range(float, least=0.1, most=86_400)
    add(
        "--seconds",
        type=length,
        metavar="S",
        help="length of the utterance that MACs are for, seconds (default: as in stage 1, or 10)",
    )
    add("--table-only", action="store_true", help="the table alone, no file")
    parser.add_trust()
    return parser
