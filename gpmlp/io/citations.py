"""References is the literature behind a potential: what to cite for the parts its recipe uses."""

from __future__ import annotations

from dataclasses import dataclass

from gpmlp.recipe import Recipe


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
    names = ("author", "title", "journal", "volume", "pages", "year")
    return LiteratureReference(
        key, used_for, "article", tuple(zip(names, (author, title, journal, volume, pages, year), strict=True))
    )


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
    """The works that a model made by this recipe stands on."""
    ours = (("title", "gpmlp: a sparse Gaussian process potential energy surface"), ("version", version))
    names = {descriptor.name for descriptor in recipe.descriptors}
    soap = [descriptor for descriptor in recipe.descriptors if descriptor.name == "soap"]
    found = [LiteratureReference("gpmlp", "the package that made this potential", "software", ours), GAP]
    found += [SOAP] if names & {"soap", "dscribe-soap"} else []
    found += [SPARSE, QR]
    found += [SCALING] if any(descriptor.radial_scaling is not False for descriptor in soap) else []
    found += [OPTIMAL] if any(descriptor.basis == "optimal" for descriptor in soap) else []
    found += [SPHERICART] if soap else []
    found += [DSCRIBE] if names & {"dscribe-soap", "dscribe-acsf"} else []
    found += [ZBL] if recipe.baseline.zbl is not False else []
    return [*found, VESIN, GPYTORCH]
