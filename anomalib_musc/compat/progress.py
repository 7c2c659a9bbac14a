# SPDX-License-Identifier: Apache-2.0
"""A bar of our own on whichever progress bar Lightning's trainer shows, and times in its profiler.

Lightning 2.6 ends a ``RichProgressBar`` at teardown: what a callback prints before comes ahead of the bar's last state
where output goes to a file.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from math import isfinite
from typing import Any, TypeVar

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.profilers import Profiler

Item = TypeVar("Item")


def profile(trainer: Trainer, action: str) -> AbstractContextManager[None]:
    """Let the trainer's profiler time what is done under this name."""
    profiler: Profiler = trainer.profiler  # type: ignore[attr-defined]  # which Lightning sets where mypy cannot see
    return profiler.profile(action)


def profiled(trainer: Trainer, action: str, items: Iterable[Item]) -> Iterator[Item]:
    """Iterate, and let the trainer's profiler time how long each item takes to come."""
    iterator, end = iter(items), object()
    while True:
        with profile(trainer, action):
            item: Any = next(iterator, end)
        if item is end:
            return
        yield item


@contextmanager
def progress_bar(trainer: Trainer, description: str, total: float) -> Iterator[Callable[[int], object]]:
    """Show one more bar in the style of the trainer's own; nothing where that is switched off.

    Args:
        trainer: The running trainer.
        description: What the work is.
        total: Number of steps, infinite if unknown.

    Yields:
        A function that advances the bar by a number of steps.
    """
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar) and bar.is_enabled and bar.progress is not None:
        progress = bar.progress
        task = progress.add_task(description, total=total)

        def advance(steps: int) -> None:
            progress.advance(task, steps)
            bar.refresh()

        yield advance
        progress.stop_task(task)
        bar.refresh()
    elif isinstance(bar, TQDMProgressBar) and not bar.is_disabled:
        with Tqdm(
            desc=description, total=total if isfinite(total) else None, file=sys.stdout, dynamic_ncols=True, leave=True
        ) as tqdm:
            yield tqdm.update
    else:
        yield lambda _steps: None


def end_progress_bar(trainer: Trainer) -> None:
    """Show the last state of a trainer's bars, so that what is printed comes after it."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar):
        bar._stop_progress()
