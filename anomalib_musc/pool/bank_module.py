# SPDX-License-Identifier: Apache-2.0
"""Life of a memory bank in anomalib: it is made before a loop that needs one, or of the pools that were scored."""

from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from anomalib import LearningType

from anomalib_musc.compat.lightning import forget_objects
from anomalib_musc.compat.termination import stopped_at_once
from anomalib_musc.functional.arguments import check_count
from anomalib_musc.pool.grey_range import GreyRange, widest
from anomalib_musc.pool.module import PoolModule
from anomalib_musc.pool.pool import Pool, fingerprint
from anomalib_musc.pool.references import FOLDER, POOL, TRAINING_IMAGES, BankArguments, coreset_of
from anomalib_musc.pool.scorer import PoolScorer
from anomalib_musc.pool.source import PoolSource, transform_leaves
from anomalib_musc.post_processor import RsCINPostProcessor
from anomalib_musc.torch_model import MuScModel


class BankModule(PoolModule):
    """A :class:`PoolModule` that compares images with a memory bank instead of their pool, or with both.

    Args:
        model: The model, which holds the bank.
        bank_arguments: With what images are compared, and what the bank is made of.
        grey_range: Black and white of grey images of more than 8 bits, where they are given.
        **components: anomalib's components, see ``AnomalibModule``.

    Attributes:
        mode: "mutual", "reference" or "both".
    """

    def __init__(
        self, model: MuScModel, bank_arguments: BankArguments, grey_range: GreyRange | None, **components: Any
    ) -> None:
        super().__init__(**components)
        self.model = model
        self.bank_arguments = bank_arguments
        self.grey_range = grey_range
        self.mode: str = bank_arguments.mode
        self._bank_of = TRAINING_IMAGES if bank_arguments.references is None else FOLDER
        forget_objects(self, model=model, bank_arguments=bank_arguments)

    @abstractmethod
    def scorer(self, grey_range: GreyRange | None) -> PoolScorer:
        """Return what scores a pool, or extracts references."""

    @abstractmethod
    def forget_thresholds(self) -> None:
        """Make thresholds uncalibrated, as another bank takes the place of what they were found on."""

    @property
    def learning_type(self) -> LearningType:
        """Few-shot where a bank is made of a datamodule's normal training images, else zero-shot."""
        is_few_shot = self.mode != "mutual" and self._bank_of == TRAINING_IMAGES
        return LearningType.FEW_SHOT if is_few_shot else LearningType.ZERO_SHOT

    def on_validation_epoch_end(self) -> None:
        """Find the thresholds that labels have not given, before a checkpoint is written."""
        if self.mode == "reference":
            self.calibrate()

    def teardown(self, stage: str) -> None:
        """Make the bank where there was nothing to validate on, for then Lightning skips all that is above.

        Not in :meth:`setup`, where nobody knows yet whether a checkpoint will bring one.
        """
        super().teardown(stage)
        if stage == "validate" and self.mode != "mutual":
            with stopped_at_once(self.trainer):
                self.prepare_bank()
                if self.mode == "reference":
                    self.calibrate()

    def pool_settings(self) -> list[object]:
        """Return what else decides the scores of the same images."""
        return [self.mode, *self.model.settings, *transform_leaves(self.transform), fingerprint(self.model)]

    def rescored(self, pool: Pool) -> torch.Tensor:
        """Return the image scores ``(N,)``: by RsCIN where the post-processor has it."""
        if not isinstance(self.post_processor, RsCINPostProcessor):
            return pool.raw_scores
        bank = self.model.bank if self.mode == "reference" else None
        return self.post_processor.rescore(pool.raw_scores, pool.class_tokens, bank)

    def keep_bank(self, size: int = 16) -> None:
        """Make a bank of the most normal and diverse images of the pools that were just scored.

        From then on every image is compared with the bank alone, and thresholds come from it: those of labels were of
        the pool's scale, so validate again for others.

        Args:
            size: How many images to keep.

        Raises:
            RuntimeError: If no pool was scored, or its images have no files.
            ValueError: If ``size`` is no whole number of at least 1.
        """
        check_count("size", size)
        in_pools = self.grey_range or widest(pool.grey_range for pool in self.pools)
        self._fill_bank(coreset_of(self.pools, size), None, in_pools)
        self.pools, self._bank_of = (), POOL
        self.mode = self.hparams["mode"] = "reference"
        self.forget_thresholds()
        self.calibrate()

    def use_references(self, folder: str | Path) -> None:
        """Compare images with those of a folder alone, from the next run on; the bank and its thresholds go."""
        self.bank_arguments = replace(self.bank_arguments, mode="reference", references=folder, k_shot=None)
        self._bank_of = FOLDER
        self.mode = self.hparams["mode"] = "reference"
        self.model.bank.clear()
        self.forget_thresholds()

    def prepare_bank(self) -> None:
        """Make the bank, or make it anew where its images are not those that it is to be made of now."""
        if self.mode == "mutual":
            return
        bank = self.model.bank
        found = self.bank_arguments.find_new(bank, getattr(self.trainer, "datamodule", None))
        if found is None:
            return
        is_another, device = len(bank) > 0, bank.class_tokens.device
        self.to(self.trainer.strategy.root_device)  # from which Lightning has taken it before teardown
        self._fill_bank(found.source, self.bank_arguments.bank_size, self.grey_range, found.origin)
        self._bank_of = found.kind
        if is_another:
            self.forget_thresholds()
        self.to(device)

    def _fill_bank(
        self, source: PoolSource, size: int | None, grey_range: GreyRange | None, origin: object = None
    ) -> None:
        features, found = self.scorer(grey_range).extract_references(source, size)
        of_bank = found or self.model.bank.grey_range or (0.0, 0.0)  # which a user may have named
        self.model.fill_bank(features, size, is_alone=self.mode != "both", grey_range=of_bank, origin=origin)
        if self.trainer.world_size > 1:
            state = {name: value.cpu() for name, value in self.model.bank.state_dict().items()}
            self.model.bank.load_state_dict(self.trainer.strategy.broadcast(state))
            self.model.bank.origin = origin
