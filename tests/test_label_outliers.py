"""Labels that a fit says are wrong: named with their numbers; a robust fit goes without them and is as good as one to right labels."""

from __future__ import annotations

import json
from dataclasses import replace

import ase.build
import numpy as np
import pytest
import torch
from ase.calculators.emt import EMT

import gpmlp
from gpmlp.cli.main import main
from gpmlp.fitting.label_outliers import find_label_outliers
from gpmlp.io import ase_atoms
from gpmlp.recipe import Recipe

SMALL = {"inducing": {"n": 20, "gradients": 1}, "novelty": False}


def crystals(n: int, seed: int):
    """Rattled and strained cells of copper with the labels of EMT."""
    rng, frames = np.random.default_rng(seed), []
    for _ in range(n):
        frame = ase.build.bulk("Cu", cubic=True)
        frame.set_cell(frame.cell.array @ (np.eye(3) + 0.02 * rng.normal(size=(3, 3))), scale_atoms=True)
        frame.positions += 0.12 * rng.normal(size=(4, 3))
        frame.calc = EMT()
        frame.get_stress()
        frames.append(frame)
    return ase_atoms.from_ase(frames)


@pytest.fixture(scope="module")
def data():
    return *crystals(40, 0), *crystals(15, 1)


@pytest.fixture(scope="module")
def plain(data):
    """(Potential, FitReport) of right labels."""
    return gpmlp.fit(*data[:2], Recipe(**SMALL))


def errors(potential, structures, targets) -> tuple[float, float]:
    """Root mean squares, meV/atom and eV/A."""
    prediction = potential(structures)
    energy = (prediction.energies - targets.energies) / structures.counts
    return 1e3 * float(energy.square().mean().sqrt()), float(
        (prediction.forces - targets.forces).square().mean().sqrt()
    )


def test_right_labels_are_left_alone(data, plain):
    structures, targets, *_ = data
    robust = gpmlp.fit(structures, targets, Recipe(**SMALL, robust=True))
    for potential, report in (plain, robust):
        assert not [f for f in report.findings if f.kind.startswith("label-outlier")]
        assert not find_label_outliers(potential, structures, targets, potential(structures))
    assert plain[1].noise == robust[1].noise and plain[1].rows == robust[1].rows


@pytest.mark.parametrize("kind", ["energy", "force", "failed"])
def test_wrong_labels_are_named_and_robust_fits_go_without_them(data, plain, kind):
    structures, targets, test, true = data
    right = errors(plain[0], test, true)
    energies, forces = targets.energies.clone(), targets.forces.clone()
    if kind == "energy":
        energies[18] += 4 * 0.6
    elif kind == "force":
        forces[4 * 11 + 2, 0] += 30.0
    else:
        energies[18] -= 400.0
    wrong = replace(targets, energies=energies, forces=forces)
    naive, report = gpmlp.fit(structures, wrong, Recipe(**SMALL))
    potential, robust = gpmlp.fit(structures, wrong, Recipe(**SMALL, robust=True))
    frame = structures.names[11 if kind == "force" else 18]
    name = {"energy": "label-outlier-energy", "force": "label-outlier-force", "failed": "energy-outlier"}[kind]
    (finding,) = (f for f in report.findings if f.kind == name)
    assert finding.severity == "error" and finding.frames == (frame,)
    (warning,) = (text for text in report.warnings if text == str(finding))
    assert frame in warning
    found = errors(potential, test, true)
    assert found[0] < 1.3 * right[0] and found[1] < 1.1 * right[1]
    label = "label-outlier-force" if kind == "force" else "label-outlier-energy"
    (left_out,) = (f for f in robust.findings if f.kind == label)
    assert left_out.severity == "warning" and "left out of the fit" in left_out.message and left_out.frames == (frame,)
    if kind == "energy":
        assert finding.numbers["deviation_eV_per_atom"] == pytest.approx(0.6, abs=0.05)
        assert robust.rows["energies"] == report.rows["energies"] - 1
    if kind == "force":
        assert finding.numbers["deviation_eV_per_A"] == pytest.approx(30, abs=3)
        assert errors(naive, test, true)[1] > 2 * right[1] and robust.rows["forces"] == report.rows["forces"] - 3
    if kind == "failed":  # decides nothing, robust or not
        assert left_out.numbers["deviation_eV_per_atom"] == pytest.approx(-100, abs=1)
        assert errors(naive, test, true)[0] < 1.3 * right[0]


def with_forces(targets, change):
    """With the forces (frames, 4, 3) changed, and without stresses."""
    forces = change(targets.forces.view(-1, 4, 3)).reshape(-1, 3)
    return replace(targets, forces=forces, stresses=targets.stresses * torch.nan)


