# SPDX-License-Identifier: Apache-2.0
"""MuSc in anomalib's model zoo; importing this module registers it.

anomalib 2.7.0 has no plugin entry point: its CLI and ``get_model`` find a model by its bare name only once its class
exists and is an attribute of ``anomalib.models``. :mod:`anomalib_musc.startup` imports this module at the right moment.
"""

import anomalib.data
import anomalib.models
from anomalib.data import MVTecAD

from anomalib_musc.lightning_model import MuSc


class MVTec(MVTecAD):
    """MVTec AD under the name that commands and tutorials use; anomalib's own name for it is ``MVTecAD``."""


anomalib.models.MuSc = MuSc  # type: ignore[attr-defined]
anomalib.models.ALLOWED_MODULES.add("anomalib_musc")
anomalib.data.MVTec = MVTec  # type: ignore[attr-defined]
for module, name in ((anomalib.models, "MuSc"), (anomalib.data, "MVTec")):
    if name not in module.__all__:
        module.__all__.append(name)
