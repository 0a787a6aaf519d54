"""fairseq's manifest dataset, with checked audio and new batches in every epoch."""

import logging
import os
import random
from itertools import groupby
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from fairseq.data import FileAudioDataset
from fairseq.data.audio.raw_audio_dataset import RawAudioDataset
from fairseq.distributed import utils as distributed_utils
from torch import Tensor

from skill_fairseq.audio.batching import split_batches
from skill_fairseq.audio.manifest import Manifest, check_manifest, load_audio, read_manifest
from skill_fairseq.labels.targets import Label, Target, pad_labels
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.taps import SpanMasking
from skill_fairseq.objectives.masking import draw_masks

logger = logging.getLogger(__name__)

SAMPLE = 1000  # files checked at the start: if one in 300 is missing, this finds it with a probability of 96 %


def check_once(manifest: Manifest, everything: bool = False) -> None:
    """Checks that the files of a manifest exist, on the first rank only; a missing file ends every rank.

    Args:
        manifest: the manifest.
        everything: check all files instead of ``SAMPLE`` random ones.

    Raises:
        FileNotFoundError: files are missing.
    """
    chosen: Optional[Sequence[int]] = None
    if not everything and len(manifest) > SAMPLE:
        chosen = sorted(random.Random(len(manifest)).sample(range(len(manifest)), SAMPLE))
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    found: Optional[str] = None
    if not several or torch.distributed.get_rank() == 0:
        try:
            check_manifest(manifest, chosen)
        except FileNotFoundError as error:
            found = str(error)
    if several:
        found = distributed_utils.broadcast_object(found, src_rank=0, group=distributed_utils.get_global_group())
    if found is not None:
        raise FileNotFoundError(found)


