# SPDX-License-Identifier: Apache-2.0
"""What the network learns: that mutual scoring finds the defects, and that class tokens tell images apart."""

from __future__ import annotations

import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_musc.functional import lnamd

DEGREES = (1, 3)
SHARE = 0.3  # of the other images, those that see a patch most alike
TEMPERATURE = 0.1
COVERAGE = 0.08  # of a patch: with more of it damaged, it is to be found


def image_distances(patches: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Distance of every patch to the nearest patch of every image (arXiv 2401.16753, equation 4).

    Args:
        patches: Unit vectors, ``(..., K, C)``.
        references: Unit vectors of whole images, ``(..., N, L, C)``.

    Returns:
        ``(..., K, N)``.
    """
    likeness = patches @ references.flatten(-3, -2).transpose(-2, -1)
    nearest = likeness.unflatten(-1, references.shape[-3:-1]).amax(dim=-1)
    return (2 - 2 * nearest).clamp_min(1e-6).sqrt()


def scores_of_each_other(patches: torch.Tensor) -> torch.Tensor:
    """Mutual scores of the patches of every pool (arXiv 2401.16753, section 3.2), with gradients.

    Args:
        patches: Unit vectors, ``(P, N, L, C)``.

    Returns:
        ``(P, N, L)``.
    """
    pools, images, length, _ = patches.shape
    distances = image_distances(patches.flatten(1, 2), patches).view(pools, images, length, images)
    itself = torch.eye(images, dtype=torch.bool, device=patches.device)[None, :, None]
    nearest = max(int(SHARE * (images - 1)), 1)
    return distances.masked_fill(itself, torch.inf).topk(nearest, largest=False).values.mean(dim=-1)


def outranked(above: torch.Tensor, below: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """How far values of ``below`` reach those that should lie ``above`` them.

    The mean of two losses of every value above: one that counts all values below (as AUROC does) and one ruled by
    the highest (as precision is).

    Args:
        above: ``(K,)``.
        below: ``(K, M)``.
        allowed: Which of ``below`` count, ``(K, M)``; rows without any do not.
    """
    rows = allowed.any(dim=1)
    if not rows.any():
        return above.sum() * 0
    above, below, allowed = above[rows], below[rows], allowed[rows]
    gaps = ((below - above[:, None]) / TEMPERATURE).masked_fill(~allowed, -torch.inf)
    worst = torch.logsumexp(gaps, dim=1)
    mean = worst - allowed.sum(dim=1).log()
    return 0.5 * (F.softplus(worst) + F.softplus(mean)).mean()


def patch_loss(patches: torch.Tensor, coverage: torch.Tensor, nearby: torch.Tensor, step: int) -> torch.Tensor:
    """Damaged patches must outscore the sound ones of their pool, and sound patches must know their own product.

    Args:
        patches: Unit vectors of the pools' images, ``(P, N, L, C)``.
        coverage: Share of every patch that is damaged, ``(P, N, L)``.
        nearby: The largest share among the patches that it may have seen, ``(P, N, L)``.
        step: Count of batches: which quarter of the sound patches meets other products.
    """
    pools, images = patches.shape[:2]
    scores = scores_of_each_other(patches).flatten(1)
    damaged, sound = coverage.flatten(1) > COVERAGE, nearby.flatten(1) == 0  # (P, N * L)
    pool, place = damaged.nonzero(as_tuple=True)
    found = outranked(scores[pool, place], scores[pool], sound[pool])

    pool, place = sound.nonzero(as_tuple=True)
    pool, place = pool[step % 4 :: 4], place[step % 4 :: 4]
    foreign = image_distances(patches.flatten(1, 2)[pool, place], patches.flatten(0, 1))  # (K, P * N)
    is_foreign = pool[:, None] != torch.arange(pools * images, device=pool.device) // images
    return found + 0.3 * outranked(-scores[pool, place], -foreign, is_foreign)


def image_loss(class_tokens: torch.Tensor, defective: torch.Tensor, pools: int) -> torch.Tensor:
    """A sound image's class token must lie nearer to its pool's sound ones than to any other image's.

    Args:
        class_tokens: ``(pools * N, C)``.
        defective: Which images show a defect, ``(pools * N,)``.
        pools: How many products.
    """
    tokens = F.normalize(class_tokens.float(), dim=-1)
    likeness = tokens @ tokens.T
    pool_of = torch.arange(len(tokens), device=tokens.device) // (len(tokens) // pools)
    kin = pool_of[:, None] == pool_of[None, :]
    itself = torch.eye(len(tokens), dtype=torch.bool, device=tokens.device)
    alike = kin & ~defective[:, None] & ~defective[None, :] & ~itself
    first, second = alike.nonzero(as_tuple=True)
    within = outranked(likeness[first, second], likeness[first], (kin & defective[None, :])[first])
    across = outranked(likeness[first, second], likeness[first], ~kin[first])
    return within + across


def pool_loss(
    maps: list[torch.Tensor], class_tokens: torch.Tensor, masks: torch.Tensor, pools: int, step: int
) -> dict[str, torch.Tensor]:
    """Losses of a batch of pools.

    Args:
        maps: Feature maps ``(pools * N, C, h, w)``, one for each depth that is to be used.
        class_tokens: ``(pools * N, C)``.
        masks: 1 where a defect can be seen, ``(pools * N, H, W)``.
        pools: How many products.
        step: Count of batches: depths and degrees meet in turn.
    """
    height, width = maps[0].shape[-2:]
    coverage = F.adaptive_avg_pool2d(masks.float()[:, None], (height, width))
    terms = []
    for index, depth in enumerate(maps):
        degree = DEGREES[(step + index) % len(DEGREES)]
        nearby = F.max_pool2d(coverage, degree + 2, stride=1, padding=degree // 2 + 1)
        of_pools = [
            values.unflatten(0, (pools, -1))
            for values in (lnamd(depth.float(), degree), coverage.flatten(1), nearby.flatten(1))
        ]
        terms.append(patch_loss(of_pools[0], of_pools[1], of_pools[2], step))
    return {
        "patches": torch.stack(terms).mean(),
        "images": image_loss(class_tokens, masks.flatten(1).amax(dim=1) > 0, pools),
    }
