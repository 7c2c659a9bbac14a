# SPDX-License-Identifier: Apache-2.0
"""The memory bank: reference images with which an image is compared on its own."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from anomalib_musc.functional import check_interval, larger_score, lnamd, reference_scale, rscin_by_references
from anomalib_musc.functional.mutual_scoring import interval_bounds
from anomalib_musc.functional.reference_scoring import reference_means
from anomalib_musc.functional.second_interval import median_ratio


class ReferenceBank(nn.Module):
    """Features of reference images, normal or unlabelled ones of the same product.

    It is kept in a model's state, whatever its size.

    Args:
        aggregation_degrees: LNAMD's degrees r.
        interval: Which of the ascending distances to the references are averaged.
        search_radius: Within how many rows and columns of its own place a patch is sought. Defaults to everywhere.
        second_interval: Another interval beyond the first, see :func:`~anomalib_musc.functional.larger_score`. Its
            bounds are resolved as where the references are compared with each other, for one distance less than there
            are references. Defaults to none.

    Attributes:
        ratios: By what the second scores of each layer are divided, the references' own median ratio, shape
            ``(layers,)``; empty without a second interval.
        black: Value of grey images of more than 8 bits that is shown black, shape ``()``.
        white: Likewise white; not above ``black`` where no reference is such an image.
        origin: What tells the references from others; ``None`` for those of a checkpoint or of a caller.
    """

    class_tokens: torch.Tensor
    raw_scores: torch.Tensor
    ratios: torch.Tensor
    black: torch.Tensor
    white: torch.Tensor
    origin: object
    search_radius: int | None = None  # of a pickled bank of version 0.1, too
    second_interval: tuple[float, float] | None = None

    def __init__(
        self,
        aggregation_degrees: Sequence[int],
        interval: tuple[float, float],
        search_radius: int | None = None,
        second_interval: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.search_radius = search_radius
        self.second_interval = second_interval
        self.aggregation_degrees = tuple(aggregation_degrees)
        self.interval = interval
        self.num_layers = 0
        self.origin = None
        self._own_patch_scores: torch.Tensor | None = None  # found again after loading, if asked for
        self.register_buffer("class_tokens", torch.empty(0, 0))
        self.register_buffer("raw_scores", torch.empty(0))
        self.register_buffer("ratios", torch.empty(0))
        self.register_buffer("black", torch.zeros(()))
        self.register_buffer("white", torch.zeros(()))

    def clear(self) -> None:
        """Take all images out."""
        names = [name for name in self._buffers if name.startswith(("layer_", "vectors_"))]
        for name in names:
            del self._buffers[name]
        self.num_layers, self.origin, self._own_patch_scores = 0, None, None
        self.class_tokens, self.raw_scores = self.class_tokens.new_empty(0, 0), self.raw_scores.new_empty(0)
        self.ratios = self.ratios.new_empty(0)
        self.black, self.white = torch.zeros_like(self.black), torch.zeros_like(self.white)

    def __len__(self) -> int:
        return len(self.raw_scores)

    @property
    def grey_range(self) -> tuple[float, float] | None:
        """:attr:`black` and :attr:`white`, ``None`` where nobody has named them."""
        black, white = self.black.item(), self.white.item()
        return (black, white) if white > black else None

    @property
    def feature_maps(self) -> list[torch.Tensor]:
        """One map ``(M, C, h, w)`` a layer."""
        return [self.get_buffer(f"layer_{layer}") for layer in range(self.num_layers)]

    def fill(
        self,
        feature_maps: Sequence[torch.Tensor],
        class_tokens: torch.Tensor,
        raw_scores: torch.Tensor,
        patch_scores: torch.Tensor | None = None,
        *,
        ratios: torch.Tensor | None = None,
        grey_range: tuple[float, float] = (0.0, 0.0),
        origin: object = None,
    ) -> None:
        """Put M images into the bank in place of those that are there.

        Args:
            feature_maps: One map ``(M, C, h, w)`` a layer.
            class_tokens: Image features, shape ``(M, D)``.
            raw_scores: Raw scores of the images against each other, shape ``(M,)``.
            patch_scores: Their patch scores, shape ``(M, h, w)``, if known.
            ratios: See the class, if known; those of another interval are not.
            grey_range: ``black`` and ``white``, see the class.
            origin: See the class.
        """
        device = self.class_tokens.device
        self.clear()
        self.num_layers, self.origin = len(feature_maps), origin
        self.black, self.white = (self.white.new_tensor(value) for value in grey_range)
        self.class_tokens = class_tokens.to(device)
        self.raw_scores = raw_scores.to(device)
        self._own_patch_scores = None if patch_scores is None else patch_scores.cpu()
        for layer, feature_map in enumerate(feature_maps):
            self.register_buffer(f"layer_{layer}", feature_map.to(device))
        self._aggregate()
        if self.second_interval is not None:
            is_known = ratios is not None and len(ratios) == self.num_layers
            self.ratios = (ratios if ratios is not None and is_known else self._own_ratios()).to(device)

    def patch_scores(
        self, feature_maps: Sequence[torch.Tensor], own_copies: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compare images with the references, averaged over layers and degrees.

        Args:
            feature_maps: One map ``(B, C, h, w)`` a layer.
            own_copies: Which reference is the image itself and is left out, shape ``(B,)``. Defaults to none.

        Returns:
            Patch scores, shape ``(B, h, w)``.
        """
        scores = [
            means[0] if self.second_interval is None else larger_score(means[0], means[1], self.ratios[layer])
            for layer, means in enumerate(self._means(feature_maps, own_copies))
        ]
        return torch.stack(scores).mean(dim=0).view(-1, *feature_maps[0].shape[-2:])

    def _means(self, feature_maps: Sequence[torch.Tensor], own_copies: torch.Tensor | None) -> Iterator[torch.Tensor]:
        """Yield the patch scores of each layer by each interval, averaged over degrees, ``(K, B, L)``."""
        count = len(self) - (own_copies is not None)
        check_interval(self.interval, count + 1)
        slices = [interval_bounds(self.interval, count)]
        if self.second_interval is not None:
            slices.append(interval_bounds(self.second_interval, max(1, len(self) - 1)))
        for layer, feature_map in enumerate(feature_maps):
            means = [
                reference_means(
                    lnamd(feature_map, degree),
                    self.get_buffer(f"vectors_{layer}_{degree}"),
                    slices,
                    own_copies=own_copies,
                    grid=(feature_map.shape[2], feature_map.shape[3]),
                    search_radius=self.search_radius,
                )
                for degree in self.aggregation_degrees
            ]
            yield torch.stack(means).mean(dim=0)

    def _own_ratios(self) -> torch.Tensor:
        """Return the median ratios ``(layers,)`` of the references against each other; infinite for a single one."""
        if len(self) == 1:
            return torch.full((self.num_layers,), torch.inf)
        of_images = [
            list(self._means([maps[[index]] for maps in self.feature_maps], torch.tensor([index])))
            for index in range(len(self))
        ]
        return torch.stack([median_ratio(*torch.cat(layer, dim=1)) for layer in zip(*of_images, strict=True)])

    def own_patch_scores(self) -> torch.Tensor:
        """Return the patch scores of the references against each other, shape ``(M, h, w)``."""
        if self._own_patch_scores is None:
            scores = [
                self.patch_scores([maps[[index]] for maps in self.feature_maps], torch.tensor([index]))
                for index in range(len(self))
            ]
            self._own_patch_scores = torch.cat(scores).cpu()
        return self._own_patch_scores

    def rescore(self, raw_scores: torch.Tensor, class_tokens: torch.Tensor, windows: Sequence[int]) -> torch.Tensor:
        """Re-score images ``(B,)`` with the references most like them.

        Returns:
            Scores ``(B,)`` in the unit of the raw ones: :func:`~anomalib_musc.functional.rscin_by_references`, whose
            scale is undone.
        """
        scores = rscin_by_references(raw_scores, class_tokens, self.raw_scores, self.class_tokens, windows)
        scale = reference_scale(self.raw_scores)
        return torch.where(scale > 0, self.raw_scores.min() + scores * scale, scores)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "ReferenceBank":
        """Move to another device, but stay in float32, as what the backbone gives is brought to."""
        del recurse
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(fn(buffer.new_empty(0)).device)
        return self

    def _aggregate(self) -> None:
        for layer, feature_map in enumerate(self.feature_maps):
            for degree in self.aggregation_degrees:
                vectors = lnamd(feature_map, degree)
                self.register_buffer(f"vectors_{layer}_{degree}", vectors, persistent=False)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take a bank of any size, or none, as torch's own loading takes tensors of the same shape only."""
        layers = [name for name in state_dict if name.startswith(f"{prefix}layer_")]
        if layers:
            maps = [state_dict[f"{prefix}layer_{layer}"] for layer in range(len(layers))]
            tokens, raw_scores = (state_dict[f"{prefix}{name}"] for name in ("class_tokens", "raw_scores"))
            self.fill(maps, tokens, raw_scores, ratios=state_dict.get(f"{prefix}ratios"))
        elif f"{prefix}raw_scores" in state_dict:
            self.clear()
        state_dict[f"{prefix}ratios"] = self.ratios  # which files of before have not
        state_dict.setdefault(f"{prefix}black", torch.zeros(()))  # of version 0.1
        super()._load_from_state_dict(state_dict, prefix, *args)
