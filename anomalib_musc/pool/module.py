# SPDX-License-Identifier: Apache-2.0
"""Life of a transductive model in anomalib: pools are scored before a loop, whose steps return their predictions."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torchvision.transforms.v2.functional import resize

from anomalib_musc.compat.checkpoints import check_checkpoints
from anomalib_musc.compat.lightning import replace_dataloaders, trainer_of
from anomalib_musc.compat.monitoring import check_monitored
from anomalib_musc.compat.sharing import OneThread
from anomalib_musc.compat.termination import TerminationStatus, stop_if_terminated, stopped_at_once
from anomalib_musc.compat.validation import NoValidationData
from anomalib_musc.compat.workspace import RunFolders
from anomalib_musc.distances import Processes, gathered, together
from anomalib_musc.pool.grey_range import GreyRange, widest
from anomalib_musc.pool.loaders import as_list, dataset_of, length, share_of
from anomalib_musc.pool.orientation import UPRIGHT, turned_tensor
from anomalib_musc.pool.pool import Pool, image_names
from anomalib_musc.pool.scorer import PoolScorer
from anomalib_musc.pool.source import PoolSource
from anomalib_musc.pool.warnings import warn_of_labels
from anomalib_musc.torch_model import MuScModel


class PoolModule(NoValidationData):
    """The part of an ``AnomalibModule`` that has to see all images of a dataloader before it can say anything of one.

    anomalib's callbacks take each batch as it leaves a step, so pools are scored when a loop starts. A pool that was
    just scored, such as a validation set that is the test set, is not scored again.

    Name it before ``AnomalibModule`` among a model's bases. It is no subclass, as anomalib 2.7.0 takes every direct
    subclass for a model, and no other class.

    Args:
        **components: anomalib's components, see ``AnomalibModule``.

    Attributes:
        model: What a subclass makes.
        pools: The scored pools of the last loop, one a dataloader.
        processes: Those among which the images of the last loop were dealt; ``None`` where this one has all.
    """

    model: MuScModel

    def __init__(self, **components: Any) -> None:
        super().__init__(**components)
        self.pools: tuple[Pool, ...] = ()
        self.processes: Processes | None = None
        self._are_validation_pools = False
        self._validation_range: GreyRange | None = None
        self._run_folders = RunFolders()
        self._one_thread = OneThread()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # where all files of a share are broken

    def configure_callbacks(self) -> list[Callback]:
        """Give the run a folder of its own; nothing of a run comes before, and some callbacks write in ``setup``."""
        trainer = trainer_of(self)
        if trainer is not None:
            self._one_thread.enter(self, trainer)
            check_checkpoints(trainer)
            self._run_folders.enter(trainer, str(self.name))
        callbacks: Any = super().configure_callbacks()
        listed = list(callbacks) if isinstance(callbacks, Sequence) else [callbacks]
        return [*listed, self._one_thread, self._run_folders, TerminationStatus()]

    def teardown(self, stage: str) -> None:
        """Say where the results are, and end here if told to: another stage may be to follow."""
        super().teardown(stage)
        stop_if_terminated(self.trainer)
        if stage in {"test", "predict"} and any(Path(self.trainer.default_root_dir).glob("*")):
            rank_zero_info(f"Results: {self.trainer.default_root_dir}")

    @property
    def writes_results(self) -> bool:
        """Whether this process writes what it predicts: where several have the same images, the first one does."""
        return self.processes is not None or bool(self.trainer.is_global_zero)

    @property
    def skipped_images(self) -> dict[Path, str]:
        """Files that the last loop left out, and why."""
        return {path: reason for pool in self.pools for path, reason in pool.skipped.items()}

    @property
    def image_sizes(self) -> dict[str, tuple[int, int]]:
        """(width, height) of the last loop's image files, by name, as far as they were read here."""
        return {name: size for pool in self.pools for name, size in pool.sizes.items()}

    @property
    def pool_warnings(self) -> list[str]:
        """Signs that the pools of the last loop are not what their user thinks they are."""
        return list(dict.fromkeys(warning for pool in self.pools for warning in pool.warnings))

    @property
    def transform(self) -> Any:
        """What prepares images for the backbone; ``None`` where there is no pre-processor."""
        return getattr(self.pre_processor, "transform", None)

    @abstractmethod
    def pool_scorer(self) -> PoolScorer:
        """Return what scores a pool; called once before each loop."""

    @abstractmethod
    def pool_settings(self) -> list[object]:
        """Return what else decides the scores of the same images."""

    @abstractmethod
    def rescored(self, pool: Pool) -> torch.Tensor:
        """Return the image scores ``(N,)`` of a pool, from its raw ones."""

    @abstractmethod
    def calibrate(self) -> None:
        """Find the thresholds that no labels have given."""

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Images are dealt to several processes here, each once; Lightning's sampler repeats some of them."""
        return {"num_sanity_val_steps": 0, "use_distributed_sampler": False}

    @staticmethod
    def configure_optimizers() -> None:
        """Nothing is trained."""

    def on_validation_start(self) -> None:
        """Score the validation pools."""
        with stopped_at_once(self.trainer):
            loaders = self._deal(self.trainer.val_dataloaders)
            self._score_pools(loaders, self.trainer.num_val_batches)

    def on_validation_end(self) -> None:
        """Raise a ValueError where no checkpoint was written for want of a metric."""
        check_monitored(self.trainer)

    def on_test_start(self) -> None:
        """Score the test pools."""
        with stopped_at_once(self.trainer):
            loaders = self._deal(self.trainer.test_dataloaders)
            self._score_pools(loaders, self.trainer.num_test_batches)
            self._label_pools()

    def on_predict_start(self) -> None:
        """Score the prediction pools, and leave out the files that could not be read."""
        with stopped_at_once(self.trainer):
            loaders = self._deal(self.trainer.predict_dataloaders)
            self._score_pools(loaders, self.trainer.num_predict_batches)
            self._label_pools()
        pairs = list(zip(loaders, self.pools, strict=True))
        readable = [PoolSource(loader).without(pool.skipped) for loader, pool in pairs]
        if any(new is not old for new, (old, _) in zip(readable, pairs, strict=True)):
            self._read(readable)

    def validation_step(  # type: ignore[override]
        self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> ImageBatch:
        """Return the batch with its predictions: ``pred_score (B,)`` and ``anomaly_map (B, H, W)``."""
        del batch_idx
        scores, anomaly_maps = self.predictions(batch, dataloader_idx)
        self._turn(batch, dataloader_idx)
        return batch.update(pred_score=scores, anomaly_map=anomaly_maps)

    def test_step(  # type: ignore[override]
        self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> ImageBatch:
        """Return the batch with its predictions."""
        return self.validation_step(batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0) -> ImageBatch:
        """Return the batch with its predictions."""
        return self.validation_step(batch, batch_idx, dataloader_idx)

    def predictions(self, batch: ImageBatch, dataloader_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the image scores ``(B,)`` and anomaly maps ``(B, H, W)`` of a batch of the running loop."""
        stop_if_terminated(self.trainer)
        pool = self.pools[dataloader_idx]
        positions = pool.positions(image_names(batch.image_path, batch.image))
        anomaly_maps = self.model.anomaly_maps(pool.patch_scores[positions].to(self.device))
        return pool.scores[positions].to(self.device), anomaly_maps.squeeze(1)

    def _turn(self, batch: ImageBatch, dataloader_idx: int) -> None:
        """Turn the images of a batch, read as they are stored, as viewers show them: so lie the maps."""
        orientations = self.pools[dataloader_idx].orientations
        images: Any = batch.image
        if orientations:
            size = list(images.shape[-2:])
            pairs = zip(images, image_names(batch.image_path, None), strict=True)
            turned = [turned_tensor(image, orientations.get(name, UPRIGHT)) for image, name in pairs]
            batch.update(image=torch.stack([resize(image, size, antialias=True) for image in turned]))

    def forward(self, batch: torch.Tensor, *args: Any, **kwargs: Any) -> InferenceBatch:
        """Score images ``(B, 3, H, W)`` in [0, 1], as an export does; see anomalib's method."""
        found: Any = super().forward(batch, *args, **kwargs)
        if isinstance(found, InferenceBatch):
            return found
        return InferenceBatch(pred_score=found.pred_score, anomaly_map=found.anomaly_map)  # without a post-processor

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take nothing of an evaluator from a file: the one here may have other metrics, or there may be none."""
        for key in [key for key in state_dict if key.startswith(f"{prefix}evaluator.")]:
            del state_dict[key]
        evaluator: Any = getattr(self, "evaluator", None)
        if evaluator is not None:
            evaluator.state_dict(destination=state_dict, prefix=f"{prefix}evaluator.")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the pools: an export needs none, and a dataloader may not be one that can be pickled."""
        return {**super().__getstate__(), "pools": ()}

    def _label_pools(self) -> None:
        """Find thresholds, and say so where most images of a pool exceed them."""
        self.calibrate()
        if isinstance(self.post_processor, PostProcessor) and self.post_processor.enable_thresholding:
            threshold = self.post_processor.image_threshold.item()
            warnings = [warn_of_labels(pool.scores, threshold) for pool in self.pools]
            for warning in chain(*warnings):
                rank_zero_warn(warning)
            self.pools = tuple(map(Pool.with_warnings, self.pools, warnings))

    def _deal(self, dataloaders: Any) -> list[Any]:
        """Let each of several processes read its share of the images.

        Where one of them has fewer images than there are processes, or the trainer reads a limited number of batches,
        each process reads them all, so that metrics, which are computed over the processes, count every image equally
        often.

        Returns:
            The dataloaders of all images.
        """
        loaders, number = as_list(dataloaders), self.trainer.world_size
        fewest = min((length(dataset_of(loader)) for loader in loaders), default=0)
        limits = self.trainer.limit_val_batches, self.trainer.limit_test_batches, self.trainer.limit_predict_batches
        is_dealt = fewest >= number and set(limits) == {1.0} and self.trainer.state.fn != TrainerFn.FITTING
        self.processes = Processes.of(number) if is_dealt else None
        if self.processes is not None:
            self._read(loaders)
        return loaders

    def _read(self, dataloaders: Sequence[Any]) -> None:
        """Let the loop read other dataloaders, or this process's share of them."""
        if self.processes is not None:
            rank, number = self.processes.rank, self.processes.size
            dataloaders = [share_of(loader, rank, number) for loader in dataloaders]
        replace_dataloaders(self.trainer, dataloaders)

    def _score_pools(self, dataloaders: Any, limits: Sequence[float]) -> None:
        """Make one pool of each dataloader, taking over those that hold the same images as before."""
        scorer, settings = self.pool_scorer(), [self.trainer.precision, *self.pool_settings()]
        known, self.pools = list(self.pools), ()
        pools: list[Pool] = []
        for loader, limit in zip(as_list(dataloaders), limits, strict=True):
            source = PoolSource(loader, limit)
            key = (together(self.processes, partial(getattr, source, "key")), settings)
            is_known = source.is_recognised_by_files or self._are_validation_pools
            pool = next((pool for pool in known if is_known and pool.is_of(key, scorer.grey_range)), None)
            if not all(gathered(self.processes, pool is not None)):  # such as where a file is another on a machine
                pool = None
            pool = scorer.score(source, key) if pool is None else scorer.taken_over(pool, source)
            known.append(pool)
            pools.append(pool)
        self._are_validation_pools = self.trainer.validating
        if self.trainer.validating:
            self._validation_range = widest(pool.grey_range for pool in pools)
        self.pools = tuple(pool.with_scores(self.rescored(pool)) for pool in pools)
