# SPDX-License-Identifier: Apache-2.0
"""The images of a pool, extracted and compared: with each other, with a bank, or with both."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from anomalib_musc.compat.progress import profile, progress_bar
from anomalib_musc.distances import Processes, Shares, gathered, together
from anomalib_musc.distances.storage import GIB, budget_in_bytes
from anomalib_musc.functional.peaks import Peaks, find_peaks
from anomalib_musc.memory_bank.bank import ReferenceBank
from anomalib_musc.pool.checks import FEW_IMAGES, MIN_IMAGES, check_size, few_images, unreadable
from anomalib_musc.pool.extraction import extract
from anomalib_musc.pool.feature_store import FeatureStore
from anomalib_musc.pool.large_images import slow_search
from anomalib_musc.pool.processes import interleaved, move_images
from anomalib_musc.pool.reader import PoolReader
from anomalib_musc.pool.warnings import median_features
from anomalib_musc.torch_model import MuScModel


class ScoredImages(NamedTuple):
    """The images of a pool, in their order.

    Attributes:
        names: One name an image.
        patch_scores: Shape ``(N, h, w)``.
        class_tokens: Shape ``(N, D)``.
        median_features: Median patch features, shape ``(N, C)``.
        peaks: The highest-scoring patches, where a second interval gives a defect of many images one.
    """

    names: list[str]
    patch_scores: torch.Tensor
    class_tokens: torch.Tensor
    median_features: torch.Tensor
    peaks: Peaks | None = None


@dataclass(frozen=True)
class _Share:
    """What this process has found of the images that it has read, one entry an image."""

    names: list[str] = field(default_factory=list)
    class_tokens: list[torch.Tensor] = field(default_factory=list)
    median_features: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def joined(cls, shares: Sequence["_Share"]) -> "_Share":
        """Return what all processes have found, in the order of the images."""
        names = interleaved([share.names for share in shares])
        tokens = interleaved([share.class_tokens for share in shares])
        return cls(names, tokens, interleaved([share.median_features for share in shares]))


class ImageScorer:
    """Extracts and scores the images that a reader gives, those of other processes with them.

    Args:
        trainer: The trainer, whose device, precision, progress bar and profiler are used.
        model: The model.
        mode: "mutual", "reference" or "both", see :class:`~anomalib_musc.MuSc`.
        memory_budget: GiB for features and scoring on the host and on the device each.
        processes: Those that read the other images; ``None`` for this one alone.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: MuScModel,
        mode: str,
        memory_budget: float | None,
        processes: Processes | None,
    ) -> None:
        self.trainer = trainer
        self.model = model
        self.mode = mode
        self.processes = processes
        self.device = model.bank.class_tokens.device  # not the trainer's, which has moved the model away at its end
        self._memory_budget = memory_budget
        if processes is not None and memory_budget is None:  # each of those on this machine takes its part
            host = budget_in_bytes(None, torch.device("cpu")) / trainer.num_devices
            self._memory_budget = min(host, budget_in_bytes(None, self.device)) / GIB

    @property
    def num_references(self) -> int:
        """How many images of a bank these are compared with."""
        return len(self.model.bank) if self.mode != "mutual" else 0

    def by_bank(self, reader: PoolReader, num_images: int | None) -> ScoredImages:
        """Compare every image with the bank alone.

        Args:
            reader: Gives the images of this process.
            num_images: How many they are, if that is known.
        """

        def compare() -> tuple[_Share, list[torch.Tensor]]:
            share, scores = _Share(), []
            for features in extract(self.trainer, self.model, reader, num_images):
                with profile(self.trainer, "[MuSc]score"):
                    scores += self._apart(self.model.bank.patch_scores(features.feature_maps))
                self._note(share, features.names, features.feature_maps, features.class_tokens)
            return share, scores

        share, scores = together(self.processes, compare)
        found = _Share.joined(gathered(self.processes, share))
        self._check_number(found.names, reader, least=1)
        return self._scored(found, interleaved(gathered(self.processes, scores)))

    def by_each_other(self, reader: PoolReader, num_images: int | None) -> ScoredImages:
        """Compare the images of a pool with each other, and with the bank in mode "both"; see :meth:`by_bank`."""
        bank = self.model.bank if self.mode == "both" else None
        share, store = together(self.processes, lambda: self._extract(reader, num_images))
        shares = gathered(self.processes, share)
        found = _Share.joined(shares)
        self._check_number(found.names, reader, least=1 if bank else MIN_IMAGES)
        self._check_pool(len(found.names), len(bank) if bank else 0)
        owners = interleaved([[(rank, i) for i in range(len(part.names))] for rank, part in enumerate(shares)])
        store = self._at_least_empty(store)
        subsets = self.model.subsets(torch.stack(found.class_tokens))
        if self.processes is None or len(subsets) == 1:
            of_own = self._score_share(store, bank, subsets, [len(part.names) for part in shares])
        else:
            of_own = self._score_subsets(store, bank, subsets, owners)
        placed = {place: scores for part in gathered(self.processes, of_own) for place, scores in part.items()}
        by_owner = [placed[owner] for owner in owners]
        return self._scored(found, by_owner, self._peaks(store, by_owner, owners))

    def _peaks(
        self, store: FeatureStore, patch_scores: list[torch.Tensor], owners: list[tuple[int, int]]
    ) -> Peaks | None:
        """Return the highest-scoring patches of all images, in their order."""
        if self.model.second_interval is None:
            return None
        rank = 0 if self.processes is None else self.processes.rank
        own = [scores for scores, (owner, _) in zip(patch_scores, owners, strict=True) if owner == rank]
        of_own = torch.stack(own) if own else torch.empty(0, *patch_scores[0].shape)
        layers = [maps[: len(own)] for maps in store.layers]
        degree = 2 * self.reach + 1
        found = find_peaks(layers, of_own, degree, device=self.device, processes=self.processes)
        place = {owner: index for index, owner in enumerate(sorted(owners))}  # found by rank
        return found.ordered([place[owner] for owner in owners])

    @property
    def reach(self) -> int:
        """Rows and columns from a place to the border of its window, at the middle one of the degrees; 1 at least."""
        degrees = sorted(self.model.aggregation_degrees)
        return max(1, degrees[len(degrees) // 2] // 2)

    def _score_share(
        self, store: FeatureStore, bank: ReferenceBank | None, subsets: list[list[int]], sizes: Sequence[int]
    ) -> dict[tuple[int, int], torch.Tensor]:
        """Compare the images of this process with all others, and return their patch scores by owner and index."""
        rank, number = (0, 1) if self.processes is None else (self.processes.rank, self.processes.size)
        num_images = sizes[rank]
        if bank:
            store.append([maps[rank::number] for maps in bank.feature_maps])  # the bank is dealt out, too
            references = range(sizes[0], len(store.layers[0])) if number == 1 else ()
            subsets = [[*subset, *references] for subset in subsets]
        if number == 1:
            total = self.model.num_comparisons(subsets, len(store.layers))
            num_pairs = sum(math.comb(len(subset), 2) for subset in subsets)
        else:
            subsets = [list(range(len(store.layers[0])))]
            num_compared = [size + len(range(other, len(bank or ()), number)) for other, size in enumerate(sizes)]
            num_pairs = Shares(tuple(num_compared), rank).num_pairs()
            total = num_pairs * len(store.layers) * len(self.model.aggregation_degrees)
        scores = self._score(store, subsets, total, num_pairs, self.processes)
        return {(rank, index): scores[index] for index in range(num_images)}

    def _score_subsets(
        self, store: FeatureStore, bank: ReferenceBank | None, subsets: list[list[int]], owners: list[tuple[int, int]]
    ) -> dict[tuple[int, int], torch.Tensor]:
        """Compare the images of whole subsets, which are dealt out; see :meth:`_score_share`."""
        assert self.processes is not None  # noqa: S101  # who alone compares all subsets
        rank, number = self.processes.rank, self.processes.size
        taker_of = {image: index % number for index, subset in enumerate(subsets) for image in subset}
        own = [image for image in range(len(owners)) if taker_of[image] == rank]
        layers = store.layers
        first = [maps.new_empty(0, *maps.shape[1:]) for maps in layers]
        moved = FeatureStore(store.remaining_budget, first, len(own) + len(bank or ()), least=0)
        move_images(self.processes, layers, owners, [taker_of[image] for image in range(len(owners))], moved)
        place = {image: index for index, image in enumerate(own)}
        if bank:
            moved.append(bank.feature_maps)
        references = range(len(own), len(own) + len(bank or ()))
        mine = [[*(place[image] for image in subset), *references] for subset in subsets[rank::number]]
        total = self.model.num_comparisons(mine, len(layers))
        num_pairs = sum(math.comb(len(subset), 2) for subset in mine)
        scores = self.processes.together(lambda: self._score(moved, mine, total, num_pairs, None))
        return {owners[image]: scores[index] for index, image in enumerate(own)}

    def _score(
        self,
        store: FeatureStore,
        subsets: list[list[int]],
        num_comparisons: int,
        num_pairs: int,
        processes: Processes | None,
    ) -> list[torch.Tensor]:
        """Return the patch scores of what is stored, ``(h, w)`` each."""
        if warning := slow_search(self.model, store.layers, num_pairs):
            rank_zero_warn(warning)
        if not subsets:
            return []
        budget = store.remaining_budget if self.device.type == "cpu" else self._memory_budget
        with (
            profile(self.trainer, "[MuSc]score"),
            progress_bar(self.trainer, "MuSc: mutual scoring", num_comparisons) as advance,
        ):
            scores = self.model.score(
                store.layers, subsets, memory_budget=budget, processes=processes, progress=advance
            )
        return self._apart(scores)

    def _extract(self, reader: PoolReader, num_images: int | None) -> tuple[_Share, FeatureStore | None]:
        """Return what was found of this process's images, and their feature maps, on the host."""
        share, store = _Share(), None
        known = gathered(self.processes, num_images)
        everywhere = None if None in known else sum(number or 0 for number in known) + self.num_references
        expected = None if num_images is None else num_images + self.num_references
        for features in extract(self.trainer, self.model, reader, num_images):
            if store is None:
                least = self.model.least_memory(features.feature_maps, everywhere or MIN_IMAGES)
                store = FeatureStore(self._memory_budget, features.feature_maps, expected, least)
            store.append(features.feature_maps)
            self._note(share, features.names, features.feature_maps, features.class_tokens)
        return share, store

    def _at_least_empty(self, store: FeatureStore | None) -> FeatureStore:
        """Return a store in which a process without images has none, of the shape of the others'."""
        shapes = gathered(self.processes, None if store is None else [maps.shape[1:] for maps in store.layers])
        if store is not None:
            return store
        shape = next(shape for shape in shapes if shape is not None)
        return FeatureStore(self._memory_budget, [torch.empty(0, *sizes) for sizes in shape], 1, least=0)

    def _note(
        self, share: _Share, names: list[str], feature_maps: list[torch.Tensor], class_tokens: torch.Tensor
    ) -> None:
        share.names.extend(names)
        share.class_tokens.extend(self._apart(class_tokens))
        share.median_features.extend(self._apart(median_features(feature_maps)))

    def _apart(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return the rows of a tensor as they can be told to other processes: a view would bring all others along."""
        return list(tensor) if self.processes is None else [row.clone() for row in tensor.cpu()]

    def _scored(self, found: _Share, patch_scores: Sequence[torch.Tensor], peaks: Peaks | None = None) -> ScoredImages:
        """Return all images with their scores, on the model's device."""
        tensors = patch_scores, found.class_tokens, found.median_features
        scores, tokens, medians = (torch.stack(list(parts)).to(self.device) for parts in tensors)
        return ScoredImages(found.names, scores, tokens, medians, peaks)

    def _check_pool(self, num_images: int, num_references: int) -> None:
        """Raise a ValueError where the intervals do not suit a pool; warn of a small one."""
        if num_images + num_references < FEW_IMAGES:
            rank_zero_warn(few_images(num_images, num_references))
        self.model.check_pool_size(num_images, num_references)

    def _check_number(self, names: list[str], reader: PoolReader, least: int) -> None:
        """Raise a ValueError where too few images could be read."""
        of_all = gathered(self.processes, reader.findings.skipped)
        skipped = {path: reason for part in of_all for path, reason in part.items()}
        if skipped and len(names) < least:
            raise unreadable(skipped, len(names) + len(skipped))
        check_size(names, self.num_references)
