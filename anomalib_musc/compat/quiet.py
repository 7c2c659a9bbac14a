# SPDX-License-Identifier: Apache-2.0
"""Messages of other packages that say nothing to who predicts images.

anomalib 2.7.0 and Lightning 2.6 tell of devices that are not there, of weights that "will not be loaded" where a model
has its own, of pin_memory and of the number of workers; some of it twice.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_LOGGERS = (None, "anomalib", "lightning.fabric", "lightning.pytorch", "lightning_fabric", "pytorch_lightning", "timm")


@contextmanager
def quiet() -> Iterator[list[str]]:
    """Let other packages log errors only, and warn of nothing; yields the texts of our own warnings as they come."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    ours: list[str] = []

    def keep(message: Warning | str, category: type[Warning], filename: str, *rest: object) -> None:
        del category, rest
        if Path(filename).resolve().is_relative_to(_PACKAGE) and str(message) not in ours:
            ours.append(str(message))

    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = keep  # type: ignore[assignment]
            yield ours
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
