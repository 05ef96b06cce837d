"""Every script in examples/ answers its question: it runs in an empty folder, is short, and prints numbers that are right."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lammps_runs import plugin

FOLDER = Path(__file__).resolve().parents[1] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))


def numbers(pattern: str, printed: str) -> list[float]:
    """What the one group of a pattern catches wherever it matches."""
    return [float(found) for found in re.findall(pattern, printed)]


def fit(printed: str, folder: Path) -> None:
    (energy,) = numbers(r"errors? of energies: ([\d.]+) meV/atom", printed)
    trained, tested = numbers(r"force.*: (\d+) meV/A", printed)
    assert 2 < energy < 40
    assert 50 < trained < 400 and 50 < tested < 300
    assert (folder / "silicon.gpmlp").exists()


def error_bars(printed: str, folder: Path) -> None:
    """Calibrated: error bars are as large as errors, within what 40 structures can tell; far from the data they are larger."""
    bar, error = numbers(r": (\d+) meV/A", printed)
    (share,) = numbers(r"(\d+) %$", printed.split("\n")[2])
    assert 0.6 < bar / error < 1.7
    assert 80 <= share <= 98
    std, novelty = numbers(r"known to ([\d.]+) meV/atom", printed), numbers(r"novelty ([\d.]+)", printed)
    assert min(std) == std[1] and std[3] > 10 * std[1]
    assert min(novelty) == novelty[1] and 0 < novelty[1] < 1


def ase_dynamics(printed: str, folder: Path) -> None:
    temperature, std = numbers(r"(\d+) K:", printed), numbers(r"std +(\d+) meV/A", printed)
    assert temperature[0] == 0 and 300 < sum(temperature[1:]) / len(temperature[1:]) < 2000
    assert len(std) == 11 and std[0] == 0 < min(std[1:]) and max(std) < 2000  # symmetry allows no force at the start


def reaction_barrier(printed: str, folder: Path) -> None:
    """EMT's own barrier is 0.374 eV."""
    (barrier,), (std,) = numbers(r"barrier: ([\d.]+) eV", printed), numbers(r"known to ([\d.e-]+) eV", printed)
    (calls,) = numbers(r"after (\d+) calculations", printed)
    assert "converged: True" in printed and abs(barrier - 0.374) < 0.01
    assert 0 < std < 0.01 and calls <= 5


def torchsim_dynamics(printed: str, folder: Path) -> None:
    """Warm crystals are some k_BT above the ground state, PBE's -107.0 eV/atom of the data."""
    energies, stds = numbers(r": (-[\d.]+) \+-", printed), numbers(r"\+- ([\d.]+) eV/atom", printed)
    assert len(energies) == 4 and all(-107.1 < energy < -106.6 for energy in energies)
    assert all(0 < std < 0.2 for std in stds)


def own_network(printed: str, folder: Path) -> None:
    """Random weights: features of which neither much good nor much harm comes."""
    soap, both = numbers(r"error ([\d.]+) meV/A", printed)
    assert 30 < soap < 120 and both < 1.5 * soap


def own_oracle(printed: str, folder: Path) -> None:
    from ase.io import read

    (labels,), (limit,) = numbers(r"(\d+) labels", printed), numbers(r"up to ([\d.]+) eV/A", printed)
    assert 6 <= labels < 60 and 0.02 < limit < 2
    assert "all 200 steps" in printed
    frames = read(folder / "own_oracle_run/labels.xyz", ":")
    assert len(frames) == labels
    for frame in frames:  # the labels are the oracle's
        r = frame.get_all_distances()[np.triu_indices(13, 1)]
        morse = 0.34 * ((1 - np.exp(-1.36 * (r - 2.87))) ** 2 - 1).sum()
        assert frame.get_potential_energy() == pytest.approx(morse, abs=1e-6)


def select_structures(printed: str, folder: Path) -> None:
    """Five structures, each less uncertain than the one before."""
    indices, scores = numbers(r"structure +(\d+)", printed), numbers(r"energy (\d+) meV", printed)
    assert len(set(indices)) == 5
    assert scores == sorted(scores, reverse=True) and 0 < scores[-1] and scores[0] < 2000


