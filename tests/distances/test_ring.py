# SPDX-License-Identifier: Apache-2.0
"""Images that several processes hold: real ones, against a search in float64 and one process."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from seeded import assert_close, randn, to_numpy
from together import results, run_together
from torch import distributed

from anomalib_musc.distances import Processes, ProcessFailedError, Shares, nearest_distances
from anomalib_musc.functional import layer_scores

Case = tuple[int, dict[str, Any]]
CASES: list[Case] = [
    (2, {}),
    (3, {}),
    (9, {}),
    (9, {"degrees": (3,), "interval": (0.2, 0.7)}),
    (8, {"second_interval": (0.4, 0.7)}),
    (7, {"search_radius": 1}),
    (9, {"memory_budget": 0.0005}),
    (10, {"memory_budget": 0.0005, "search_radius": 1}),
    (6, {"precision": "fast"}),
]


@given(st.lists(st.integers(0, 7), min_size=1, max_size=9))
def test_every_pair_meets_once(sizes):
    names = [(rank, image) for rank, size in enumerate(sizes) for image in range(size)]
    met = [frozenset(pair) for rank, size in enumerate(sizes) for pair in _own_pairs(rank, size)]
    for rank in range(len(sizes)):
        shares = Shares(tuple(sizes), rank)
        for step in shares.steps:
            source = (rank - step) % len(sizes)
            visitors = [(source, image) for image in shares.visiting(source, step)]
            met += [frozenset([(rank, image), other]) for image in shares.visited(rank, step) for other in visitors]
    assert len(met) == len(set(met)) == len(names) * (len(names) - 1) // 2
    assert sum(Shares(tuple(sizes), rank).num_pairs() for rank in range(len(sizes))) == len(met)


def _own_pairs(rank: int, size: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    return [((rank, i), (rank, j)) for i in range(size) for j in range(i)]


@given(st.integers(1, 9), st.integers(1, 12))
def test_no_process_compares_much_more_than_another(number, size):
    pairs = [Shares((2 * size,) * number, rank).num_pairs() for rank in range(number)]
    assert max(pairs) == min(pairs)


def maps_of(num_images: int) -> torch.Tensor:
    """Maps with some patches in common, all but equal, and a scale that differs by image."""
    maps = randn(num_images, 8, 5, 4, seed=num_images) + 3
    maps[:, :, :2, :2] = maps[:1, :, :2, :2] + 1e-3 * randn(num_images, 8, 2, 2, seed=1)
    return maps * torch.linspace(0.5, 2, num_images).view(-1, 1, 1, 1)


def score_shares(cases: Sequence[Case]) -> list[torch.Tensor]:
    distributed.init_process_group("gloo")
    processes = Processes()
    found = []
    for num_images, others in cases:
        counts: list[int] = []
        share = maps_of(num_images)[processes.rank :: processes.size]
        arguments = {"degrees": (1, 3), **others}
        found.append(layer_scores(share, processes=processes, progress=counts.append, **arguments))
        sizes = tuple(len(range(rank, num_images, processes.size)) for rank in range(processes.size))
        assert sum(counts) == len(arguments["degrees"]) * Shares(sizes, processes.rank).num_pairs()
    return found


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def shares(request, tmp_path_factory) -> list[list[torch.Tensor]]:
    """What each process has found of its share, case by case."""
    return results(score_shares, CASES, number=request.param, cwd=tmp_path_factory.mktemp("ring"))


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: str(CASES[number]))
def test_processes_score_as_one_does(number, shares):
    num_images, arguments = CASES[number]
    expected = layer_scores(maps_of(num_images), **{"degrees": (1, 3), **arguments, "memory_budget": None})
    tolerance = 1e-2 if "precision" in arguments else 1e-5
    for rank, found in enumerate(shares):
        torch.testing.assert_close(found[number], expected[rank :: len(shares)], atol=tolerance, rtol=0)


def test_processes_score_as_the_oracle_does(shares):
    maps = to_numpy(maps_of(9)).astype(np.float64)
    expected = np.mean([oracle.mutual_scores(oracle.lnamd(maps, degree)) for degree in (1, 3)], axis=0)
    for rank, found in enumerate(shares):
        assert_close(found[2], expected[rank :: len(shares)], 1e-4)


def spoil_one(kind: str) -> str:
    distributed.init_process_group("gloo")
    processes = Processes()
    maps = maps_of(4)[processes.rank :: processes.size]
    prepare = None
    if processes.rank == 1:
        if kind == "nan":
            maps[0, 0, 0, 0] = torch.nan
        elif kind == "prepare":
            prepare = torch.log  # of negative numbers
            maps = -maps.abs()
    budget = 1e-9 if kind == "budget" and processes.rank == 1 else None
    compared = []

    def progress(pairs: int) -> None:
        compared.append(pairs)
        if kind == f"compared {len(compared)}" and processes.rank == 1:
            msg = "no room on the disk"
            raise OSError(msg)

    try:
        list(
            nearest_distances(
                maps, (1, 3), prepare=prepare, memory_budget=budget, processes=processes, progress=progress
            )
        )
    except (ValueError, OSError, ProcessFailedError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("nan", "NaN"),
        ("prepare", "finite once prepared"),
        ("budget", "memory_budget must be"),
        ("compared 1", "no room on the disk"),  # among its own images
        ("compared 2", "no room on the disk"),  # with those that visit
    ],
)
def test_an_error_in_one_process_is_raised_in_all(kind, words, tmp_path):
    first, second = results(spoil_one, kind, number=2, cwd=tmp_path)
    assert second.startswith(("ValueError", "MemoryBudgetError", "OSError"))
    assert first.startswith("ProcessFailedError: Process 1 of 2 failed: ")
    assert words in first
    assert words in second


def die() -> None:
    distributed.init_process_group("gloo")
    processes = Processes()

    def prepare(maps: torch.Tensor) -> torch.Tensor:
        if processes.rank == 1:
            raise SystemExit(3)
        return maps

    list(nearest_distances(maps_of(4), (1, 3), prepare=prepare, processes=processes))


def test_a_process_that_dies_ends_the_others(tmp_path):
    first, _ = run_together(die, number=2, cwd=tmp_path)
    assert first.returncode != 0
    assert "closed by peer" in first.stderr.lower() or "connection" in first.stderr.lower()


def cancelling_windows() -> torch.Tensor:
    """In one process, patches cancel their neighbours, so that degrees are compared one by one in all."""
    distributed.init_process_group("gloo")
    processes = Processes()
    return layer_scores(cancelling()[processes.rank :: processes.size], (1, 3), processes=processes)


def cancelling() -> torch.Tensor:
    maps = randn(4, 8, 5, 4)
    maps[3, :, 1, 1] = -maps[3, :, 1, 0] - maps[3, :, 1, 2] - maps[3, :, 0].sum(dim=1) * 0
    maps[3, :, :3, :3] = 0
    maps[3, :, 1, 1], maps[3, :, 1, 2] = 1.0, -1.0 + 1e-4
    return maps


def test_windows_that_cancel_in_one_process(tmp_path):
    expected = layer_scores(cancelling(), (1, 3))
    for rank, found in enumerate(results(cancelling_windows, number=2, cwd=tmp_path)):
        torch.testing.assert_close(found, expected[rank::2], atol=1e-4, rtol=0)


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match="init_process_group"):
        Processes()
