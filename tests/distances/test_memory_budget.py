# SPDX-License-Identifier: Apache-2.0
"""A budget of memory decides where things are held, and changes no result."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import oracle
import pytest
import torch
from torch.testing import assert_close

from anomalib_musc.distances import MemoryBudgetError, least_memory
from anomalib_musc.distances.plan import make_plan, make_workloads
from anomalib_musc.distances.storage import GIB, file_tensor, free_host_memory, release
from anomalib_musc.functional import layer_scores, mutual_scores

CPU = torch.device("cpu")
DEGREES = (1, 3)
FACTORS = (1, 1.2, 2, 3, 5, 20, 1000)  # of the least budget


def maps(num_images: int, channels: int, height: int = 6, width: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(channels)
    common = torch.randn(1, channels, height, width, generator=generator)
    return common + torch.randn(num_images, channels, height, width, generator=generator)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("channels", [24, 256], ids=["few channels", "many channels"])
def test_a_budget_changes_nothing(channels, precision):
    features = maps(13, channels)
    expected = layer_scores(features, DEGREES, precision=precision)
    least = least_memory(features.shape, DEGREES, precision, CPU) / GIB
    for factor in FACTORS:
        scores = layer_scores(features, DEGREES, precision=precision, memory_budget=least * factor)
        assert_close(scores, expected, rtol=0, atol=2e-6)
    by_equations = sum(oracle.mutual_scores(oracle.lnamd(features.numpy(), degree), (0, 0.3)) for degree in DEGREES)
    atol = 1e-4 if precision == "exact" else 4e-3
    assert_close(expected.double(), torch.from_numpy(by_equations) / 2, rtol=0, atol=atol)


@pytest.mark.parametrize("channels", [24, 256])
def test_budgets_lead_to_every_kind_of_plan(channels):
    (workload, *_) = make_workloads((13, 30, channels), DEGREES, "exact", torch.empty(0))
    plans = [make_plan(workload, workload.least_bytes * factor / GIB) for factor in FACTORS]
    assert plans[0].device is None  # a file
    assert plans[0].tile == plans[0].chunk == plans[0].block == 1
    assert plans[-1].device == CPU
    assert plans[-1].tile == plans[-1].chunk == plans[-1].block == 13
    assert any(1 < plan.tile < 13 for plan in plans)


def test_no_plan_exceeds_its_budget():
    shapes = [(40, 784, 256), (20, 784, 64), (2000, 16, 8), (9, 1369, 1024), (3, 1, 8), (400, 16, 512), (2, 9, 2000)]
    for shape in shapes:
        for workload in make_workloads(shape, DEGREES, "exact", torch.empty(0)):
            for factor in (1, 1.01, 1.1, 1.3, 1.7, 2.5, 4, 10, 100):
                budget = workload.least_bytes * factor
                plan = make_plan(workload, budget / GIB)
                held = plan.chunk * workload.pair_bytes + workload.loading_bytes
                distances = shape[0] ** 2 if plan.device else 2 * plan.tile**2
                tiles = plan.tile if plan.tile == shape[0] else 2 * plan.tile
                comparing = tiles * workload.image_bytes + distances * workload.distances_bytes
                comparing += plan.block * workload.row_bytes  # the last block of the degree before
                kept = distances * workload.distances_bytes if plan.device else 0
                sorting = kept + plan.block * workload.sorting_bytes
                assert held + max(comparing, sorting) <= budget * 1.001, (shape, factor, plan)


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_too_small_a_budget_names_the_least_that_would_do(precision):
    features = torch.nn.functional.normalize(maps(7, 8).flatten(2).mT, dim=-1)
    with pytest.raises(MemoryBudgetError, match=r"memory_budget must be at least 0.001 GiB .* got 0.000") as caught:
        mutual_scores(features, precision=precision, memory_budget=1e-9)
    least = caught.value.least / GIB
    with pytest.raises(MemoryBudgetError):
        mutual_scores(features, precision=precision, memory_budget=0.999 * least)
    scores = mutual_scores(features, precision=precision, memory_budget=least)
    assert_close(scores, mutual_scores(features, precision=precision), rtol=0, atol=2e-6)


@pytest.mark.parametrize("budget", [0, -1, float("nan"), float("inf")])
def test_a_budget_is_a_positive_number(budget):
    with pytest.raises(ValueError, match="memory_budget must be a positive number of GiB"):
        mutual_scores(torch.ones(3, 4, 2), memory_budget=budget)


def test_a_tensor_in_a_file_is_a_tensor():
    tensor = file_tensor((3, 4), torch.float32)
    tensor.copy_(torch.arange(12.0).view(3, 4))
    release(tensor[1:])
    assert tensor.sum() == 66
    release(torch.ones(3))  # which is in no file


def test_free_memory_is_that_of_this_machine():
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 2**26 < free_host_memory() < pages


SCRIPT = """
    import os, resource, signal, sys, threading
    from pathlib import Path
    import torch
    from anomalib_musc.functional import layer_scores, mutual_scores
    from anomalib_musc.distances.storage import GIB

    torch.set_num_threads(1)
    features = torch.nn.functional.normalize(torch.randn(150, 256, 32), dim=-1)
    mutual_scores(features[:4])  # loads what the libraries load once
    BUDGET = 48 * 2**20
"""


def run(script: str, temporary: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TMPDIR": str(temporary)}
    code = textwrap.dedent(SCRIPT) + textwrap.dedent(script)
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize(
    "work",
    [
        "mutual_scores(features, memory_budget=BUDGET / GIB)",
        "layer_scores(maps, (1, 3), memory_budget=BUDGET / GIB)",
        "layer_scores(wide_maps, (1, 3, 5), (0, 50), memory_budget=BUDGET / GIB)",
        "layer_scores(maps, (1, 3), search_radius=2, memory_budget=BUDGET / GIB)",
        "layer_scores(wide_maps, (1, 3), search_radius=1, precision='fast', memory_budget=BUDGET / GIB)",
    ],
    ids=["patches", "one degree after the other", "all degrees together", "same places", "same places, fast"],
)
def test_the_peak_stays_within_the_budget(tmp_path, work):
    done = run(
        f"""
        maps, wide_maps = features.mT.reshape(150, 32, 16, 16), torch.randn(60, 256, 16, 16)
        layer_scores(maps[:4]), layer_scores(wide_maps[:4])
        def status(field):
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        {work}
        print((status("VmHWM") - before) / BUDGET)
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert 0.3 < float(done.stdout) < 1.1


def test_a_kill_leaves_nothing_behind(tmp_path):
    done = run(
        """
        def kill(pairs):
            os.kill(os.getpid(), signal.SIGKILL)

        mutual_scores(features, memory_budget=BUDGET / GIB, progress=kill)
        """,
        tmp_path,
    )
    assert done.returncode == -9
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def interrupt(_pairs: int) -> None:
        raise KeyboardInterrupt

    features = maps(13, 24)
    least = least_memory(features.shape, DEGREES, "exact", CPU) / GIB
    with pytest.raises(KeyboardInterrupt):
        layer_scores(features, DEGREES, memory_budget=least, progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_no_room_for_files_is_said_before_the_work(tmp_path):
    done = run(
        """
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        mutual_scores(features, memory_budget=BUDGET / GIB, progress=lambda pairs: print("worked"))
        """,
        tmp_path,
    )
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("OSError")
    assert "TMPDIR" in message
    assert str(tmp_path) in message
    assert "worked" not in done.stdout
    assert not list(tmp_path.iterdir())
