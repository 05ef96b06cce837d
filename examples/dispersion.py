"""How do I add any energy term that I know to what is learned?

A term is a class; here D2 for PBE (Grimme, J. Comput. Chem. 27, 1787 (2006)) draws two molecules of ethanol together that are far apart.
"""

from dataclasses import replace
from pathlib import Path

import torch

import gpmlp
from gpmlp.io.ase_atoms import read_frames, structures_from_ase
from gpmlp.potential.baseline import LocalBaseline

DATA = Path(__file__).resolve().parents[1] / "data/ethanol"
C6 = 10.364 * torch.tensor([0, 0.14, 0, 0, 0, 0, 1.75, 0, 0.70]).double()  # by atomic number, J nm^6 / mol in eV A^6
RADIUS = torch.tensor([0, 1.001, 0, 0, 0, 0, 1.452, 0, 1.342]).double()  # A


class Dispersion(LocalBaseline):
    cutoff = 15.0  # A; a pair beyond has less than 2e-6 eV

    def of_atoms(self, structures, pairs, start, end):
        near = pairs.within(structures, self.cutoff)
        vectors = near.vectors(structures).detach().requires_grad_()
        r, i, j = vectors.norm(dim=1), structures.species[near.centers], structures.species[near.neighbors]
        damping = torch.sigmoid(20 * (r / (RADIUS[i] + RADIUS[j]) - 1))
        halves = -0.5 * 0.75 * (C6[i] * C6[j]).sqrt() / r**6 * damping  # of each pair's energy to each of its atoms
        (gradients,) = torch.autograd.grad(halves.sum(), vectors)
        return halves.new_zeros(end - start).index_add(0, near.centers - start, halves.detach()), near, gradients


recipe = gpmlp.Recipe(descriptor={"cutoff": 4.0}, inducing={"n": 60})
learned, _ = gpmlp.fit(*gpmlp.read(DATA / "train.xyz", "::4"), recipe)
potential = replace(learned, baselines=(*learned.baselines, Dispersion()))
molecule = read_frames(DATA / "test.xyz", "-1:")[0][0]
for distance in (9.0, 11.0, 13.0):
    (other := molecule.copy()).translate([distance, 0, 0])
    dimer, one = potential(structures_from_ase([molecule + other, molecule])).energies
    print(f"{distance:4.1f} A: {1e3 * (dimer - 2 * one):.3f} meV")
