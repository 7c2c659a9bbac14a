# SPDX-License-Identifier: Apache-2.0
"""RsCIN for any model's image scores (arXiv 2401.16753, section 3.3): its neighbours need image features alone."""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import torch
from anomalib.data import ImageBatch
from torch import nn
from tqdm import tqdm

from anomalib_musc.compat.pre_processor import resize_and_normalise
from anomalib_musc.functional import rscin
from anomalib_musc.functional.rscin import check_windows
from anomalib_musc.pool.checks import check_readable
from anomalib_musc.pool.high_bit_depth import grey_range_of_files, read_image_file
from anomalib_musc.pool.reader import ahead
from anomalib_musc.torch_model import MuScModel

_BATCH = 16


def rescore(
    predictions: Iterable[ImageBatch],
    backbone: str | nn.Module = "ViT-L-14-336",
    windows: Sequence[int] = (1, 2, 3),
    pretrained: bool | str | Path = True,
    image_size: int | tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Re-score the images that any anomalib model has predicted with the images most like them.

    All predictions are one pool: predict the images of one product. anomalib clips normalised scores at 0 and 1, which
    ties the most anomalous ones; a model with ``post_processor=False`` predicts scores as they are.

    Args:
        predictions: What ``Engine.predict`` returns, with ``image_path`` and ``pred_score``.
        backbone: Whose image features find the neighbours, as for :class:`~anomalib_musc.MuSc`.
        windows: Neighbourhood sizes k, the image itself included.
        pretrained: As for :class:`~anomalib_musc.MuSc`.
        image_size: Likewise.
        device: Where the backbone runs.

    Returns:
        Scores in [0, 1], shape ``(N,)``, in the order of the predictions.

    Raises:
        ValueError: If predictions lack paths or finite scores, ``windows`` are not valid, or a file cannot be read.

    Example:
        >>> from anomalib.engine import Engine
        >>> from anomalib.models import Patchcore
        >>> predictions = Engine().predict(Patchcore(), ckpt_path="model.ckpt", data_path="bottles")  # doctest: +SKIP
        >>> scores = rescore(predictions, backbone="dinov2_vitb14")  # doctest: +SKIP
    """
    check_windows(windows)
    paths: list[str] = []
    scores: list[torch.Tensor] = []
    for batch in predictions:
        if batch.image_path is None or batch.pred_score is None:
            missing = "image_path" if batch.image_path is None else "pred_score"
            msg = f"predictions have no {missing}, which RsCIN needs; pass what Engine.predict returns for image files."
            raise ValueError(msg)
        paths += [batch.image_path] if isinstance(batch.image_path, str) else list(batch.image_path)
        scores.append(torch.as_tensor(batch.pred_score).reshape(-1).cpu().float())
    if not paths:
        msg = "predictions are empty; RsCIN needs the scores of a pool of images."
        raise ValueError(msg)
    every_score = torch.cat(scores)
    if not every_score.isfinite().all():
        msg = f"predictions have {int((~every_score.isfinite()).sum())} scores that are not finite, such as NaN."
        raise ValueError(msg)
    return rscin(every_score, image_features(paths, backbone, pretrained, image_size, device), windows)


@torch.no_grad()
def image_features(
    paths: Sequence[str | Path],
    backbone: str | nn.Module = "ViT-L-14-336",
    pretrained: bool | str | Path = True,
    image_size: int | tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Return the image features of files as a backbone sees them.

    Args:
        paths: Image files.
        backbone: As for :class:`~anomalib_musc.MuSc`.
        pretrained: Likewise.
        image_size: Likewise.
        device: Where the backbone runs.

    Returns:
        Features, shape ``(N, D)``, on the host.

    Raises:
        ValueError: If a file cannot be read.
    """
    files = [Path(path) for path in paths]
    check_readable(files, decode=True)
    model = MuScModel(backbone, pretrained=pretrained, image_size=image_size).to(device).eval()
    transform = resize_and_normalise(model.image_size, model.mean, model.std, model.interpolation)
    grey_range, _ = grey_range_of_files(files)
    images = ahead(lambda path: transform(read_image_file(path).scaled(grey_range)[None]), files)
    features = []
    for _ in tqdm(range(0, len(files), _BATCH), desc="RsCIN: extracting image features"):
        features.append(model.extract(torch.cat(list(islice(images, _BATCH))).to(device))[1].cpu())
    return torch.cat(features)
