"""gpmlp turns ab initio data into a potential energy surface: a sparse Gaussian process over SOAP power spectra.

    import gpmlp
    structures, targets = gpmlp.read("train.xyz")
    potential, report = gpmlp.fit(structures, targets)
    gpmlp.save(potential, "silicon.gpmlp")

Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
import importlib.abc
import os
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType

# MKL's products with vectors depend in the last digits on where memory happens to lie, unless told not to: then a run that is
# resumed, in another process, would not repeat. Read by MKL at its first product; costs nothing that can be measured.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

_HOMES = {
    "GPMinimizer": "gpmlp.learning.paths.minimizer",
    "GPNEB": "gpmlp.learning.paths.band",
    "GPReactionNetwork": "gpmlp.learning.paths.network",
    "GPSaddle": "gpmlp.learning.paths.saddle",
    "PartitionedCalculator": "gpmlp.properties.partitioned",
    "Potential": "gpmlp.potential.potential",
    "Prediction": "gpmlp.core.quantities",
    "Recipe": "gpmlp.recipe",
    "Structures": "gpmlp.core.structures",
    "Targets": "gpmlp.core.quantities",
    "allow_calculator": "gpmlp.potential.calculator_energies",
    "check": "gpmlp.io.label_checks.stage",
    "compute_properties": "gpmlp.properties.compute",
    "evaluate": "gpmlp.potential.evaluation",
    "fit": "gpmlp.fitting.fit",
    "learn": "gpmlp.learning.loop",
    "load": "gpmlp.io.archive",
    "locality": "gpmlp.learning.locality",
    "partition": "gpmlp.properties.partition",
    "read": "gpmlp.io.ase_atoms",
    "register_network": "gpmlp.descriptors.networks",
    "save": "gpmlp.io.archive",
    "transport": "gpmlp.properties.transport",
}

__all__ = [*_HOMES]

# Modules that the documentation of versions before 0.2 imports, and names there that have changed
_MOVED = {
    "gpmlp.active": "gpmlp.learning",
    "gpmlp.active.after": "gpmlp.report.run.page",
    "gpmlp.active.labelling": "gpmlp.learning.oracles.labeller",
    "gpmlp.active.loop": "gpmlp.learning.loop",
    "gpmlp.active.oracle": "gpmlp.learning.oracles.oracle",
    "gpmlp.active.recipe": "gpmlp.learning.recipe",
    "gpmlp.active.stopping": "gpmlp.learning.stopping.judge",
    "gpmlp.active.tape": "gpmlp.learning.labels",
    "gpmlp.cells": "gpmlp.core.cell_list",
    "gpmlp.environments": "gpmlp.core.environments",
    "gpmlp.io.atoms": "gpmlp.io.ase_atoms",
    "gpmlp.neighbors": "gpmlp.core.neighbors",
    "gpmlp.picking": "gpmlp.learning.pool",
    "gpmlp.quantities": "gpmlp.core.quantities",
    "gpmlp.stepping": "gpmlp.potential.stepper",
    "gpmlp.structures": "gpmlp.core.structures",
    "gpmlp.units": "gpmlp.core.units",
}
_RENAMED = {
    "gpmlp.active.after.report": "gpmlp.report.run.page.report_run",
    "gpmlp.active.stopping.Record": "gpmlp.learning.stopping.history.Record",
    "gpmlp.cells.search": "gpmlp.core.cell_list.find_pairs",
    "gpmlp.neighbors.find": "gpmlp.core.neighbors.find_neighbors",
    "gpmlp.picking.pick": "gpmlp.learning.pool.select_pool",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version("gpmlp")
        except metadata.PackageNotFoundError:
            return "not installed"  # run from its sources
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'gpmlp' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


class _MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of _MOVED, and the names of _RENAMED in them, with a warning that says where they are now."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=fullname == "gpmlp.active") if fullname in _MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        old, new = module.__name__, _MOVED[module.__name__]
        warnings.warn(f"{old} is {new} now", FutureWarning, stacklevel=2)
        importlib.import_module(new)  # now, as importing torch asks all modules for attributes

        def find(name: str) -> object:
            home, _, name = _RENAMED.get(f"{old}.{name}", f"{new}.{name}").rpartition(".")
            return getattr(importlib.import_module(home), name)

        module.__getattr__ = find  # type: ignore[method-assign]


sys.meta_path.append(_MovedModules())
