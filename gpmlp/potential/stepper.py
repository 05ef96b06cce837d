"""Stepper predicts the same atoms again and again as they move, without the host between two searches of neighbours: for GPUs."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from gpmlp.core import errors, neighbors
from gpmlp.core.padded_neighbors import PaddedNeighbors, SegmentSums
from gpmlp.core.quantities import Prediction, Variance
from gpmlp.core.structures import Structures
from gpmlp.core.verlet_list import ReferencePositions
from gpmlp.descriptors.gpu import ENVIRONMENTS
from gpmlp.potential import species_model
from gpmlp.potential.potential import Potential
from gpmlp.potential.species_model import SpeciesModel
from gpmlp.uncertainty.calibration import calibrate_variance, novelty_factor

RECORDED = 1 << 17  # atoms up to which a step is recorded as a CUDA graph: above, launches take no part of the time


class Stepper:
    """A potential bound to atoms: stepper(positions, cells) -> Prediction.

    Neighbours within `skin` beyond the cutoff are kept in a table (PaddedNeighbors) and searched again, on the device, when atoms may
    have come closer than that allows (Reference). A step between two searches is a run of tensor operations of constant shape: up to
    RECORDED atoms it is recorded as a CUDA graph and replayed; on the CPU it is simply called.

    With `wait` the host asks before each step whether to search, and results are always right. Without it the device is never waited
    for: what a step has to say is read two steps later, a search is due when 2/3 of the skin is used up, and should an atom use up the
    rest in two steps, all that is predicted then is NaN. So do not wrap atoms into the cell between its steps: an atom that jumps by a
    lattice vector has gone too far, and two steps are NaN before the search that sees it.
    """

    def __init__(
        self,
        potential: Potential,
        structures: Structures,
        variance: bool = False,
        novelty: bool = False,
        skin: float = 0.6,
        wait: bool = True,
        graphs: bool = True,
    ) -> None:
        """Bind a potential to atoms; results are on its device.

        Args:
            structures: the atoms, in their first positions.
            variance: whether variances of local energies are wanted, calibrated; novelty: whether novelties are.
            skin: A.
            graphs: whether CUDA graphs may be recorded.

        Raises:
            UserError: a potential with another descriptor than SOAP, or without what was asked for; a species that it does not know; no
                atoms; a skin that is not positive.
        """
        species_model.check_supported(potential)
        errors.check_positive("skin", skin)
        potential.check_species(structures)
        if not structures.n_atoms:
            raise errors.UserError("There are no atoms to step.")
        if variance:
            potential.check_variance("atom_energies")
        if novelty and potential.novelty is None:
            raise errors.UserError("This model holds no Mahalanobis distances: fit it again with `novelty: true`.")
        self.potential, self.skin, self.wait = potential, skin, wait
        own = {"device": potential.recipe.device, "dtype": getattr(torch, potential.recipe.dtype)}
        self.structures = structures.to(**own)
        self._widens = variance and potential.calibration.typical_novelty is not None and potential.novelty is not None
        self._wanted = variance, novelty
        species = self.structures.species
        self._slots = torch.searchsorted(torch.tensor(potential.species, device=species.device), species)
        self._rows = species.argsort(stable=True)
        self._of_structures = SegmentSums.from_segments(
            self.structures.structure_of_atom[self._rows], len(self.structures)
        )
        self._chunks = self._cut()
        periodic = self.structures.periodic.any(1)
        self._has_volume = periodic & (torch.linalg.det(self.structures.cells).abs() > 1e-6)
        self._graphs = graphs and species.is_cuda and len(species) <= RECORDED
        self._table: PaddedNeighbors | None = None
        self._reference: ReferencePositions | None = None
        self._replay: Callable[..., tuple] | None = None
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self.searches = 0

    @torch.no_grad()
    def __call__(self, positions: Tensor, cell: Tensor | None = None) -> Prediction:
        """Predict.

        Args:
            positions: (atoms, 3) A, on the potential's device; cell: (structures, 3, 3) A, those at the start if not given.

        Raises:
            UserError: positions of another number of atoms, or cells of structures, than were bound; atoms on top of each other
                (without `wait`, two steps later); a position that is no number, at a search.
        """
        errors.check_shape(
            "positions", positions, self.structures.positions.shape, "A Stepper is bound to its atoms: make another."
        )
        if cell is not None:
            errors.check_shape(
                "cell",
                cell,
                self.structures.cells.shape,
                "Rows are lattice vectors; for one structure pass cell[None].",
            )
        positions = positions.detach().to(self.structures.positions)
        cell = self.structures.cells if cell is None else cell.detach().to(self.structures.cells)
        if self._due(positions, cell):
            self._search(positions, cell)
        if not self._graphs:
            outputs = self._step(positions, cell)
        else:
            self._replay = self._replay or record_graph(self._step, positions, cell)
            outputs = self._replay(positions, cell)
        *found, watch = outputs
        self._watch(watch, positions, cell)
        return self._prediction(*found)

    def _due(self, positions: Tensor, cell: Tensor) -> bool:
        """Whether to search before this step."""
        if self._reference is None:
            return True
        if self.wait:
            return not bool(self._reference.displacement(self.structures, positions, cell).amax() < self.skin)
        gone, nearest = self._read()
        if nearest < neighbors.CLOSEST**2:
            raise errors.UserError(
                f"Two steps ago two atoms were {math.sqrt(nearest):.3f} A apart (closer than {neighbors.CLOSEST} A): take a "
                "shorter time step or relax the start; a Stepper with wait=True names the atoms."
            )
        return not gone < self.skin * 2 / 3

    def _search(self, positions: Tensor, cell: Tensor) -> None:
        """Make the table again; a recorded step stays good if the new table fits into the old one."""
        moved = self.structures.with_positions(positions, cell)
        reach = self.potential.reach + self.skin
        pairs = neighbors.find_neighbors(moved, reach)
        width = self._table.width if self._table is not None else 0
        table = PaddedNeighbors.from_neighbors(
            pairs, moved, self._rows, self._slots, len(self.potential.species), width
        )
        reference = ReferencePositions.from_structures(moved, reach)
        if self._table is not None and self._table.copy_from(table):
            self._reference.copy_from(reference)
        else:
            self._table, self._reference, self._replay = table, reference, None
        self._pending.clear()
        self.searches += 1

    def _watch(self, watch: Tensor, positions: Tensor, cell: Tensor) -> None:
        """Note how far atoms have gone, and the least squared distance: asked for now, or on its way to the host."""
        if self.wait:
            if not bool(watch[1] >= neighbors.CLOSEST**2):
                neighbors.find_neighbors(
                    self.structures.with_positions(positions, cell), self.potential.reach
                )  # says what is wrong
            return
        here = torch.empty(2, dtype=watch.dtype, pin_memory=watch.is_cuda)
        here.copy_(watch, non_blocking=True)
        event = torch.cuda.Event() if watch.is_cuda else None
        if event is not None:
            event.record()
        self._pending.append((here, event))

    def _read(self) -> tuple[float, float]:
        """What the step before the last had to say; not the last one, which the device may still work on."""
        if len(self._pending) < 2:
            return 0.0, math.inf
        here, event = self._pending.popleft()
        if event is not None:
            event.synchronize()
        gone, nearest = here.tolist()
        return gone, nearest

    def _cut(self) -> list[tuple[int, int, SpeciesModel]]:
        """Rows of one species, ENVIRONMENTS of them at most, and what predicts them."""
        chunks, start = [], 0
        counts = zip(*(part.tolist() for part in self.structures.species.unique(return_counts=True)), strict=True)
        variance, novelty = self._wanted
        for z, count in counts:
            centre = SpeciesModel.from_potential(self.potential, z, variance, novelty or self._widens)
            edges = [*range(start, start + count, ENVIRONMENTS), start + count]
            chunks += [(first, last, centre) for first, last in pairwise(edges)]
            start += count
        return chunks

    def _step(self, positions: Tensor, cell: Tensor) -> tuple[Tensor | None, ...]:
        """Energies, local energies, forces, stresses, parts of the variance, novelty; and what to watch."""
        table = self._table
        gradients = positions.new_empty(*table.neighbors.shape, 3)
        virials, nearest, found = [], [], []
        for start, end, centre in self._chunks:
            vectors = table.vectors(positions, cell, start, end)
            local = centre(vectors)
            gradients[start:end] = local.slopes
            virials.append(vectors.flatten(1, 2).mT @ local.slopes.flatten(1, 2))
            nearest.append(vectors.square().sum(3).amin())
            found.append(local)
        forces = torch.cat([table.forces(gradients, start, end) for start, end, _ in self._chunks])
        gone = self._reference.displacement(self.structures, positions, cell).amax()
        # fills, as torch.where would fetch its number from the host
        missing = ~(gone < self.skin)
        volumes = torch.linalg.cross(cell[:, 0], cell[:, 1]).mul(cell[:, 2]).sum(1).abs()
        volumes = volumes.masked_fill(~self._has_volume, math.nan)
        virial = self._of_structures(torch.cat(virials)) / volumes[:, None, None]

        def joined(name: str) -> Tensor | None:
            """Of all atoms, in their order."""
            parts = [getattr(local, name) for local in found]
            return None if parts[0] is None else self._in_order(torch.cat(parts), missing)

        local = torch.cat([part.energies for part in found])
        return (
            self._of_structures(local).masked_fill(missing, math.nan),
            self._in_order(local, missing),
            self._in_order(forces, missing),
            (0.5 * (virial + virial.mT)).masked_fill(missing, math.nan),
            *(joined(name) for name in ("inducing", "data", "novelty")),
            torch.stack([gone, torch.stack(nearest).amin()]),
        )

    def _in_order(self, rows: Tensor, missing: Tensor) -> Tensor:
        """Of atoms from rows; NaN where pairs may be missing."""
        return torch.empty_like(rows).index_copy_(0, self._rows, rows).masked_fill_(missing, math.nan)

    def _prediction(
        self, energies: Tensor, local: Tensor, forces: Tensor, stresses: Tensor,
        inducing: Tensor | None, data: Tensor | None, novelty: Tensor | None,
    ) -> Prediction:  # fmt: skip
        variance = None
        if inducing is not None:
            none, calibration = torch.zeros_like(inducing), self.potential.calibration
            grown = novelty_factor(novelty, calibration.typical_novelty) if self._widens else 1.0
            # local energies have no labels: calibrated as the forces are, as in variances.rescaled
            variance = calibrate_variance(
                Variance(inducing * grown, data * grown, none, none), calibration.kinds["forces"]
            )
        return Prediction(
            energies, local, forces, stresses,
            atom_energies_variance=variance, novelty=novelty if self._wanted[1] else None,
        )  # fmt: skip


def record_graph(step: Callable[..., tuple], *inputs: Tensor) -> Callable[..., tuple]:
    """A step as a CUDA graph: replayed on copies of its inputs, with copies of its outputs. Elsewhere than on CUDA the step itself, and
    where it cannot be recorded, with a DataWarning."""
    if not inputs[0].is_cuda:
        return step
    try:
        return _recorded(step, *inputs)
    except (
        Exception
    ) as error:  # of any library that the step calls: called as it is, it says whether it can be done at all
        why = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"A step cannot be recorded as a CUDA graph ({why}): it is called.", errors.DataWarning, stacklevel=4
        )
        return step


def _recorded(step: Callable[..., tuple], *inputs: Tensor) -> Callable[..., tuple]:
    kept = [value.clone() for value in inputs]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):  # libraries and kernels get ready outside of what is recorded
            step(*kept)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(*kept)

    def replay(*values: Tensor) -> tuple:
        for place, value in zip(kept, values, strict=True):
            place.copy_(value)
        graph.replay()
        return tuple(None if part is None else part.clone() for part in outputs)

    return replay