def bulk_modulus(printed: str, folder: Path) -> None:
    """PBE has 88.6 GPa (Csonka et al., Phys. Rev. B 79, 155107 (2009))."""
    value, std = numbers(r": ([\d.]+) \+- [\d.]+ GPa,", printed), numbers(r"\+- ([\d.]+) GPa,", printed)
    assert len(value) == 4 and 0.5 < std[0] < 15
    assert value[0] == pytest.approx(88.6, abs=3 * std[0])
    foreseen = numbers(r"C11 to \+- ([\d.]+) GPa", printed)
    assert std[1] > foreseen[0] and foreseen == sorted(foreseen, reverse=True) and len(foreseen) == 3


def liquid_diffusion(printed: str, folder: Path) -> None:
    """First principles have about 2 A^2/ps in liquid silicon at 1800 K (Stich, Car, Parrinello, Phys. Rev. Lett. 63, 2240 (1989))."""
    found = re.findall(r"diffusion_coefficient_Si_(\d+)K: ([\d.]+) A\^2/ps, 90 % in ([\d.]+) to ([\d.]+)", printed)
    d = {int(temperature): float(value) for temperature, value, _, _ in found}
    assert sorted(d) == [1800, 2000, 2200, 2600] and 1 < d[1800] < 3.5
    assert 0.8 * d[1800] < d[2000] < 1.2 * d[2200]
    assert all(float(low) < float(value) < float(high) for _, value, low, high in found)
    (energy,) = numbers(r"activation_energy_Si: (-?[\d.]+) eV", printed)
    assert -0.2 < energy < 0.8


def vacancy_diffusion(printed: str, folder: Path) -> None:
    """EMT's own numbers lie within the intervals, which are narrow enough to be of use."""
    found = re.findall(r"(\w+): ([-\d.]+), 90 % within ([-\d.]+) to ([-\d.]+) .*EMT ([-\d.]+)", printed)
    assert [name for name, *_ in found] == ["hop_barrier", "log10_attempt_frequency", "log10_diffusion_coefficient"]
    barrier, _, diffusion = ([float(x) for x in numbers] for _, *numbers in found)
    assert barrier[3] == pytest.approx(0.761, abs=2e-3)  # by ASE's band on EMT, in a cell of 31 atoms
    for value, low, high, own in (barrier, diffusion):
        assert low < value < high and low - 0.5 * (high - low) < own < high + 0.5 * (high - low)
    assert diffusion[2] - diffusion[1] < 0.7


def quantum_region(printed: str, folder: Path) -> None:
    """A fifth of the atoms holds what the potential does not know; with ΔE learned dynamics conserves energy."""
    (core, n, share), (labels, change) = (
        [float(x) for x in re.search(pattern, printed).groups()]
        for pattern in (r"(\d+) of (\d+) atoms hold ([\d.]+) %", r"(\d+) labels; .* ([-+][\d.]+) meV/atom")
    )
    assert (core, n) == (10, 49) and 95 < share <= 100
    assert 4 <= labels < 40 and abs(change) < 0.5


def dispersion(printed: str, folder: Path) -> None:
    """-0.75 sum C6 / r^6 of all pairs of atoms, where molecules are so far apart that nothing else is left."""
    from gpmlp.io.ase_atoms import read_frames

    molecule = read_frames(FOLDER.parent / "data/ethanol/test.xyz", "-1:")[0][0]
    c6 = [10.364 * {"H": 0.14, "C": 1.75, "O": 0.70}[symbol] for symbol in molecule.symbols]
    for distance, energy in re.findall(r"([\d.]+) A: (-[\d.]+) meV", printed):
        apart = molecule.positions[:, None] - molecule.positions - [float(distance), 0, 0]
        r = (apart**2).sum(2) ** 0.5
        pairs = [(c6[i] * c6[j]) ** 0.5 / r[i, j] ** 6 for i in range(9) for j in range(9) if r[i, j] < 15]
        assert float(energy) == pytest.approx(-750 * sum(pairs), abs=6e-4)  # three digits are printed
    assert printed.count("meV") == 3


