# SPDX-License-Identifier: Apache-2.0
"""MuSc in anomalib: pools are scored before the loop, then every step returns its batch's predictions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from anomalib.data import ImageBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import nn

from anomalib_musc.backbones.weights import skip_download
from anomalib_musc.compat.checkpoints import read_checkpoint
from anomalib_musc.compat.export import ExportableModule
from anomalib_musc.compat.lightning import forget_objects, trainer_of
from anomalib_musc.compat.pre_processor import MultiLoaderPreProcessor, resize_and_normalise
from anomalib_musc.decision.calibration import Calibration
from anomalib_musc.decision.version_0_1 import convert_checkpoint, convert_post_processor
from anomalib_musc.functional import check_budget
from anomalib_musc.functional.arguments import check_count
from anomalib_musc.memory_bank.checkpoint import (
    check_exportable,
    check_network,
    describe_network,
    mode_of,
    take_activation,
    warn_of_kept_bank,
)
from anomalib_musc.metrics.evaluator import PaperEvaluator
from anomalib_musc.output.files import check_writable
from anomalib_musc.output.pool_report import report_of_pools
from anomalib_musc.output.prediction_writer import (
    PredictionWriter,
    check_prediction_writer,
    result_folders,
    writes_review,
)
from anomalib_musc.output.predictions import PoolReport
from anomalib_musc.output.review.pictures import thumbnail_of
from anomalib_musc.output.visualizer import FolderVisualizer
from anomalib_musc.pool.bank_module import BankModule
from anomalib_musc.pool.grey_range import GreyRange, check_grey_range
from anomalib_musc.pool.references import FOLDER, BankArguments
from anomalib_musc.pool.scorer import PoolScorer
from anomalib_musc.pool.scoring import ImageScorer
from anomalib_musc.post_processor import RsCINPostProcessor
from anomalib_musc.torch_model import MuScModel


class MuSc(ExportableModule, BankModule, AnomalibModule):  # type: ignore[misc]  # anomalib's to_onnx is not Lightning's
    """Zero-shot anomaly detection by mutual scoring of unlabelled images (Li et al., ICLR 2024, arXiv 2401.16753).

    The unlabelled images of one dataloader are its pool: when a test, validation or prediction starts, all of them are
    read once, their features are extracted and scored against each other. No training, no prompts, no labels. A pool
    that was just scored, such as a validation set that is the test set, is not scored again.

    Args:
        backbone: Name of an open_clip or timm model, or of the official release's (``ViT-L-14-336``,
            ``dinov2_vitl14``, ...), ``musc-tiny``, whose weights are in the package, ``efficientnet-lite2``, whose
            weights come by pip, or your own module; see
            :class:`~anomalib_musc.MuScModel`.
        memory_budget: GiB that the pool may take, its features and scoring, on the host and on the compute device
            each. What does not fit goes to temporary files. Defaults to half of what is free.
        batch_size: How many images the backbone takes at once; no result depends on it.
        mode: With what an image is compared: "mutual", the other images of its pool, as in the paper; "reference", a
            memory bank of reference images, so that its score does not depend on the others; "both". A checkpoint's
            takes the place of "mutual".
        references: Folder of images for the bank, normal or unlabelled; those to be scored must not be among them.
            Defaults to the datamodule's training images.
        k_shot: How many of the datamodule's training images to take. Defaults to all.
        bank_size: How many references to keep, the most normal and diverse ones. Defaults to all.
        grey_range: Values that are shown black and white of grey images of more than 8 bits, such as ``(0, 4095)``.
            By default those of the references, or of the validation whose labels gave the thresholds, else found in
            the images themselves, see :func:`~anomalib_musc.pool.grey_range.find_grey_range`; the log says them.
        pre_processor: anomalib's component, or whether to use the default: resize and normalise as the backbone asks.
        post_processor: Likewise; the default is :class:`~anomalib_musc.RsCINPostProcessor`.
        evaluator: Likewise; the default reports the paper's metrics.
        visualizer: Likewise; the default writes one picture an image, see :class:`FolderVisualizer`; anomalib's
            ``ImageVisualizer`` works in its place.
        prediction_writer: Likewise; the default writes ``predictions.csv``, ``predictions.json`` and ``review.html``
            when predicting, see :class:`~anomalib_musc.PredictionWriter`.
        **model_arguments: Further arguments of :class:`~anomalib_musc.MuScModel`: ``pretrained``, ``image_size``,
            ``tile_size``, ``tile_overlap``, ``layers``, ``activation``, ``aggregation_degrees``, ``interval``,
            ``second_interval``, ``search_radius``, ``precision``, ``num_subsets``.

    Raises:
        ValueError: If an argument is out of range or does not fit the backbone.
        WeightsUnavailableError: If the weights can neither be found nor downloaded.

    Example:
        >>> from anomalib.data import MVTecAD
        >>> from anomalib.engine import Engine
        >>> model = MuSc(backbone="vit_tiny_patch16_224", pretrained=False)
        >>> model.name, model.learning_type.value
        ('MuSc', 'zero_shot')
        >>> Engine().test(model, datamodule=MVTecAD(category="bottle"))  # doctest: +SKIP
    """

    def __init__(
        self,
        backbone: str | nn.Module = "ViT-L-14-336",
        *,
        memory_budget: float | None = None,
        batch_size: int = 8,
        mode: Literal["mutual", "reference", "both"] = "mutual",
        references: str | Path | None = None,
        k_shot: int | None = None,
        bank_size: int | None = None,
        grey_range: tuple[float, float] | None = None,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
        prediction_writer: PredictionWriter | bool = True,
        **model_arguments: Any,
    ) -> None:
        check_budget(memory_budget)
        check_count("batch_size", batch_size)
        named_range = check_grey_range(grey_range)
        bank_arguments = BankArguments(mode, references, k_shot, bank_size)
        check_prediction_writer(prediction_writer)
        model = MuScModel(backbone, **model_arguments)
        if pre_processor is True:
            pre_processor = self.configure_pre_processor(model.image_size, model.mean, model.std, model.interpolation)
        components = {"evaluator": evaluator, "visualizer": visualizer}
        super().__init__(
            model, bank_arguments, named_range, pre_processor=pre_processor, post_processor=post_processor, **components
        )
        self.memory_budget = memory_budget
        self.batch_size = batch_size
        self._writes_by_default = prediction_writer is True
        self.prediction_writer = PredictionWriter() if prediction_writer is True else prediction_writer or None
        self._calibration = Calibration()
        # Lightning would pickle objects into checkpoints, which could not be loaded safely: pass them again on loading.
        forget_objects(self, backbone=backbone, prediction_writer=prediction_writer)

    @staticmethod
    def configure_pre_processor(
        image_size: tuple[int, int] | None = None,
        mean: Sequence[float] = OPENAI_DATASET_MEAN,
        std: Sequence[float] = OPENAI_DATASET_STD,
        interpolation: str = "bicubic",
    ) -> PreProcessor:
        """Create a backbone's pre-processor, by default the default one's; see :func:`resize_and_normalise`."""
        return MultiLoaderPreProcessor(resize_and_normalise(image_size or (518, 518), mean, std, interpolation))

    @staticmethod
    def configure_post_processor() -> RsCINPostProcessor:
        """Create the default post-processor."""
        return RsCINPostProcessor()

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Create the default evaluator, with the paper's metrics."""
        return PaperEvaluator()

    @staticmethod
    def configure_visualizer() -> Visualizer:  # type: ignore[override]  # anomalib's own is an ImageVisualizer
        """Create the default visualizer."""
        return FolderVisualizer()

    def configure_callbacks(self) -> list[Callback]:
        """Add the writer to anomalib's components, after the post-processor."""
        listed = super().configure_callbacks()
        given: Any = getattr(trainer_of(self), "callbacks", [])
        is_given = any(isinstance(callback, PredictionWriter) for callback in given)
        if self.prediction_writer and not (self._writes_by_default and is_given):
            listed.append(self.prediction_writer)  # Lightning would drop the one that a user gave to Engine
        return listed

    def on_validation_start(self) -> None:
        """Score the validation pools; what was found without labels is to be found anew."""
        self._calibration.forget(self.post_processor, self._calibration.without_labels)
        super().on_validation_start()

    def pool_scorer(self) -> PoolScorer:
        """Return what scores a pool, once results can be written and there is a bank."""
        if self.visualizer is not None:
            check_writable(Path(getattr(self.visualizer, "output_dir", None) or self.trainer.default_root_dir))
        self.prepare_bank()
        return self.scorer(self._known_range())

    def unclipped(self, batch: ImageBatch, dataloader_idx: int = 0) -> ImageBatch:
        """Return a copy of a batch of the running loop whose scores and maps are in [0, 1] but were never clipped."""
        scores, anomaly_maps = self.predictions(batch, dataloader_idx)  # distances of unit vectors, at most 2
        return batch.update(in_place=False, pred_score=scores / 2, anomaly_map=anomaly_maps / 2)

    def calibrate(self) -> None:
        """Find the thresholds that no labels have given: of the bank where it is all there is, else of the pools."""
        if self.mode == "reference":
            may_hold_defects = self._bank_of == FOLDER
            self._calibration.find_on_bank(self.post_processor, self.model.bank, may_hold_defects=may_hold_defects)
        else:
            self.pools = self._calibration.find_on_pools(self.post_processor, self.pools)

    def forget_thresholds(self) -> None:
        """Make thresholds uncalibrated, as another bank takes the place of what they were found on."""
        self._calibration.forget(self.post_processor)

    def _known_range(self) -> GreyRange | None:
        """Return black and white of images of more than 8 bits, where they are not to be found in the images."""
        if self.grey_range is not None:
            return self.grey_range
        if self.mode != "mutual" and (of_bank := self.model.bank.grey_range) is not None:
            return GreyRange(*of_bank)
        return self._validation_range if self._calibration.is_by_labels(self.post_processor) else None

    def scorer(self, grey_range: GreyRange | None) -> PoolScorer:
        """Return what scores a pool, or extracts references."""
        return PoolScorer(
            ImageScorer(self.trainer, self.model, self.mode, self.memory_budget, self.processes),
            self.batch_size,
            self.transform,
            needs_paths=self.visualizer is not None,
            result_folders=result_folders(self.trainer),
            grey_range=grey_range,
            thumbnail=thumbnail_of if writes_review(self.trainer) else None,
        )

    def pool_report(self) -> PoolReport:
        """Return what is known of the images of the last loop, and what decides, for tables and pages."""
        bank = self.model.bank if self.mode == "reference" else None
        settings = {**self.hparams, "mode": self.mode, **self.model.arguments}
        return report_of_pools(self, self._calibration.rule, bank, settings)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a model, see Lightning's method, without fetching its backbone's weights: the file holds them."""
        read_checkpoint(checkpoint_path)
        if "backbone" not in kwargs:
            kwargs.pop("pretrained", None)  # the file says whose weights it holds
        with skip_download():
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what network this is, with what it compares, and which thresholds no labels have given."""
        super().on_save_checkpoint(checkpoint)
        name = self.hparams.get("backbone")
        if name is not None:  # whose defaults a file or another version may change
            checkpoint["hyper_parameters"] = {**checkpoint["hyper_parameters"], **self.model.arguments}
        if (activation := getattr(self.model.backbone, "activation", None)) is not None:
            checkpoint["activation"] = activation
        checkpoint.update(network=describe_network(self.model, name), scores_are_distances=True)
        checkpoint.update(mode=self.mode, references=self.bank_arguments.given, bank_of=self._bank_of)
        checkpoint.update(self._calibration.to_checkpoint())
        checkpoint["validation_range"] = None if self._validation_range is None else list(self._validation_range)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over with what images are compared, and where the bank and the thresholds came from.

        Raises:
            ValueError: If the checkpoint is of another backbone, image size, activation or mode.
        """
        convert_checkpoint(checkpoint)
        name = self.hparams.get("backbone")
        check_network(checkpoint, describe_network(self.model, name), is_own=name is None)
        take_activation(checkpoint, self.model.backbone, None if name is None else self.hparams)
        self.mode = self.hparams["mode"] = mode_of(checkpoint, self.mode)
        warn_of_kept_bank(checkpoint, self.bank_arguments.given)
        super().on_load_checkpoint(checkpoint)
        self._bank_of = checkpoint.get("bank_of", self._bank_of)
        self._validation_range = check_grey_range(checkpoint.get("validation_range"))
        self._calibration.load_checkpoint(checkpoint, self.post_processor)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a pickled model, of version 0.1 too."""
        super().__setstate__(state)
        if "bank_arguments" not in state:
            convert_post_processor(self.post_processor, self._calibration.without_labels, self.model.bank.raw_scores)

    def make_exportable(self) -> None:
        """Raise a ValueError unless a bank is all there is to compare with; calibrate, in float32."""
        check_exportable(self.model.bank, self.mode)
        self.float()  # Engine(precision="bf16-true") has cast it; images for an export are float32
        self.calibrate()
