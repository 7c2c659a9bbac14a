# SPDX-License-Identifier: Apache-2.0
"""Distances between the patches of all images of a pool, within a memory budget; torch the only dependency.

:func:`nearest_distances` is the way in. Nothing here knows what the distances are for.

Images are held in tiles on the compute device (``tiles.py``), each pair of them is multiplied once (``comparison.py``
with one of ``kernels/``, or ``same_place.py``, where patches are sought near their own place), what is too small for
products again in float64 (``recomputing.py``), and the distances go to a buffer: on the device, on the host, or in a
temporary file (``storage.py``), as ``plan.py`` divides the budget. Where several processes hold the images
(``processes.py``), each one's visit the others (``ring.py``).
"""

from anomalib_musc.distances.full_precision import full_precision
from anomalib_musc.distances.kernels import Precision, check_precision
from anomalib_musc.distances.nearest import (
    check_degrees,
    check_search_radius,
    estimate_seconds,
    least_memory,
    nearest_distances,
)
from anomalib_musc.distances.processes import Processes, ProcessFailedError, gathered, together
from anomalib_musc.distances.ring import Shares
from anomalib_musc.distances.storage import MemoryBudgetError, check_budget

__all__ = [
    "MemoryBudgetError",
    "Precision",
    "ProcessFailedError",
    "Processes",
    "Shares",
    "check_budget",
    "check_degrees",
    "check_precision",
    "check_search_radius",
    "estimate_seconds",
    "full_precision",
    "gathered",
    "least_memory",
    "nearest_distances",
    "together",
]
