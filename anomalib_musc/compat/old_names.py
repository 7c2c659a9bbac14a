# SPDX-License-Identifier: Apache-2.0
"""Modules under the names that they had in version 0.1, which its torch exports hold, as they are pickles."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_PACKAGE = __name__.split(".")[0]
_MOVED = {
    "bank": ["memory_bank.bank"],
    "calibration": ["decision.calibration"],
    "exportable_resize": ["compat.exportable_resize"],
    "prediction_writer": ["output.prediction_writer"],
    "workarounds": ["compat.pre_processor", "output.visualizer"],
}


class _OldNames(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == _PACKAGE and name in _MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        for home in _MOVED[module.__name__.partition(".")[2]]:
            found = vars(import_module(f"{_PACKAGE}.{home}"))
            vars(module).update({name: value for name, value in found.items() if not name.startswith("__")})


def install() -> None:
    """Let the old names be imported; nothing is imported before."""
    sys.meta_path.append(_OldNames())
