"""Isolated atoms and ZBL against their definitions (their derivatives and symmetries: test_physics.py)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from systems import cluster, dimer, structure, targets_of

from gpmlp.core.errors import UserError
from gpmlp.core.quantities import Prediction, Targets
from gpmlp.core.structures import Structures
from gpmlp.fitting import prepare
from gpmlp.io import archive
from gpmlp.potential import baselines
from gpmlp.potential.baseline import LocalBaseline
from gpmlp.potential.baselines import ZBL, IsolatedAtoms
from gpmlp.recipe import Recipe


def zbl_energy(z1: int, z2: int, r: float) -> float:
    """Ziegler, Biersack, Littmark (1985): Z1 Z2 e^2/r phi(r/a), e^2 = 14.399645 eV A, a = 0.8854 a0/(Z1^.23 + Z2^.23)."""
    a = 0.8854 * 0.529177 / (z1**0.23 + z2**0.23)
    x = r / a
    phi = 0.18175 * math.exp(-3.19980 * x) + 0.50986 * math.exp(-0.94229 * x)
    phi += 0.28022 * math.exp(-0.40290 * x) + 0.02817 * math.exp(-0.20162 * x)
    return 14.399645 * z1 * z2 / r * phi


def _zbl(pair: tuple[int, int], inner: float, outer: float) -> ZBL:
    return ZBL({pair: inner}, {pair: outer})


@pytest.mark.parametrize("pair", [(14, 14), (1, 8), (29, 79)])
@pytest.mark.parametrize("r", [0.4, 1.0, 1.7])
def test_zbl_is_the_universal_potential_where_the_switch_is_one(pair, r):
    found = _zbl(pair, 2.0, 2.5)(dimer(r, pair))
    # 0.46850 A is 0.8854 a0 to 7e-5; d ln E / d ln a is below 0.2 x r/a, which is up to 27
    assert float(found.energies) == pytest.approx(zbl_energy(*pair, r), rel=5e-4)


def test_zbl_of_silicon_against_worked_values():
    """Si-Si by hand: a = 0.46850/(2 x 14^0.23) = 0.127664 A; at r = 1 A, x = 7.83305 and
    phi = .18175 e^-25.0642 + .50986 e^-7.38105 + .28022 e^-3.15593 + .02817 e^-1.57930; E = 14.39965 x 14^2 / 1 eV x phi."""
    a = 0.46850 / (2 * 14**0.23)
    x = 1 / a
    phi = 0.18175 * math.exp(-3.1998 * x) + 0.50986 * math.exp(-0.94229 * x)
    phi += 0.28022 * math.exp(-0.4029 * x) + 0.02817 * math.exp(-0.20162 * x)
    found = _zbl((14, 14), 1.5, 2.0)(dimer(1.0, (14, 14)))
    assert float(found.energies) == pytest.approx(14.3996454 * 196 * phi, rel=1e-7)
    assert 45 < float(found.energies) < 60  # eV: the size of it, so that a wrong unit cannot pass


def test_zbl_slope_is_the_derivative_and_changes_sign_nowhere():
    """The force on a dimer by autograd of the energy as a formula in r, switch included; always repulsive."""
    term = _zbl((6, 8), 0.6, 1.8)
    for r in (0.35, 0.7, 1.2, 1.75):
        x = torch.tensor(r, dtype=torch.float64, requires_grad=True)
        z = [torch.tensor(float(k), dtype=torch.float64) for k in (6, 8)]
        energy, slope = ZBL.of_pair(x, *z, *torch.tensor([0.6, 1.8], dtype=torch.float64))
        (by_autograd,) = torch.autograd.grad(energy, x)
        assert float(slope) == pytest.approx(float(by_autograd), rel=1e-12)  # two formulas
        found = term(dimer(r))
        assert float(found.energies) == pytest.approx(float(energy), rel=1e-12)
        pull = found.forces[1] @ torch.tensor([0.6, 0, 0.8], dtype=torch.float64)
        assert float(pull) == pytest.approx(-float(slope), rel=1e-12)
        assert float(slope) < 0


def test_zbl_is_switched_off_smoothly_pair_by_pair():
    term = ZBL({(1, 8): 0.4, (8, 8): 1.0}, {(1, 8): 0.9, (8, 8): 2.2})
    assert term.cutoff == 2.2
    assert float(term(dimer(0.95, (1, 8))).energies) == 0
    assert float(term(dimer(0.85, (1, 8))).energies) > 0
    assert float(term(dimer(2.25, (8, 8))).energies) == 0
    assert float(term(dimer(2.1, (8, 8))).energies) > 0
    assert float(term(dimer(0.5, (1, 1))).energies) == 0  # a pair without numbers is not repelled
    near = [float(term(dimer(2.2 - d, (8, 8))).energies) for d in (2e-3, 1e-3)]
    assert near[0] / near[1] == pytest.approx(8, rel=0.02)  # C2: like d^3
    with pytest.raises(UserError, match=r"ZBL of pair \(8, 8\): inner 3.0 A must be below outer 2.0 A"):
        _zbl((8, 8), 3.0, 2.0)


def test_isolated_atoms_add_up():
    term = IsolatedAtoms({1: -13.0, 6: -1000.0, 8: -2000.0})
    batch = Structures.concatenate([cluster((6, 1, 1, 8)), structure([[0, 0, 0]], [1])])
    found = term(batch)
    assert found.energies.tolist() == [-3026.0, -13.0]
    assert found.atom_energies.tolist() == [-1000.0, -13.0, -13.0, -2000.0, -13.0]
    with pytest.raises(UserError, match=r"No isolated-atom energy for atomic number 8; known: \[1, 6\]"):
        IsolatedAtoms({1: 0.0, 6: 0.0})(batch)


def _with_energies(structures: Structures, energies: list[float], config_types=None) -> Targets:
    targets = Targets.unlabelled(structures)
    fields = vars(targets) | {"energies": torch.tensor(energies, dtype=torch.float64)}
    return Targets(**fields | ({"config_types": tuple(config_types)} if config_types else {}))


def test_energies_from_frames_of_one_atom():
    batch = Structures.concatenate(
        [structure([[0, 0, 0]], [8]), cluster((6, 1)), structure([[0, 0, 0]], [1]), structure([[0, 0, 0]], [6])]
    )
    targets = _with_energies(
        batch, [-2041.0, -5.0, -13.6, float("nan")], ["isolated_atom", "", "IsolatedAtom", "isolated_atom"]
    )
    assert IsolatedAtoms.from_frames(batch, targets) == {8: -2041.0, 1: -13.6}  # carbon's energy is not known
    other = _with_energies(batch, [-2041.0, -5.0, -13.6, 0.0], ["", "isolated_atom", "", ""])
    assert IsolatedAtoms.from_frames(batch, other) == {}


def test_least_squares_recovers_energies_of_atoms():
    batch = Structures.concatenate(
        [cluster((6, 1, 1, 8), 1), cluster((6, 6, 1), 2), cluster((8, 1, 1), 3), cluster((6, 8, 8), 4)]
    )
    truth = IsolatedAtoms({1: -13.0, 6: -1029.0, 8: -2041.0})
    targets = targets_of(batch, truth(batch))
    assert IsolatedAtoms.least_squares(batch, targets) == pytest.approx(truth.energies, rel=1e-10)
    part = _with_energies(batch, [*truth(batch).energies.tolist()[:3], float("nan")])
    assert IsolatedAtoms.least_squares(batch, part) == pytest.approx(truth.energies, rel=1e-10)


def test_least_squares_of_one_composition_shares_the_energy():
    """Every structure is CO2: only e_C + 2 e_O is determined; the smallest energies that give it are chosen."""
    batch = Structures.concatenate([cluster((6, 8, 8), seed) for seed in range(3)])
    found = IsolatedAtoms.least_squares(batch, _with_energies(batch, [-30.0, -30.0, -30.0]))
    assert found[6] + 2 * found[8] == pytest.approx(-30.0)
    assert found[8] == pytest.approx(2 * found[6])  # minimum norm: along (1, 2)
    assert IsolatedAtoms.least_squares(batch, Targets.unlabelled(batch)) == {6: 0.0, 8: 0.0}


def test_baselines_are_made_again_from_their_state():
    made = [IsolatedAtoms({1: -13.5, 6: -1029.25}), ZBL({(1, 6): 0.3, (6, 6): 0.5}, {(1, 6): 0.9, (6, 6): 1.3})]
    for term in made:
        assert baselines.baseline_from_state(term.state()) == term
    with pytest.raises(UserError, match="Unknown baseline 'morse'"):
        baselines.baseline_from_state({"name": "morse"})


def test_predictions_add():
    heap = cluster((6, 8))
    a, b = IsolatedAtoms({6: 1.0, 8: 2.0})(heap), _zbl((6, 8), 2.0, 4.0)(heap)
    both = a + b
    assert isinstance(both, Prediction)
    assert torch.equal(both.energies, a.energies + b.energies)
    assert torch.equal(both.forces, b.forces)


def test_isolated_atoms_of_some_species_are_no_zero():
    """A frame of one element alone cannot be used, and the fit says so."""
    frames = Structures.concatenate([cluster((6, 8)), structure([[0.0, 0.0, 0.0]], [6])])
    known = Targets.unlabelled(frames)
    known = replace(known, energies=torch.tensor([-3.0, -1.0]).double(), config_types=("", "isolated_atom"))
    (finding,) = prepare.check_labels(frames, known, Recipe())
    assert "isolated_atom frames of C but none of O" in finding.message
    assert prepare.check_labels(frames, known, Recipe(baseline={"isolated_atoms": "least_squares"})) == []


def test_a_term_of_a_script_is_not_saved_without_a_word(potential, tmp_path):
    class Own(LocalBaseline):
        cutoff = 0.0

        def of_atoms(self, structures, pairs, start, end):
            return structures.positions.new_zeros(end - start), pairs, structures.positions.new_zeros(len(pairs), 3)

    with pytest.raises(UserError, match="Own is not of gpmlp and cannot be kept in a file"):
        archive.save(replace(potential, baselines=(*potential.baselines, Own())), tmp_path / "own.gpmlp")
    assert not list(tmp_path.iterdir())
