# SPDX-License-Identifier: Apache-2.0
"""MuSc beside PatchCore on one's own images: PatchCore learns from normal ones, MuSc is given the test images alone.

    python examples/beside_patchcore.py path/to/good path/to/test/good path/to/test/defective

PatchCore's backbone comes from a hub; without a network, ``--random`` runs it with random weights.
"""

import argparse

from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import Patchcore

from anomalib_musc import MuSc


def main() -> None:
    """Test both on the same images, and print their image metrics."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train", help="normal images to learn from")
    parser.add_argument("good", help="normal images to test")
    parser.add_argument("defective", help="defective images to test")
    parser.add_argument("--random", action="store_true", help="random weights for PatchCore")
    arguments = parser.parse_args()
    data = Folder(
        "product",
        normal_dir=arguments.train,
        normal_test_dir=arguments.good,
        abnormal_dir=arguments.defective,
        val_split_mode="same_as_test",
        num_workers=0,
    )
    patchcore = Patchcore(backbone="resnet18", pre_trained=not arguments.random, visualizer=False)
    for model in (MuSc("musc-tiny", visualizer=False), patchcore):
        engine = Engine(logger=False)
        if isinstance(model, Patchcore):
            engine.fit(model, datamodule=data)
        (metrics,) = engine.test(model, datamodule=data, verbose=False)
        figures = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items() if name.startswith("image"))
        print(f"{model.name}: {figures}")


if __name__ == "__main__":
    main()
