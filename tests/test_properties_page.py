"""The page about properties: from results of every kind, whole and with parts missing."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from ase.build import bulk
from report_data import parse

from gpmlp.properties.compute import PropertyResults
from gpmlp.properties.values import PropertyCurve, value_from_samples
from gpmlp.report.properties.figures import cut_off, is_band_structure
from gpmlp.report.properties.page import write_page
from gpmlp.report.properties.words import named_in_words, pretty_unit, to_its_error


def value(name: str, unit: str, mean: float, sigma: float, calculation: str, lost: int = 0, **more):
    """A property of 32 samples, some of which have none."""
    samples = mean + sigma * np.random.default_rng(len(name)).standard_normal(32)
    samples[:lost] = np.nan
    more = {"novelty": 0.4, "about": "what it is", "calculation": calculation} | more
    return value_from_samples(name, unit, mean, samples, **more)


def results() -> PropertyResults:
    """Two crystals, a band structure, a dimer, a phase difference that some samples lack and one far from the data."""
    x, q = np.linspace(0, 1, 41), np.concatenate([np.linspace(0, 1, 21), np.linspace(1, 2, 21)])
    bands = np.abs(np.sin(q[:, None] * np.array([1.5, 1.5, 2.0])))
    marks = ((0.0, "Γ"), (1.0, "X|K"), (2.0, "Γ"))
    energies = 1e4 * np.exp(-30 * x) - np.exp(-((x - 0.4) ** 2) / 0.01)
    values = (
        value("Si.bulk_modulus", "GPa", 97.3, 2.2, "eos"),
        value("Si.volume_per_atom", "A^3/atom", 20.1234, 0.031, "eos", parts={"sampled": 0.03, "statistical": 0.008}),
        value("Ge.bulk_modulus", "GPa", 72.0, 4.0, "eos", novelty=2.3),
        value("Si.vibrational_free_energy_300K", "eV/atom", -0.0123, 0.0011, "phonons", 3),
        value("energy_difference", "eV/atom", 0.02, 0.001, "phases", about="<b>Ge</b> & Si"),
    )
    curves = (
        PropertyCurve(
            "Si.phonon_bands", q, "wave vector", "1/A", bands, 0.02 + 0 * bands, "THz", marks, 32, 3, "bands"
        ),
        PropertyCurve("dimer_Si_Si", x, "distance", "A", energies, 0.1 + 0 * x, "eV", ((0.3, "data from here"),), 32),
        PropertyCurve("nothing", x, "distance", "A", np.nan * x, np.nan * x, "eV"),
    )
    structures = tuple(bulk(symbol) for symbol in ("Si", "Si", "Ge"))
    for atoms, name in zip(structures, ("Si at rest", "Si at rest", "Ge at rest"), strict=True):
        atoms.info["name"] = name
    return PropertyResults(values, curves, structures, ("phonons: 3 of 32 samples: imaginary <modes>",), 32)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("page")
    path = write_page(results(), folder, "model.gpmlp")
    assert path == folder / "properties.html"
    names = {file.name for file in (folder / "figures").iterdir()}
    assert names == {f"{name}.{suffix}" for name in ("Si_phonon_bands", "dimer_Si_Si") for suffix in ("svg", "png")}
    assert not (folder / "report.json").exists()  # its numbers are in properties.json
    return path.read_text()


def text_of(page: str) -> str:
    """What a reader sees."""
    return re.sub(r"\s+", " ", re.sub(r"<(style|script)[^>]*>.*?</\1>|<[^>]+>", " ", page, flags=re.S))


def test_page_is_whole(page):
    assert all(load.startswith(("data:", "#")) for load in parse(page).loads)
    for title in ("What are the values, and how sure?", "How do they run?", "Can the error bars be trusted?"):
        assert title in page


def test_numbers_carry_their_errors(page):
    text = text_of(page)
    made = results()
    for each in made.values:
        assert to_its_error(each.value, each.sigma) in text and to_its_error(each.sigma, each.sigma) in text
        assert f"{to_its_error(each.low_90, each.sigma)} … {to_its_error(each.high_90, each.sigma)}" in text
    assert "Å³/atom" in text and "A^3" not in text
    assert "Vibrational free energy, 300 K" in text
    assert "Equation of state of Si" in text and "Equation of state of Ge" in text


def test_doubts_are_said(page):
    text = text_of(page)
    assert "1 of 5 come from structures unlike the training data (novelty up to 2.3): eos" in text
    assert "3 of 32" in text and "imaginary &lt;modes&gt;" in page
    assert "&lt;b&gt;Ge&lt;/b&gt; &amp; Si" in page
    assert "noise of averages" in text  # a part that one value has
    assert "higher values are cut off" in text
    assert "Properties of Si and Ge" in text


def test_parts_that_are_missing(tmp_path):
    """No samples, no novelty, no curves."""
    bare = replace(results().values[0], sigma=float("nan"), low_90=float("nan"), high_90=float("nan"), novelty=None)
    bare = replace(bare, samples=0, failed=0, parts={})
    text = text_of(write_page(PropertyResults((bare,), (), results().structures), tmp_path).read_text())
    assert "without error bars" in text and "How do they run?" not in text
    assert "no novelty" in text and "nan" not in text.lower()
    lost = value("barrier", "eV", 1.0, 0.1, "torsions", lost=32)
    text = text_of(write_page(PropertyResults((lost,), (), results().structures, samples=32), tmp_path).read_text())
    assert "1 of 1 exist on hardly any sample" in text and "Every sample has" not in text


def test_the_oracles_own_values(tmp_path):
    made = results()
    truth = {"Si.bulk_modulus": 98.1, "energy_difference": 0.05, "Ge.bulk_modulus": 73.0}
    page = write_page(made, tmp_path, truth=truth).read_text()
    assert "Of 3 values the oracle's own lies inside the 90 % interval for 2" in text_of(page).replace("&#39;", "'")
    assert "<b>0.0500</b>" in page and ">98.1<" in page  # in bold where it is outside
    assert "oracle" not in text_of(write_page(made, tmp_path).read_text())


def test_words():
    assert named_in_words("Si.bulk_modulus") == "Bulk modulus (Si)"
    assert named_in_words("frequency_GAMMA_4") == "Frequency Γ 4"
    assert named_in_words("gruneisen_parameter_300K") == "Grüneisen parameter, 300 K"
    assert [pretty_unit(unit) for unit in ("A^3/atom", "1e-6/K", "GPa", "eV/A", "1/A")] == [
        "Å³/atom", "10⁻⁶/K", "GPa", "eV/Å", "1/Å",
    ]  # fmt: skip
    assert to_its_error(97.3456, 2.2) == "97.3" and to_its_error(-0.01234, 0.0011) == "−0.0123"
    assert to_its_error(12345.6, 230.0) == "12,350" or to_its_error(12345.6, 230.0) == "12,340"
    assert to_its_error(float("nan"), 1.0) == "–" and to_its_error(1.5, float("nan")) == "1.5"


def test_what_is_drawn():
    bands, dimer, _ = results().curves
    assert is_band_structure(bands) and not is_band_structure(dimer)
    assert cut_off(bands) is None
    limit = cut_off(dimer)
    assert limit is not None and dimer.value.min() + 1 < limit < 100
