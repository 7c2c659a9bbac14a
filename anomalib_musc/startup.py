# SPDX-License-Identifier: Apache-2.0
"""Import the zoo as soon as anomalib's models have been imported, and never anything before.

``anomalib_musc.pth`` puts a finder on ``sys.meta_path`` when an interpreter starts; it imports nothing, and calls
:func:`watch` once one of the two modules below is about to be imported.
"""

import logging
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

# The zoo needs both, and either may be imported first, the second then in the middle of the first.
_TRIGGERS = ("anomalib.models", "anomalib_musc.lightning_model")
_loaded: set[str] = set()
_searching: set[str] = set()


def watch(name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
    """Find a module of ``_TRIGGERS`` as the other finders do, with a loader that imports the zoo when it is done.

    Args:
        name: Full name of the module.
        path: Where its package says to look, as ``find_spec`` takes it.
        target: As ``find_spec`` takes it.

    Returns:
        The spec, or ``None``, which leaves the module to the other finders, where ``ANOMALIB_MUSC_ZOO=0`` is set in
        the environment.
    """
    if os.environ.get("ANOMALIB_MUSC_ZOO") == "0" or name in _searching:
        return None
    _searching.add(name)
    try:
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path)
        spec = next((spec for spec in specs if spec is not None), None)
    finally:
        _searching.discard(name)
    if spec is None or spec.loader is None:
        return spec
    load = spec.loader.exec_module

    def exec_module(module: ModuleType) -> None:
        load(module)
        _loaded.add(name)
        if _loaded.issuperset(trigger for trigger in _TRIGGERS if trigger in sys.modules):
            _import_zoo()  # else the other one is still being imported, and comes here when it is done

    vars(spec.loader)["exec_module"] = exec_module  # this loader's alone, before the class's
    return spec


def _import_zoo() -> None:
    try:
        import anomalib_musc.zoo  # noqa: F401
    except Exception as error:  # whatever it is, importing anomalib must go on
        logging.getLogger(__name__).warning("MuSc could not join anomalib's model zoo: %r", error)
