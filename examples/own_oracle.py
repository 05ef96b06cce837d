"""How does gpmlp learn on the fly from a reference method of my own?

The oracle is a class with one method, here a Morse potential of 13 copper atoms in place of an expensive code.
"""

import dataclasses

import ase.cluster
import torch

import gpmlp
from gpmlp.learning.recipe import LearnRecipe

DEPTH, WIDTH, DISTANCE = 0.34, 1.36, 2.87  # eV, 1/A, A: copper


class Morse:
    """E = sum over pairs of D [(1 - exp(-a (r - r0)))^2 - 1]."""

    def label(self, structures: gpmlp.Structures) -> gpmlp.Targets:
        positions = structures.positions.clone().requires_grad_()
        closeness = torch.exp(-WIDTH * (torch.pdist(positions) - DISTANCE))
        energy = DEPTH * ((1 - closeness) ** 2 - 1).sum()
        (slope,) = torch.autograd.grad(energy, positions)
        return dataclasses.replace(gpmlp.Targets.unlabelled(structures), energies=energy.detach()[None], forces=-slope)


if __name__ == "__main__":  # the run imports this file to find the oracle
    ase.cluster.Icosahedron("Cu", 2).write("own_oracle.xyz")
    recipe = LearnRecipe(
        start="own_oracle.xyz",
        oracle={"calculator": "own_oracle:Morse", "executor": "inline"},
        dynamics={"temperature_K": 300, "steps": 200},
        trigger={"share": 0.5},  # of the rms force, which an error may have
        bootstrap={"n": 6},
        output="own_oracle_run",
    )
    *_, last = gpmlp.learn(recipe)
    reason = last.stopped.partition(";")[0]
    print(f"{last.labels} labels for errors of forces up to {last.limits.force:.2f} eV/A; {reason}")
