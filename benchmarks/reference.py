# SPDX-License-Identifier: Apache-2.0
"""One image at a time against banks of references: ``python benchmarks/reference.py``.

Latency, memory of the bank and sizes of the exports, beside anomalib's AnomalyDINO and PatchCore in the same run on the
same images. MuSc and AnomalyDINO have the same backbone with random weights; speed does not depend on them.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from anomalib.models.components import AnomalibModule
from anomalib.models.image.anomaly_dino.torch_model import AnomalyDINOModel
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from mutual_scoring import processor
from torch import nn

from anomalib_musc import MuSc
from anomalib_musc.memory_bank.bank import ReferenceBank

BACKBONE, SIDE = "vit_small_patch14_dinov2", 224
BANKS = (4, 16, 64)
REPEATS, SCORING_REPEATS = 5, 30


class SameBackboneDINO(AnomalyDINOModel):
    """anomalib's AnomalyDINO with features of ours, as its own weights cannot be had without a network."""

    def __init__(self, backbone: nn.Module) -> None:
        nn.Module.__init__(self)
        self.num_neighbours, self.masking, self.coreset_subsampling, self.patch_size = 1, False, False, 14
        self.backbone = backbone
        self.register_buffer("memory_bank", torch.empty(0))
        self.embedding_store: list[torch.Tensor] = []
        self.anomaly_map_generator = lambda scores, size: nn.functional.interpolate(scores, size, mode="bilinear")

    def extract_features(self, image_tensor: torch.Tensor) -> torch.Tensor:
        """Return the patches of the last layer, shape ``(B, L, C)``."""
        return self.backbone(image_tensor)[0][-1].flatten(2).transpose(1, 2)


def seconds(work: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Return the median of some runs after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def bytes_of(module: nn.Module) -> int:
    """Return the memory of all buffers."""
    return sum(buffer.nbytes for buffer in module.buffers())


def export_sizes(model: AnomalibModule) -> dict[str, int]:
    """Return the sizes of a model's exports in bytes."""
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, export in (("torch", model.to_torch), ("onnx", model.to_onnx), ("openvino", model.to_openvino)):
            try:
                target = Path(export(folder))
            except ModuleNotFoundError:
                continue
            sizes[name] = sum(path.stat().st_size for path in target.parent.iterdir())
    return sizes


@torch.no_grad()
def measure(size: int) -> dict[str, Any]:
    """Measure one size of the bank."""
    generator = torch.Generator().manual_seed(0)
    references, image = torch.rand(size, 3, SIDE, SIDE, generator=generator), torch.rand(1, 3, SIDE, SIDE)
    torch.manual_seed(0)
    musc = MuSc(BACKBONE, pretrained=False, image_size=SIDE, mode="reference").eval()
    musc.model.build_bank(references.split(8))
    maps, _ = musc.model.extract(image)
    row: dict[str, Any] = {"references": size, "bank_bytes": bytes_of(musc.model.bank)}
    row["extraction"] = seconds(lambda: musc.model.extract(image))
    row["musc"] = seconds(lambda: musc(image))
    single = ReferenceBank((1,), (0.0, 0.3))
    single.fill(musc.model.bank.feature_maps[-1:], musc.model.bank.class_tokens, musc.model.bank.raw_scores)
    row["scoring_musc_one_layer_one_degree"] = seconds(lambda: single.patch_scores(maps[-1:]), SCORING_REPEATS)
    row["scoring_musc_all"] = seconds(lambda: musc.model.bank.patch_scores(maps))

    dino = SameBackboneDINO(musc.model.backbone)
    for batch in references.split(8):
        dino.train()(batch)
    dino.fit()
    dino.eval()
    row["anomaly_dino"] = seconds(lambda: dino(image))
    features = dino.extract_features(image)
    dino.extract_features = lambda _: features  # type: ignore[method-assign]
    row["scoring_anomaly_dino"] = seconds(lambda: dino(image), SCORING_REPEATS)

    patchcore = PatchcoreModel(layers=("layer2", "layer3"), backbone="resnet18", pre_trained=False)
    for batch in references.split(8):
        patchcore.train()(batch)
    patchcore.subsample_embedding(0.1)
    patchcore.eval()
    row["patchcore"] = seconds(lambda: patchcore(image))
    if size == BANKS[1]:
        row["exports"] = export_sizes(musc)
    return row


def main() -> None:
    """Print a table and write the numbers as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report: dict[str, Any] = {"device": processor(), "threads": torch.get_num_threads(), "rows": []}
    print(f"{report['device']}, {report['threads']} threads, torch {torch.__version__}, {BACKBONE} at {SIDE}")
    print(
        "| references | bank | MuSc | of it extraction | AnomalyDINO | PatchCore | "
        "scoring, one reference and layer: MuSc | AnomalyDINO |\n|---|---|---|---|---|---|---|---|"
    )
    for size in BANKS:
        row = measure(size)
        report["rows"].append(row)
        milliseconds = [row[key] * 1e3 for key in ("musc", "extraction", "anomaly_dino", "patchcore")]
        each = [row[key] / size * 1e6 for key in ("scoring_musc_one_layer_one_degree", "scoring_anomaly_dino")]
        cells = [f"{value:.0f} ms" for value in milliseconds] + [f"{value:.0f} µs" for value in each]
        print(f"| {size} | {row['bank_bytes'] / 2**20:.0f} MiB | {' | '.join(cells)} |", flush=True)
        if "exports" in row:
            report["exports"] = row["exports"]
    print("exports with 16 references:", {name: f"{size / 2**20:.0f} MiB" for name, size in report["exports"].items()})
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
