"""Several sizes of one elastic checkpoint: the options of ``skill-shrink`` for them, and which sizes they mean."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, List, Optional

from skill_fairseq.checkpoints.source import EncoderSource
from skill_fairseq.cli._common import in_range
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.pruning.costs import Cost, saved_cost
from skill_fairseq.pruning.elastic import read_sizes
from skill_fairseq.pruning.nested import range_of
from skill_fairseq.pruning.selection import check_reachable

STEP = 0.05
"""From size to size of ``--all``."""


def add_sizes(parser: argparse.ArgumentParser, group: Any) -> None:
    """Adds ``--size`` and ``--all`` to options that exclude each other, and ``--beyond`` beside them."""
    group.add_argument(
        "--size",
        action="append",
        type=in_range(float, above=0, below=1),
        metavar="F",
        help="fraction left, of a checkpoint trained with criterion.elastic; may be given several times",
    )
    group.add_argument(
        "--all", action="store_true", help="all sizes from the smallest to the largest trained, in steps of 0.05"
    )
    parser.add_argument(
        "--beyond", action="store_true", help="leave to cut sizes outside of those trained, with a warning"
    )


def asked_sizes(
    args: argparse.Namespace, source: EncoderSource, gated: SpeechEncoder, cost: Cost
) -> Optional[List[float]]:
    """The sizes that are to be cut, shares of ``cost``: those of the options, else of an elastic checkpoint the
    largest; None where the options, or another checkpoint, say something else.

    Raises:
        ValueError: a size was not trained, or none was.
    """
    elastic, wanted = source.provenance.get("elastic"), bool(args.size or args.all)
    if args.beyond and not args.size:
        raise ValueError("--beyond: does nothing without --size; leave it out")
    if elastic is None and wanted:
        raise ValueError(
            f"{args.checkpoint}: {'--size' if args.size else '--all'} needs a checkpoint that was trained with "
            "criterion.elastic, for several sizes; give --sparsity for this one"
        )
    if elastic is None or args.by_rounding or args.sparsity is not None:
        return None
    trained = read_sizes(elastic, f"{args.checkpoint}: elastic")
    low, high = range_of(gated, (trained.smallest, trained.largest), saved_cost(source.provenance), cost)
    if args.all:
        steps = (round(STEP * step, 4) for step in range(1, round(1 / STEP)))
        return [high, *sorted((step for step in steps if low + 1e-9 < step < high - 1e-9), reverse=True), low]
    if not args.size:
        return [high]
    for size in args.size:
        if low - 5e-4 <= size <= high + 5e-4:
            continue
        said = f"--size: {size} is outside of the {low:.4g} to {high:.4g} of {cost} that were trained"
        if not args.beyond:
            raise ValueError(f"{said}; choose a size in between, or give --beyond")
        check_reachable(gated.config, 1 - size, f"--size {size}, a sparsity of {1 - size:.4g}", cost)
        print(f"warning: {said}: expect it to be worse than one that was", file=sys.stderr)
    return list(dict.fromkeys(args.size))


def names_of(out: Optional[Path], sizes: Sequence[float]) -> List[Any]:
    """A file for each size: OUT itself for one, else with the size before its ending."""
    if out is None or len(sizes) < 2:
        return [out] * max(len(sizes), 1)
    return [out.with_name(f"{out.stem}-{size:.4g}{out.suffix}") for size in sizes]
