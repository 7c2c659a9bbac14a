# SPDX-License-Identifier: Apache-2.0
"""MuSc in anomalib's model zoo; importing this module registers it.

anomalib 2.7.0 has no plugin entry point: its CLI and ``get_model`` find a model by its bare name only once its class
exists and is an attribute of ``anomalib.models``. :mod:`anomalib_musc.startup` imports this module at the right moment.
"""

from importlib import import_module

from anomalib.data import MVTecAD

from anomalib_musc.lightning_model import MuSc


class MVTec(MVTecAD):
    """MVTec AD under the name that commands and tutorials use; anomalib's own name for it is ``MVTecAD``."""

    @property
    def name(self) -> str:  # type: ignore[override]  # Lightning's is a plain attribute
        """Anomalib's name, so that the results of one dataset lie in one folder."""
        return "MVTecAD"


# Not by attribute of the package, which is set only when a module's import, that may be going on, has ended.
for home, member in (("anomalib.models", MuSc), ("anomalib.data", MVTec)):
    module = import_module(home)
    setattr(module, member.__name__, member)
    if member.__name__ not in module.__all__:
        module.__all__.append(member.__name__)
import_module("anomalib.models").ALLOWED_MODULES.add("anomalib_musc")
