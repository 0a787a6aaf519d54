"""CTC units (letters or SentencePiece pieces) and their fairseq dictionaries."""

from __future__ import annotations

import dataclasses
import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from skill_fairseq.audio.manifest import MIN_SAMPLES
from skill_fairseq.files import PathLike, write_file
from skill_fairseq.reading import read_text

FRAME_SAMPLES = 320  # samples per frame of the usual conv stack
MODEL = "spm.model"


@dataclasses.dataclass
class Units:
    """A kind of units and all of its symbols.

    Attributes:
        labels: suffix of the label files, fairseq's `task.labels`: "ltr" or "spm".
        symbols: all units, in the dictionary's order.
        model: a SentencePiece model's bytes; None for letters.
    """

    labels: str
    symbols: list[str]
    model: bytes | None = None

    def __post_init__(self) -> None:
        self._processor: Any = None
        if self.model is not None:
            from sentencepiece import SentencePieceProcessor

            self._processor = SentencePieceProcessor(model_proto=self.model)

    def __call__(self, text: str) -> list[str]:
        """The units of a text, including word boundaries."""
        if self._processor is None:
            return [*text.replace(" ", "|"), "|"]
        return self._processor.encode(text, out_type=str)


def letters(texts: Iterable[str]) -> Units:
    """The letters of these texts and "|", which ends a word; most frequent first."""
    counts = Counter(letter for text in texts for letter in (*text.replace(" ", "|"), "|"))
    return Units("ltr", sorted(counts, key=lambda letter: (-counts[letter], letter)))


def sentence_pieces(texts: Sequence[str], kind: str, size: int) -> Units:
    """Pieces that the sentencepiece library learns from these texts, without normalising them.

    Args:
        texts: normalised texts.
        kind: "unigram" or "bpe".
        size: number of pieces.

    Raises:
        ValueError: the texts yield fewer pieces, or have more characters than `size`.
    """
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type=kind,
            vocab_size=size + 1,  # plus <unk>, which fairseq's dictionary adds itself
            bos_id=-1,
            eos_id=-1,
            character_coverage=1.0,
            normalization_rule_name="identity",
            max_sentence_length=1 << 30,  # longer ones would be skipped
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"--vocabulary-size: {size} does not suit these {len(texts)} texts, {_limit(str(error))}"
        ) from error
    processor = SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    return Units("spm", [piece for i, piece in enumerate(pieces) if i != processor.unk_id()], model.getvalue())


def _limit(said: str) -> str:
    """The limit on the size from sentencepiece's message, whose numbers include <unk>."""
    for pattern, limit in ((r"<= (\d+)", "at most"), (r"required_chars\. \d+ vs (\d+)", "at least")):
        number = re.search(pattern, said)
        if number:
            return f"expected {limit} {int(number[1]) - 1} for them"
    return f"sentencepiece says: {said}"


def read_units(folder: PathLike) -> Units:
    """The units that :func:`write_units` wrote.

    Raises:
        FileNotFoundError: the folder has no dictionary, or no SentencePiece model beside it.
        ValueError: it has both.
    """
    found = [path for path in (Path(folder) / "dict.ltr.txt", Path(folder) / "dict.spm.txt") if path.is_file()]
    if not found:
        raise FileNotFoundError(f"{folder}: no dict.ltr.txt or dict.spm.txt; expected a folder that skill-labels wrote")
    if len(found) > 1:
        raise ValueError(f"{folder}: has dict.ltr.txt and dict.spm.txt, expected one of them; use separate folders")
    labels = found[0].name.split(".")[1]
    if labels == "spm" and not (Path(folder) / MODEL).is_file():
        raise FileNotFoundError(f"{folder}: has {found[0].name} but no {MODEL}; copy both from the same folder")
    model = (Path(folder) / MODEL).read_bytes() if labels == "spm" else None
    return Units(labels, read_symbols(found[0]), model)


def read_symbols(path: Path) -> list[str]:
    """The symbols of a fairseq dictionary, which has one symbol and its count per line.

    Raises:
        FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such dictionary; write it with skill-labels")
    return [line.rpartition(" ")[0] for line in read_text(path).split("\n") if line]


def write_units(folder: PathLike, units: Units, counts: Counter[str]) -> None:
    """Writes fairseq's `dict.<labels>.txt`, one symbol and its count per line, and a SentencePiece model."""
    if units.model is not None:
        write_file(Path(folder) / MODEL, units.model)
    write_lines(Path(folder) / f"dict.{units.labels}.txt", [f"{symbol} {counts[symbol]}" for symbol in units.symbols])


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes a text file atomically."""
    write_file(path, "".join(f"{line}\n" for line in lines))


def too_short(sizes: Sequence[int], units: Sequence[Sequence[str]], time_reduction: int = 1) -> list[int]:
    """Indices of recordings with fewer frames than CTC needs: one per unit, and a blank between equal neighbours.

    Args:
        sizes: numbers of samples.
        units: units of each recording.
        time_reduction: frames that the encoder merges into one.
    """
    frames = [((size - MIN_SAMPLES) // FRAME_SAMPLES + 1) // time_reduction for size in sizes]
    needed = [len(row) + sum(one == other for one, other in zip(row, row[1:])) for row in units]
    return [i for i, (have, need) in enumerate(zip(frames, needed)) if have < need]
