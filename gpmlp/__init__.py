"""gpmlp turns ab initio data into a potential energy surface: a sparse Gaussian process over SOAP power spectra.

    import gpmlp
    structures, targets = gpmlp.read("train.xyz")
    potential, report = gpmlp.fit(structures, targets)
    gpmlp.save(potential, "silicon.gpmlp")

Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
import os
import sys
import types

# MKL's products with vectors depend in the last digits on where memory happens to lie, unless told not to: then a run that is
# resumed, in another process, would not repeat. Read by MKL at its first product; costs nothing that can be measured.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

_HOMES = {
    "Potential": "gpmlp.potential",
    "Prediction": "gpmlp.quantities",
    "Structures": "gpmlp.structures",
    "Targets": "gpmlp.quantities",
    "load": "gpmlp.io.archive",
    "read": "gpmlp.io.atoms",
    "save": "gpmlp.io.archive",
}

__all__ = ["Potential", "Prediction", "Structures", "Targets", "fit", "load", "read", "save"]


def __getattr__(name: str) -> object:
    if name == "__version__":
        return importlib.import_module("gpmlp.versions").of("gpmlp")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'gpmlp' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


class _Package(types.ModuleType):
    """The package, in which `fit` is the function even after its home, the submodule gpmlp.fit, has been imported."""

    @property
    def fit(self):
        return sys.modules["gpmlp.fit"].fit if "gpmlp.fit" in sys.modules else importlib.import_module("gpmlp.fit").fit

    @fit.setter
    def fit(self, module: types.ModuleType) -> None:
        """The import system binds submodules to their package; the name stays the function's."""


sys.modules[__name__].__class__ = _Package
