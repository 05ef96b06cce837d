"""Free atoms: dispersion coefficients and polarisabilities, as ASE has them from the literature.

Chu and Dalgarno, J. Chem. Phys. 121, 4083 (2004), hydrogen exact; Pd, Ag, Pt, Au of Ruiz et al., Phys. Rev. Lett. 108, 146103 (2012).
"""

from __future__ import annotations

from ase.calculators.vdwcorrection import vdWDB_alphaC6
from ase.units import Bohr, Hartree

from gpmlp.core.errors import UserError


def pair_c6(first: str, second: str) -> float:
    """C₆ of a pair of elements, eV Å⁶: 2 C_A C_B / (α_B/α_A C_A + α_A/α_B C_B), Tkatchenko and Scheffler, Phys. Rev. Lett. 102, 073005
    (2009), eq. 4.

    Raises:
        UserError: the tables lack an element.
    """
    table: dict[str, list[float]] = vdWDB_alphaC6  # type: ignore[assignment]
    for symbol in (first, second):
        if symbol not in table:
            raise UserError(
                f"There is no free-atom C6 of {symbol}; the tables hold {', '.join(sorted(table))}. Give "
                f"long_range.dispersion.r6.c6 for its pairs, as {{{symbol}-{symbol}: 50.0}} (eV A^6)."
            )
    (polarizability, c6), (other, c6_other) = table[first], table[second]
    mixed = 2 * c6 * c6_other / (other / polarizability * c6 + polarizability / other * c6_other)
    return mixed * Hartree * Bohr**6
