# SPDX-License-Identifier: Apache-2.0
"""The command's run of anomalib's Engine, which writes table, page and pictures."""

import argparse
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from anomalib.engine import Engine
from lightning.pytorch.callbacks import Callback, RichProgressBar

from anomalib_musc.compat.quiet import quiet
from anomalib_musc.inference.inputs import gather
from anomalib_musc.inference.run import accelerator_of, check_number, make_model, with_common_size
from anomalib_musc.output.prediction_writer import PredictionWriter


def predict_files(paths: list[Path], arguments: argparse.Namespace) -> PredictionWriter:
    """Predict files and folders as the command's arguments say; returns what was written."""
    messages: AbstractContextManager[list[str]] = nullcontext([]) if arguments.verbose else quiet()
    with messages as warned:
        inputs = gather(paths, "IMAGES")
        check_number(inputs, is_alone=arguments.references is None and arguments.checkpoint is None)
        writer = PredictionWriter(
            heatmaps=arguments.heatmaps,
            review=not arguments.no_review,
            summary=not arguments.quiet,
            threshold_argument="--threshold",
        )
        options: dict[str, Any] = {
            "image_size": arguments.image_size,
            "tile_size": arguments.tile_size,
            "search_radius": arguments.search_radius,
            "precision": "fast" if arguments.fast else None,
            "references": None if arguments.references is None else str(arguments.references),
            "mode": None if arguments.references is None else "reference",
            "prediction_writer": writer,
        }
        decision = {
            "image_sensitivity": arguments.sensitivity,
            "contamination": arguments.contamination,
            "image_threshold": arguments.threshold,
        }
        options = with_common_size(options, inputs, arguments.checkpoint)
        model = make_model(arguments.backbone, arguments.checkpoint, decision, **options)
        callbacks: list[Callback] = [] if arguments.quiet else [RichProgressBar(console_kwargs={"stderr": True})]
        engine = Engine(
            callbacks=callbacks,
            default_root_dir=arguments.output,
            accelerator=accelerator_of(arguments.device),
            devices=1,  # Lightning takes all, and starts the command once for each
            logger=False,
            enable_progress_bar=not arguments.quiet,
        )
        try:
            engine.predict(model, dataset=inputs.dataset, return_predictions=False)
        except SystemExit:
            if engine.trainer.interrupted:  # whose own status says nothing
                raise KeyboardInterrupt from None
            raise
    for text in warned:
        if text not in writer.warnings:  # which the summary has said
            sys.stderr.write(f"warning: {text}\n")
    return writer
