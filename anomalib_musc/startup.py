# SPDX-License-Identifier: Apache-2.0
"""Import the zoo as soon as anomalib's models have been imported, and never anything before.

``anomalib_musc.pth`` puts a finder on ``sys.meta_path`` when an interpreter starts; it imports nothing, and calls
:func:`watch` once one of the modules below, or one of this package, is about to be imported. Where a module of this
package is what imports anomalib's, the zoo waits until that is complete, as it may need it.
"""

import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, cast

_FOLLOWED_BY = {
    "anomalib.models": "anomalib_musc.zoo",
    "anomalib.cli.pipelines": "anomalib_musc.compat.mixed_benchmark",
    "anomalib.cli.cli": "anomalib_musc.command_line",
}
_due: list[str] = []
_running: list[str] = []  # modules of this package that are being imported
_searching: set[str] = set()


class _ReportingLoader:
    """Load a module with another loader, and import what is to follow it, once no module of ours is half imported."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        if name.startswith("anomalib_musc."):
            _running.append(name)
        try:
            self._loader.exec_module(module)
        finally:
            if name in _running:
                _running.remove(name)
        if name in _FOLLOWED_BY:
            _due.append(_FOLLOWED_BY[name])
        while _due and not _running:
            _import(_due.pop(0))


def watch(name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
    """Find a module as the other finders do, with a loader that imports what is to follow it.

    Args:
        name: Full name of the module.
        path: Where its package says to look, as ``find_spec`` takes it.
        target: As ``find_spec`` takes it.

    Returns:
        The spec; or ``None``, which leaves the module to the other finders, where anything is unusual, or where
        ``ANOMALIB_MUSC_ZOO`` is set to 0, false, no or off in the environment.
    """
    if os.environ.get("ANOMALIB_MUSC_ZOO", "").lower() in {"0", "false", "no", "off"} or name in _searching:
        return None
    _searching.add(name)
    try:
        finders = [finder for finder in sys.meta_path if hasattr(finder, "find_spec")]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)
        if spec is None or not (hasattr(spec.loader, "create_module") and hasattr(spec.loader, "exec_module")):
            return None
        spec.loader = cast("Loader", _ReportingLoader(spec.loader))
    except Exception:  # whatever it is, the other finders may do without us
        return None
    finally:
        _searching.discard(name)
    return spec


def _import(name: str) -> None:
    try:
        import_module(name)
    except Exception as error:  # whatever it is, importing anomalib must go on
        logging.getLogger(__name__).warning("MuSc could not join anomalib: %s raised %r", name, error)
