"""Provenance of a model: hashes of its files, versions and date, and the literature behind its recipe."""

from __future__ import annotations

import hashlib
import os
import platform
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from gpmlp.core.errors import DataWarning, UserError
from gpmlp.core.structures import Structures, count_matches
from gpmlp.native.library import instruction_set
from gpmlp.recipe import Recipe

Files = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
NOT_INSTALLED = "not installed"
PACKAGES = (
    "gpmlp",
    "torch",
    "gpytorch",
    "linear_operator",
    "numpy",
    "scipy",
    "ase",
    "vesin",
    "sphericart-torch",
    "dscribe",
)


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of the bytes of a file."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from error


def file_provenance(**files: Files | None) -> dict:
    """Provenance of a fit, e.g. file_provenance(training=['a.xyz', 'b.xyz'], validation=None).

    Of several files of a role the second is called 'training 2'.
    """
    paths = {
        role if not i else f"{role} {i + 1}": path
        for role, several in files.items()
        for i, path in enumerate(_listed(several))
    }
    return {
        "files": {role: {"name": Path(path).name, "sha256": file_hash(path)} for role, path in paths.items()},
        "versions": installed_versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _listed(files: Files | None) -> list[str | os.PathLike[str]]:
    return [] if files is None else [files] if isinstance(files, (str, os.PathLike)) else list(files)


@dataclass(frozen=True)
class DataOverlap:
    """Overlap of evaluation data with those of a model.

    Attributes:
        training: whether the model was trained on a file of the very bytes of one of these.
        held_out: number of structures that are among those of its calibration.
    """

    training: bool
    held_out: int


def check_overlap(provenance: dict, calibrated_on: dict, structures: Structures, path: Files) -> DataOverlap:
    """The overlap of files with the data of a model; warns if there is any.

    Args:
        provenance: of the model; calibrated_on: Calibration.source.
        structures: as read from the files `path`.
    """
    files = _listed(path)
    hashes = {entry["sha256"] for role, entry in provenance.get("files", {}).items() if role.startswith("training")}
    trained = [file for file in files if file_hash(file) in hashes]
    training, path = bool(trained), ", ".join(map(str, trained or files))
    overlap = DataOverlap(training, count_matches(structures.fingerprints(), calibrated_on.get("fingerprints", ())))
    if training:
        text = f"{path}: is the file this model was trained on; its errors say nothing of new structures."
        warnings.warn(text, DataWarning, stacklevel=2)
    elif overlap.held_out:
        text = (
            f"{path}: {overlap.held_out} of {len(structures)} structures are among those from which this model learned how large its "
            "errors are, and then learned from; there may be others of its training set. Its errors and error bars say less of new "
            "structures than they seem to."
        )
        warnings.warn(text, DataWarning, stacklevel=2)
    return overlap


def version_of(package: str) -> str:
    """Version of an installed package; 'not installed' for one that is not (gpmlp itself run from its sources)."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED


def installed_versions() -> dict[str, str]:
    """Versions of Python, gpmlp and its dependencies, and the instruction set of the compiled core."""
    versions = {"python": platform.python_version()} | {package: version_of(package) for package in PACKAGES}
    return versions | {"compiled core": instruction_set()}


@dataclass(frozen=True)
class LiteratureReference:
    """One work to cite, and what for."""

    key: str
    used_for: str
    kind: str
    fields: tuple[tuple[str, str], ...]

    def bibtex(self) -> str:
        """BibTeX entry under a comment that says what for."""
        body = "".join(f"  {name} = {{{value}}},\n" for name, value in self.fields)
        return f"% {self.used_for}\n@{self.kind}{{{self.key},\n{body}}}\n"


def _article(
    key: str, used_for: str, author: str, title: str, journal: str, volume: str, pages: str, year: str
) -> LiteratureReference:
    about = {"author": author, "title": title, "journal": journal, "volume": volume, "pages": pages, "year": year}
    return LiteratureReference(key, used_for, "article", tuple(about.items()))


GAP = _article(
    "Bartok2010", "Gaussian approximation potentials", r"Bart{\'o}k, A. P. and Payne, M. C. and Kondor, R. and Cs{\'a}nyi, G.",
    "Gaussian approximation potentials: the accuracy of quantum mechanics, without the electrons",
    "Phys. Rev. Lett.", "104", "136403", "2010",
)  # fmt: skip
SOAP = _article(
    "Bartok2013", "SOAP power spectrum", r"Bart{\'o}k, A. P. and Kondor, R. and Cs{\'a}nyi, G.",
    "On representing chemical environments", "Phys. Rev. B", "87", "184115", "2013",
)  # fmt: skip
SPARSE = _article(
    "Quinonero2005", "sparse Gaussian process (DTC)", r"Qui{\~n}onero-Candela, J. and Rasmussen, C. E.",
    "A unifying view of sparse approximate Gaussian process regression", "J. Mach. Learn. Res.", "6", "1939--1959", "2005",
)  # fmt: skip
QR = _article(
    "Foster2009", "stable solution by QR", "Foster, L. and Waagen, A. and Aijaz, N. and others",
    "Stable and efficient Gaussian process calculations", "J. Mach. Learn. Res.", "10", "857--882", "2009",
)  # fmt: skip
SCALING = _article(
    "Willatt2018", "radial scaling of neighbour weights", "Willatt, M. J. and Musil, F. and Ceriotti, M.",
    "Feature optimization for atomistic machine learning yields a data-driven construction of the periodic table of the elements",
    "Phys. Chem. Chem. Phys.", "20", "29661--29668", "2018",
)  # fmt: skip
OPTIMAL = _article(
    "Goscinski2021", "optimal radial basis", "Goscinski, A. and Musil, F. and Pozdnyakov, S. and Nigam, J. and Ceriotti, M.",
    "Optimal radial basis for density-based atomic representations", "J. Chem. Phys.", "155", "104106", "2021",
)  # fmt: skip
DSCRIBE = _article(
    "Himanen2020", "dscribe descriptors", r"Himanen, L. and J{\"a}ger, M. O. J. and Morooka, E. V. and others",
    "DScribe: library of descriptors for machine learning in materials science", "Comput. Phys. Commun.", "247", "106949", "2020",
)  # fmt: skip
SPHERICART = _article(
    "Bigi2023", "spherical harmonics", "Bigi, F. and Fraux, G. and Browning, N. J. and Ceriotti, M.",
    "Fast evaluation of spherical harmonics with sphericart", "J. Chem. Phys.", "159", "064802", "2023",
)  # fmt: skip
ZBL = LiteratureReference(
    "Ziegler1985", "short-range repulsion (ZBL)", "book",
    (("author", "Ziegler, J. F. and Biersack, J. P. and Littmark, U."), ("title", "The Stopping and Range of Ions in Solids"),
     ("publisher", "Pergamon, New York"), ("year", "1985")),
)  # fmt: skip
GPYTORCH = LiteratureReference(
    "Gardner2018", "kernel hyperparameters (GPyTorch)", "inproceedings",
    (("author", "Gardner, J. R. and Pleiss, G. and Bindel, D. and Weinberger, K. Q. and Wilson, A. G."),
     ("title", "GPyTorch: blackbox matrix-matrix Gaussian process inference with GPU acceleration"),
     ("booktitle", "Advances in Neural Information Processing Systems"), ("volume", "31"), ("year", "2018")),
)  # fmt: skip
VESIN = LiteratureReference(
    "vesin", "neighbour lists", "software",
    (("author", "Fraux, G. and contributors"), ("title", "vesin: neighbour lists"),
     ("url", "https://github.com/luthaf/vesin")),
)  # fmt: skip


def citations_of(recipe: Recipe, version: str) -> list[LiteratureReference]:
    """The works to cite for a model made by this recipe."""
    ours = (("title", "gpmlp: a sparse Gaussian process potential energy surface"), ("version", version))
    names = {descriptor.name for descriptor in recipe.descriptors}
    soap = [descriptor for descriptor in recipe.descriptors if descriptor.name == "soap"]
    works = [LiteratureReference("gpmlp", "the package that made this potential", "software", ours), GAP]
    works += [SOAP] if names & {"soap", "dscribe-soap"} else []
    works += [SPARSE, QR]
    works += [SCALING] if any(descriptor.radial_scaling is not False for descriptor in soap) else []
    works += [OPTIMAL] if any(descriptor.basis == "optimal" for descriptor in soap) else []
    works += [SPHERICART] if soap else []
    works += [DSCRIBE] if names & {"dscribe-soap", "dscribe-acsf"} else []
    works += [ZBL] if recipe.baseline.zbl is not False else []
    return [*works, VESIN, GPYTORCH]