class SpeechDataset(FileAudioDataset):
    """fairseq's manifest dataset, with checked audio and new batches in every epoch.

    A relative root in the manifest is relative to the manifest's folder. Training batches (``shuffle=True``) are
    cropped to their shortest utterance, or with ``pad=True`` padded to their longest. Validation batches hold
    utterances of one length: padding changes the features of Base models, so the loss would depend on the batch size.

    Args:
        manifest_path: fairseq manifest.
        crop_multiple: crop training batches to a multiple of this many samples.
        check_all_files: check that every file of the manifest exists, not only a sample.
        num_buckets: crop (or pad) batches to one of this many lengths, which split the utterances into equal parts;
            0: any length. Utterances of one bucket share batches.
        most_samples: use only the first samples of a recording, up to this many; None: all.
        targets: labels beside the manifest.
        kwargs: arguments of :class:`RawAudioDataset`.

    Raises:
        FileNotFoundError, ValueError: the manifest or files in it are missing, or no utterance is long enough.
    """

    def __init__(
        self,
        manifest_path: str,
        crop_multiple: int = 1,
        check_all_files: bool = False,
        num_buckets: int = 0,
        most_samples: Optional[int] = None,
        targets: Sequence[Target] = (),
        **kwargs: Any,
    ) -> None:
        RawAudioDataset.__init__(self, **kwargs)  # FileAudioDataset's would read the manifest again
        manifest = read_manifest(manifest_path)
        check_once(manifest, check_all_files)
        sizes = np.array(manifest.sizes, dtype=np.int64)
        kept = np.flatnonzero(sizes >= (self.min_sample_size or 0))
        if not len(kept):
            raise ValueError(
                f"{manifest_path}: no utterance has task.min_sample_size={self.min_sample_size} samples; the longest "
                f"has {sizes.max()}. Lower task.min_sample_size"
            )
        self.sizes = sizes[kept]
        self.fnames = [manifest.paths[i] for i in kept]
        self.skipped_indices = set(range(len(sizes))).difference(kept.tolist())
        logger.info(f"{manifest_path}: {len(kept)} utterances, {len(sizes) - len(kept)} more are too short")
        self.root_dir = str(manifest.root)
        self.most_samples = most_samples
        self.targets = {target: self._labels(target, target.read(manifest), kept) for target in targets}
        if most_samples is not None:
            self._shorten(most_samples)
        self.set_bucket_info(num_buckets)
        self.crop_multiple = crop_multiple
        self.seed = 0
        self.epoch = 1
        self.num_shards = 1  # ranks that share the batches, set by the task
        self.num_batches = 0  # for training, in this epoch
        self.heard = np.zeros(0, dtype=np.int64)  # samples of each of their utterances
        self.mean_frames: Optional[float] = None  # of these batches, set by the task
        self.masking: Tuple[Sequence[SpanMasking], Optional[EncoderConfig]] = (), None  # set by the task

    def _labels(self, target: Target, found: List[Label], kept: np.ndarray) -> List[Label]:
        """Labels of the kept utterances; a truncated utterance has no units."""
        labels = [found[i] for i in kept]
        if target.is_sequence:
            most = self.max_sample_size if self.most_samples is None else min(self.most_samples, self.max_sample_size)
            longer = [i for i, size in enumerate(self.sizes) if size > most and labels[i] is not None]
            for i in longer:
                labels[i] = None
            if longer:
                logger.warning(
                    f"task.targets.{target.name}: {len(longer)} of {len(labels)} utterances are longer than the {most} "
                    f"samples in use, such as {self.file_name(longer[0])}; they count as unlabelled"
                )
        if not any(label is not None for label in labels):
            logger.warning(f"task.targets.{target.name}: none of {len(labels)} utterances has a label")
        return labels

    def _shorten(self, most: int) -> None:
        """Truncates lengths, and logs whose."""
        sizes = np.asarray(self.sizes)
        longer = np.flatnonzero(sizes > most)
        if len(longer):
            first = ", ".join(f"{self.file_name(i)} ({sizes[i] / self.sample_rate:.0f} s)" for i in longer[:3])
            logger.warning(
                f"{len(longer)} recordings are longer than {most / self.sample_rate:g} s, and their rest is not "
                f"used: {first}{', ...' if len(longer) > 3 else ''}; raise task.max_valid_sample_size={most} to use "
                "more (the time of attention grows with the square of the length)"
            )
        self.sizes = np.minimum(sizes, most)

    def file_name(self, index: int) -> str:
        """Absolute path of an utterance."""
        return os.path.join(self.root_dir, self.fnames[index])

    def __getitem__(self, index: int) -> Dict[str, Any]:
        """One utterance: ``id``, ``file``, and ``source`` (N,) samples; None, and a message ``unreadable``, if the
        file cannot be read."""
        file = self.file_name(index)
        try:
            wave = load_audio(file, self.sample_rate)[: self.most_samples]
        except (OSError, ValueError) as error:
            return {"id": index, "file": file, "source": None, "unreadable": str(error)}
        return {"id": index, "file": file, "source": self.postprocess(wave, self.sample_rate)}

    def collater(self, samples: Any) -> Dict[str, Any]:
        """Like fairseq's, but batches of equal lengths have no padding mask, and crops have few lengths.

        ``source_bits`` is a copy of the source (B, N), float32 viewed as int32: fairseq casts every float32 tensor of a
        batch to the student's precision, which would change the teacher's input. ``files`` are the utterances' paths.
        The start of a crop depends only on seed, epoch and utterance, so a resumed run uses the same audio. The same
        holds for the masked frames; ``masked`` has a (B, T) bool tensor for each masking. ``targets`` holds the labels
        by name, see :func:`pad_labels`.
        ``unreadable`` has messages on unreadable files; if all files are, the batch has no other field.
        """
        unreadable = [s["unreadable"] for s in samples if "unreadable" in s]
        samples = [s for s in samples if s["source"] is not None]
        if not self.pad and samples:
            length = self.crop_length([len(s["source"]) for s in samples])
            samples = [{**s, "source": self._crop(s["source"], length, s["id"])} for s in samples]
        elif self.shuffle:
            most = self.max_sample_size
            samples = [{**s, "source": self._crop(s["source"], min(len(s["source"]), most), s["id"])} for s in samples]
        batch = super().collater(samples)
        if batch:
            if self.pad and not batch["net_input"]["padding_mask"].any():
                batch["net_input"]["padding_mask"] = None
            batch["source_bits"] = batch["net_input"]["source"].view(torch.int32)
            batch["files"] = [s["file"] for s in samples]
            if self.targets:
                batch["targets"] = {
                    target.name: pad_labels([labels[s["id"]] for s in samples], target.is_sequence)
                    for target, labels in self.targets.items()
                }
            maskings, config = self.masking
            if maskings and self.shuffle:
                assert config is not None
                heard, seeds = batch["net_input"], [(self.seed, self.epoch, s["id"]) for s in samples]
                length, padding = heard["source"].size(1), heard.get("padding_mask")
                batch["masked"] = draw_masks(maskings, config, length, padding, seeds)
        if unreadable:
            batch["unreadable"] = unreadable
        return batch

    def crop_length(self, sizes: Sequence[int]) -> int:
        """The length, in samples, to which a training batch of these utterance lengths is cropped."""
        shortest = min(min(sizes), self.max_sample_size)
        if self._buckets is not None:
            shortest = int(self._to_bucket(np.array([shortest]))[0])
        return max(shortest - shortest % self.crop_multiple, min(shortest, self.crop_multiple))

    def _crop(self, wave: Tensor, length: int, index: int) -> Tensor:
        start = np.random.default_rng([self.seed, self.epoch, index]).integers(len(wave) - length + 1)
        return wave[start : start + length]

    def set_bucket_info(self, num_buckets: int) -> None:
        """Chooses the lengths of batches; fairseq's version needs padding and an older numpy.

        Cropping rounds down to a length, padding up.
        """
        self._buckets: Optional[np.ndarray] = None
        self.num_buckets = 0  # fairseq's collater would pad to them
        if num_buckets:
            lengths = np.minimum(self.sizes, self.max_sample_size)
            ranks = np.linspace(0, len(lengths) - 1, num_buckets + 1).astype(int)
            self._buckets = np.unique(np.sort(lengths)[ranks[1:] if self.pad else ranks[:-1]])
            if self.pad:
                self.num_buckets, self._bucketed_sizes = len(self._buckets), self._to_bucket(lengths)
            logger.info(f"task.num_batch_buckets: batches have one of the lengths {self._buckets.tolist()}")

    def _to_bucket(self, lengths: np.ndarray) -> np.ndarray:
        """Lengths in batches, see :meth:`set_bucket_info`; those beyond all buckets do not change."""
        if self._buckets is None:
            return lengths
        if self.pad:
            found = np.searchsorted(self._buckets, lengths)
            return np.where(found < len(self._buckets), self._buckets[found.clip(max=len(self._buckets) - 1)], lengths)
        found = np.searchsorted(self._buckets, lengths, side="right") - 1
        return np.where(found >= 0, self._buckets[found.clip(min=0)], lengths)

    def size(self, index: int) -> int:
        """Samples of an utterance in a batch."""
        length = min(self.sizes[index], self.max_sample_size)
        return int(length if self._buckets is None else self._to_bucket(np.array([length]))[0])

    @property
    def can_reuse_epoch_itr_across_epochs(self) -> bool:
        """False: every epoch makes new batches."""
        return False

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch's batches."""
        super().set_epoch(epoch)
        self.epoch = epoch

    def ordered_indices(self) -> np.ndarray:
        """An order with utterances of similar length together, which depends on fairseq's seed and the epoch."""
        if not self.shuffle:
            return np.arange(len(self))
        # fairseq seeds numpy with the same number in every epoch.
        self.seed = np.random.randint(2**31)
        random = np.random.default_rng([self.seed, self.epoch])
        # How far an utterance may move, relative to its length: with more utterances, neighbours are closer in
        # length, and batches lose less to cropping (at 5 % a LibriSpeech batch holds 6 % less audio than at 0.5 %).
        reach = min(0.05, max(0.005, 50 / len(self)))
        sizes = np.minimum(self.sizes, self.max_sample_size)
        noise = random.uniform(1 - reach, 1 + reach, len(self))
        if self._buckets is not None:
            return np.lexsort((noise, -self._to_bucket(sizes)))
        return np.argsort(-(sizes * noise), kind="stable")

    def batch_by_size(self, indices: np.ndarray, max_tokens: Optional[int] = None, **limits: Any) -> Any:
        """Like fairseq's, which stops at an utterance above ``max_tokens``; validation lets whole ones pass.

        Every rank gets equally many training batches: fairseq would fill up with empty batches, on which ranks idle.
        Validation batches hold utterances of one length.

        Raises:
            ValueError: ``max_tokens`` is below every utterance, or there are too few for the number of ranks.
        """
        if not len(indices):
            shortest = min(self.size(index) for index in range(len(self)))
            raise ValueError(
                f"dataset.max_tokens: {max_tokens}; the shortest of {len(self)} utterances has {shortest} samples in a "
                "batch, so no batch can hold one. Raise it, or lower task.max_sample_size"
            )
        if not self.shuffle:
            batches: List[Any] = []
            for length, same in groupby(sorted(indices, key=self.num_tokens), self.num_tokens):
                most = None if max_tokens is None else max(max_tokens, int(length))
                batches += super().batch_by_size(np.array(list(same)), most, **limits)
            return batches
        batches = super().batch_by_size(indices, max_tokens, **limits)
        batches = split_batches([[int(i) for i in batch] for batch in batches], self.num_shards)
        lengths = np.minimum(self.sizes, self.max_sample_size)
        heard = [lengths[b] if self.pad else np.full(len(b), self.crop_length(lengths[b].tolist())) for b in batches]
        self.num_batches, self.heard, self.mean_frames = len(batches), np.concatenate(heard), None
        return batches
