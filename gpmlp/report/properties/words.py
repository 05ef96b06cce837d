"""Names, units and numbers of properties as the page writes them."""

from __future__ import annotations

import math
import re

WORDS = {
    "eos": "Equation of state",
    "phonon_dos": "Phonon density of states",
    "gruneisen_parameter": "Grüneisen parameter",
    "elastic": "Elastic constants",
    "lattice": "Lattice constants",
    "quasi_harmonic": "Quasi-harmonic approximation",
}
PEOPLE = re.compile(r"\b(voigt|reuss|hill|young|poisson)\b")
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def named_in_words(name: str) -> str:
    """'Bulk modulus' of bulk_modulus; what stands before a point is a structure's name, and goes behind."""
    structure, _, name = name.rpartition(".")
    stem, at, kelvin = name.rpartition("_") if re.search(r"_[0-9.]+K$", name) else (name, "", "")
    words = WORDS.get(stem, stem.replace("_", " ")).replace("GAMMA", "Γ") + (f", {kelvin[:-1]} K" if at else "")
    words = PEOPLE.sub(lambda found: found[0].capitalize(), words)
    return words[:1].upper() + words[1:] + (f" ({structure})" if structure else "")


def pretty_unit(unit: str) -> str:
    """'Å³/atom' of A^3/atom."""
    unit = re.sub(r"\^(-?[0-9]+)", lambda found: found[1].translate(SUPERSCRIPTS), unit)
    unit = re.sub(r"\bA(?![a-zA-Z])", "Å", unit)
    unit = re.sub(r"\b1e(-?[0-9]+)", lambda found: f"10{found[1].translate(SUPERSCRIPTS)}", unit)
    return unit.replace("kB", "k_B").replace("degrees", "degree").replace("degree", "°")


def to_its_error(number: float, sigma: float) -> str:
    """A number with as many decimals as show two digits of its standard deviation; – for NaN."""
    if not math.isfinite(number):
        return "–"
    if not (math.isfinite(sigma) and sigma > 0):
        return f"{number:.5g}".replace("-", "−")
    decimals = 1 - math.floor(math.log10(sigma))
    return f"{round(number, decimals):,.{max(decimals, 0)}f}".replace("-", "−")