def with_another_zero(targets):
    """Half of the energies from a code with another zero."""
    other = 4 * 5.0 * (torch.arange(len(targets.energies)) % 2)
    return replace(targets, energies=targets.energies + other, stresses=targets.stresses * torch.nan)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda t: replace(t, forces=-t.forces, stresses=t.stresses * torch.nan), "energies", "wrong sign"),
        (lambda t: replace(t, energies=t.energies / 27.2114, stresses=t.stresses * torch.nan), "energies", "Hartree"),
        (lambda t: with_forces(t, lambda f: f[:, [1, 0, 3, 2]]), "energies", "the forces contradict the energies"),
        (lambda t: with_forces(t, lambda f: f.roll(1, 0)), "energies", "the forces contradict the energies"),
        (lambda t: with_forces(t, lambda f: f[:, :, [1, 2, 0]]), "energies", "the forces contradict the energies"),
        (lambda t: with_forces(t, lambda f: f * 0.529177 / 27.2114), "energies", "the forces are in Hartree/Bohr"),
        (lambda t: with_forces(t, lambda f: f * 0.529177), "energies", "the forces are in eV/Bohr"),
        (
            lambda t: with_forces(replace(t, energies=t.energies / 27.2114), lambda f: f * 0.529177 / 27.2114),
            "energies",
            "the energies are in Hartree and the forces are in Hartree/Bohr",
        ),
        (with_another_zero, "energies", "of two zeros"),
        (lambda t: replace(t, stresses=-t.stresses), "stresses", "the sign is the opposite one"),
    ],
)
def test_kinds_that_a_fit_gives_up_as_noise(data, change, kind, words):
    """No two frames are near enough to tell, but the fit cannot follow all labels."""
    structures, targets, *_ = data
    _, report = gpmlp.fit(structures, change(targets), Recipe(**SMALL))
    named = {"energies": "energies-against-forces", "stresses": "stresses-against-energies"}[kind]
    (found,) = [f for f in report.findings if f.kind == named]
    assert found.severity == "error" and words in found.message, report.findings


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_gradients_in_some_of_the_frames_are_named(data, share):
    structures, targets, *_ = data
    wrong = torch.randperm(40, generator=torch.Generator().manual_seed(0))[: int(40 * share)]
    turned = targets.forces.view(-1, 4, 3).index_put((wrong,), -targets.forces.view(-1, 4, 3)[wrong])
    labels = replace(targets, forces=turned.reshape(-1, 3), stresses=targets.stresses * torch.nan)
    _, report = gpmlp.fit(structures, labels, Recipe(**SMALL))
    (found,) = [f for f in report.findings if f.kind == "forces-of-opposite-signs"]
    assert found.severity == "error" and "gradients" in found.message
    assert set(found.frames) <= {structures.names[i] for i in wrong.tolist()} and len(found.frames) >= 3


def test_stresses_in_the_order_of_another_code(data):
    """VASP's xx yy zz xy yz zx read as xx yy zz yz xz xy, in the frames of one config_type, is named; labels that are right are not."""
    structures, targets, *_ = data
    kinds = tuple("a" if i % 2 else "b" for i in range(len(structures)))
    right = replace(targets, config_types=kinds)
    _, report = gpmlp.fit(structures, right, Recipe(**SMALL))
    assert not [f for f in report.findings if f.kind == "stress-components-exchanged"]
    stresses = targets.stresses.clone()
    for i in (i for i, kind in enumerate(kinds) if kind == "a"):
        (xy, xz, yz) = (targets.stresses[i, a, b] for a, b in ((0, 1), (0, 2), (1, 2)))
        for (a, b), value in zip(((1, 2), (0, 2), (0, 1)), (xy, yz, xz), strict=True):
            stresses[i, a, b] = stresses[i, b, a] = value
    _, report = gpmlp.fit(structures, replace(right, stresses=stresses), Recipe(**SMALL))
    (found,) = [f for f in report.findings if f.kind == "stress-components-exchanged"]
    assert found.frames == tuple(n for n, kind in zip(structures.names, kinds, strict=True) if kind == "a")
    assert "(a) have as yz, xz, xy of their stresses seems to be xy, yz, xz" in found.message, found.message


def test_isolated_atoms_of_another_reference_are_left_out(data):
    structures, targets, test, true = data
    right = errors(gpmlp.fit(structures, targets, Recipe(**SMALL))[0], test, true)
    lone = gpmlp.Structures(
        torch.zeros(1, 3).double(),
        torch.zeros(1, 3, 3).double(),
        torch.zeros(1, 3, dtype=torch.bool),
        torch.tensor([29]),
        torch.tensor([0]),
        ("lone atom",),
    )
    label = replace(
        gpmlp.Targets.unlabelled(lone), energies=torch.tensor([500.0]).double(), config_types=("isolated_atom",)
    )
    both = gpmlp.Structures.concatenate([lone, structures]), gpmlp.Targets.concatenate([label, targets])
    potential, report = gpmlp.fit(*both, Recipe(**SMALL))
    assert report.findings[0].kind == "isolated-atoms-of-another-reference"
    assert errors(potential, test, true) == pytest.approx(right, rel=0.3)


def test_the_command_fits_without_them_and_the_model_file_keeps_the_findings(data, tmp_path, capsys):
    structures, targets, *_ = data
    energies = targets.energies.clone()
    energies[7] += 4 * 0.6
    file, model = tmp_path / "train.xyz", tmp_path / "model.gpmlp"
    ase_atoms.write_frames(file, ase_atoms.to_ase(structures, replace(targets, energies=energies)))
    choices = ["--set", "inducing.n=20", "--set", "inducing.gradients=1", "--set", "novelty=false"]
    assert main(["fit", str(file), "-o", str(model), "--robust", *choices]) == 0
    said = capsys.readouterr().err
    assert "warning: train.xyz frame 7: the energy is +0.6" in said and "left out of the fit" in said
    assert main(["info", str(model), "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)["header"]["report"]["findings"]
    (kept,) = (f for f in findings if f["kind"] == "label-outlier-energy")
    assert kept["frames"] == ["train.xyz frame 7"] and kept["severity"] == "warning"
    assert main(["info", str(model)]) == 0
    assert "train.xyz frame 7" in capsys.readouterr().out