def sum_of_kernels(printed: str, folder: Path) -> None:
    evidence, errors = numbers(r"log evidence (-?\d+)", printed), numbers(r"error (\d+) meV/A", printed)
    assert len(evidence) == len(errors) == 3
    assert evidence[2] >= evidence[0]  # the sum holds the first kernel, and more
    assert all(50 < error < 400 for error in errors)


def lammps_external(printed: str, folder: Path) -> None:
    """Error bars grow with the temperature; the run ends at the first step beyond the limit."""
    std, steps = numbers(r"std (\d+) meV", printed), numbers(r"(\d+) fs", printed)
    assert 50 < std[0] < std[-2] <= 200 <= std[-1] < 210
    assert 100 < steps[-1] < 500
    assert all(19.8 < volume < 21.5 for volume in numbers(r"([\d.]+) A\^3/atom", printed))


def lammps_learning(printed: str, folder: Path) -> None:
    """Labels are EMT's, of frames with a novelty beyond the limit; the last run gets through."""
    from ase.calculators.emt import EMT
    from ase.io import read

    steps, novelty = numbers(r"step (\d+)", printed), numbers(r"novelty ([\d.]+)", printed)
    assert steps == sorted(steps) and steps[-1] == 1500 and 2 < len(steps) < 15
    assert min(novelty[:-1]) > 2 >= novelty[-1]
    frames = read(folder / "train.xyz", ":")
    assert len(frames) == 4 + len(steps) - 1
    for frame in frames:
        energy, frame.calc = frame.get_potential_energy(), EMT()
        assert frame.get_potential_energy() == pytest.approx(energy, abs=1e-4)


def openmm_dynamics(printed: str, folder: Path) -> None:
    kinetic, total = numbers(r"kinetic ([\d.]+)", printed), numbers(r"together (-[\d.]+)", printed)
    assert len(total) == 11 and np.ptp(total) < 0.02 and np.ptp(kinetic) > 1
    assert all(-107.1 < energy / 64 < -106.8 for energy in total)


def path_integrals(printed: str, folder: Path) -> None:
    """A Debye crystal of 645 K has 34 meV per atom at 150 K; PBE has 0 GPa at 5.47 A, and nuclei add some 0.3 GPa."""
    quantum, classical = numbers(r"([\d.]+)(?: meV/atom|(?= in))", printed)
    assert classical == 19.4 and quantum == pytest.approx(34, abs=3)
    assert numbers(r"(-?[\d.]+) GPa", printed)[0] == pytest.approx(0, abs=2.5)


ENGINES = {
    "lammps_external": "lammps",
    "lammps_learning": "lammps",
    "openmm_dynamics": "openmm",
    "path_integrals": "ipi",
}


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example(script, tmp_path):
    if script.stem == "torchsim_dynamics":
        pytest.importorskip("torch_sim", reason="torch-sim is not installed (pip install 'gpmlp[torchsim]')")
    if script.stem in ENGINES:
        pytest.importorskip(ENGINES[script.stem], reason="an engine is not installed (pip install 'gpmlp[engines]')")
    if script.stem == "lammps_learning":
        shutil.copy(plugin(), tmp_path / "gpmlp_plugin.so")  # which takes the example a minute
    before = set(FOLDER.rglob("*"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr and "Traceback" not in done.stderr
    globals()[script.stem](done.stdout.strip(), tmp_path)
    assert set(FOLDER.rglob("*")) == before, "an example writes into the current folder only"


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short_and_start_from_a_question(script):
    text = script.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    assert ast.get_docstring(ast.parse(text)).partition("\n")[0].endswith("?")


def test_readme_lists_every_example():
    listed = re.findall(r"^\| \[(\w+)\.py\]\(\1\.py\)", (FOLDER / "README.md").read_text(encoding="utf-8"), flags=re.M)
    assert sorted(listed) == [path.stem for path in EXAMPLES]
