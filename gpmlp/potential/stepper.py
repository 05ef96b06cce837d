"""Repeated prediction of the same atoms as they move, without host synchronisation between two neighbour searches: for GPUs."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import replace
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
from gpmlp.uncertainty.calibration import calibrate_prediction

RECORDED = 1 << 17  # atoms up to which a step is recorded as a CUDA graph: above, launches take no part of the time


class Stepper:
    """A potential bound to atoms: stepper(positions, cells) -> Prediction.

    Neighbours within `skin` beyond the cutoff are kept in a padded table (PaddedNeighbors) and searched again, on the device, when atoms
    may have come closer than that allows (ReferencePositions). A step between two searches is tensor operations of constant shape: up
    to RECORDED atoms it is recorded as a CUDA graph and replayed; on the CPU it is simply called.

    With `wait` the host asks before each step whether to search, and results are always right. Without it the host never waits for the
    device: how far atoms have moved is read two steps later, a search is due when 2/3 of the skin is used up, and should an atom use up
    the rest in two steps, all that is predicted then is NaN. So do not wrap atoms into the cell between two steps: an atom that jumps
    by a lattice vector has moved too far, and two steps are NaN before the next search.
    """

    def __init__(
        self,
        potential: Potential,
        structures: Structures,
        variance: bool = False,
        novelty: bool = False,
        sampled_forces: bool = False,
        skin: float = 0.6,
        wait: bool = True,
        graphs: bool = True,
    ) -> None:
        """Bind a potential to atoms; results are on its device.

        Args:
            structures: the atoms, in their first positions.
            variance: whether variances of local energies are wanted, calibrated; novelty: whether novelties are.
            sampled_forces: whether estimates of force covariances are wanted, calibrated (force_samples.py); they make the host wait.
            skin: A.
            graphs: whether CUDA graphs may be recorded.

        Raises:
            UserError: a potential with another descriptor than SOAP, or without what was asked for; a species that was not in the
                training data; no atoms; a skin that is not positive.
        """
        species_model.check_supported(potential)
        errors.check_positive("skin", skin)
        potential.check_species(structures)
        if not structures.n_atoms:
            raise errors.UserError("There are no atoms to step.")
        if variance or sampled_forces:
            potential.check_variance("atom_energies")
        if novelty and potential.novelty is None:
            raise errors.UserError("This model holds no Mahalanobis distances: fit it again with `novelty: true`.")
        self.potential, self.skin, self.wait = potential, skin, wait
        self.structures = potential.to_own_device(structures)
        self._variance, self._novelty, self._sampled = variance, novelty, sampled_forces
        widened = potential.calibration.typical_novelty is not None and potential.novelty is not None
        self._widened = widened and (variance or sampled_forces)
        species = self.structures.species
        self._slots = torch.searchsorted(torch.tensor(potential.species, device=species.device), species)
        self._rows = species.argsort(stable=True)
        self._of_structures = SegmentSums.from_segments(
            self.structures.structure_of_atom[self._rows], len(self.structures)
        )
        self._chunks = self._species_chunks()
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
        shape = self.structures.positions.shape
        errors.check_shape("positions", positions, shape, "A Stepper is bound to its atoms: make another.")
        if cell is not None:
            hint = "Rows are lattice vectors; for one structure pass cell[None]."
            errors.check_shape("cell", cell, self.structures.cells.shape, hint)
        positions = positions.detach().to(self.structures.positions)
        cell = self.structures.cells if cell is None else cell.detach().to(self.structures.cells)
        if self._search_due(positions, cell):
            self._search(positions, cell)
        if self._graphs:
            self._replay = self._replay or record_graph(self._step, positions, cell)
        *fields, extremes = (self._replay or self._step)(positions, cell)
        self._watch(extremes, positions, cell)
        return self._prediction(*fields)

    def _search_due(self, positions: Tensor, cell: Tensor) -> bool:
        """Whether to search before this step."""
        if self._reference is None:
            return True
        if self.wait:
            return not bool(self._reference.displacement(self.structures, positions, cell).amax() < self.skin)
        displacement, nearest = self._extremes_of_last_but_one()
        if nearest < neighbors.CLOSEST**2:
            raise errors.UserError(
                f"Two steps ago two atoms were {math.sqrt(nearest):.3f} A apart (closer than {neighbors.CLOSEST} A): take a "
                "shorter time step or relax the start; a Stepper with wait=True names the atoms."
            )
        return not displacement < self.skin * 2 / 3

    def _search(self, positions: Tensor, cell: Tensor) -> None:
        """Make the table again; a recorded step stays good if the new table fits into the old one."""
        moved = self.structures.with_positions(positions, cell)
        reach = self.potential.reach + self.skin
        pairs = neighbors.find_neighbors(moved, reach)
        width = self._table.width if self._table is not None else 0
        n_species = len(self.potential.species)
        table = PaddedNeighbors.from_neighbors(pairs, moved, self._rows, self._slots, n_species, width)
        reference = ReferencePositions.from_structures(moved, reach)
        if self._table is not None and self._reference is not None and self._table.copy_from(table):
            self._reference.copy_from(reference)
        else:
            self._table, self._reference, self._replay = table, reference, None
        self._pending.clear()
        self.searches += 1

    def _watch(self, extremes: Tensor, positions: Tensor, cell: Tensor) -> None:
        """Check the largest displacement and the least squared distance now, or send them to the host."""
        if self.wait:
            if not bool(extremes[1] >= neighbors.CLOSEST**2):  # a search says which atoms
                neighbors.find_neighbors(self.structures.with_positions(positions, cell), self.potential.reach)
            return
        here = torch.empty(2, dtype=extremes.dtype, pin_memory=extremes.is_cuda)
        here.copy_(extremes, non_blocking=True)
        event = torch.cuda.Event() if extremes.is_cuda else None
        if event is not None:
            event.record()
        self._pending.append((here, event))

    def _extremes_of_last_but_one(self) -> tuple[float, float]:
        """What `_watch` was given two steps ago; not that of the last step, on which the device may still work."""
        if len(self._pending) < 2:
            return 0.0, math.inf
        here, event = self._pending.popleft()
        if event is not None:
            event.synchronize()
        displacement, nearest = here.tolist()
        return displacement, nearest

    def _species_chunks(self) -> list[tuple[int, int, SpeciesModel]]:
        """Rows of one species, ENVIRONMENTS of them at most, and the model that predicts them."""
        chunks, start = [], 0
        novelty = self._novelty or self._widened
        counts = zip(*(part.tolist() for part in self.structures.species.unique(return_counts=True)), strict=True)
        for z, count in counts:
            model = SpeciesModel.from_potential(self.potential, z, self._variance, novelty, self._sampled)
            edges = [*range(start, start + count, ENVIRONMENTS), start + count]
            chunks += [(first, last, model) for first, last in pairwise(edges)]
            start += count
        return chunks

    def _step(self, positions: Tensor, cell: Tensor) -> tuple:
        """Arguments of `_prediction`, and the largest displacement with the least squared distance."""
        table, reference = self._table, self._reference
        assert table is not None and reference is not None, "_search comes first"
        members = self.potential.force_samples.members if self._sampled else 0
        gradients = positions.new_empty(*table.neighbors.shape, 3)
        sampled = gradients.new_empty(members, *gradients.shape)
        virials, nearest, parts = [], [], []
        for start, end, model in self._chunks:
            vectors = table.vectors(positions, cell, start, end)
            part = model(vectors)
            gradients[start:end] = part.slopes
            if part.sampled is not None:
                sampled[:, start:end] = part.sampled
            virials.append(vectors.flatten(1, 2).mT @ part.slopes.flatten(1, 2))
            nearest.append(vectors.square().sum(3).amin())
            parts.append(part)
        forces = torch.cat([table.forces(gradients, start, end) for start, end, _ in self._chunks])
        displacement = reference.displacement(self.structures, positions, cell).amax()
        # fills, as torch.where would fetch its number from the host
        missing = ~(displacement < self.skin)
        volumes = torch.linalg.cross(cell[:, 0], cell[:, 1]).mul(cell[:, 2]).sum(1).abs()
        volumes = volumes.masked_fill(~self._has_volume, math.nan)
        virial = self._of_structures(torch.cat(virials)) / volumes[:, None, None]

        def joined(name: str) -> Tensor | None:
            values = [getattr(part, name) for part in parts]
            return None if values[0] is None else self._in_order(torch.cat(values), missing)

        local = torch.cat([part.energies for part in parts])
        return (
            self._of_structures(local).masked_fill(missing, math.nan),
            self._in_order(local, missing),
            self._in_order(forces, missing),
            (0.5 * (virial + virial.mT)).masked_fill(missing, math.nan),
            *(joined(name) for name in ("inducing", "data", "novelty")),
            self._deviations(table, sampled, missing),
            torch.stack([displacement, torch.stack(nearest).amin()]),
        )

    def _deviations(self, table: PaddedNeighbors, sampled: Tensor, missing: Tensor) -> Tensor | None:
        """(members, atoms, 3) forces of what posterior samples add to the mean, eV/A, from their pair gradients."""
        if not self._sampled:
            return None
        spans = [(start, end) for start, end, _ in self._chunks]
        forces = [torch.cat([table.forces(member, *span) for span in spans]) for member in sampled]
        return torch.stack([self._in_order(rows, missing) for rows in forces])

    def _in_order(self, rows: Tensor, missing: Tensor) -> Tensor:
        """Rows in the order of the atoms; NaN where pairs may be missing."""
        return torch.empty_like(rows).index_copy_(0, self._rows, rows).masked_fill_(missing, math.nan)

    def _prediction(
        self, energies: Tensor, local: Tensor, forces: Tensor, stresses: Tensor,
        inducing: Tensor | None, data: Tensor | None, novelty: Tensor | None, deviations: Tensor | None,
    ) -> Prediction:  # fmt: skip
        variance = None
        if inducing is not None and data is not None:
            none = torch.zeros_like(inducing)
            variance = Variance(inducing, data, none, none)
        sampled = None if deviations is None else self.potential.force_samples.covariance(deviations)
        prediction = Prediction(
            energies, local, forces, stresses,
            atom_energies_variance=variance, sampled_forces_covariance=sampled, novelty=novelty,
        )  # fmt: skip
        if self._variance or self._sampled:
            prediction = calibrate_prediction(prediction, self.structures, self.potential.calibration)
        return prediction if self._novelty else replace(prediction, novelty=None)


def record_graph(step: Callable[..., tuple], *inputs: Tensor) -> Callable[..., tuple]:
    """A step as a CUDA graph: replayed on copies of its inputs, with copies of its outputs.

    Elsewhere than on CUDA the step itself; so too, with a DataWarning, where it cannot be recorded.
    """
    if not inputs[0].is_cuda:
        return step
    try:
        return _recorded(step, *inputs)
    except (
        Exception
    ) as error:  # of any library that the step calls; if the step itself is wrong, calling it will say so
        why = f"A step cannot be recorded as a CUDA graph ({type(error).__name__}: {error}): it is called."
        warnings.warn(why, errors.DataWarning, stacklevel=4)
        return step


def _recorded(step: Callable[..., tuple], *inputs: Tensor) -> Callable[..., tuple]:
    buffers = [value.clone() for value in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # libraries and kernels get ready outside of what is recorded
            step(*buffers)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(*buffers)

    def replay(*values: Tensor) -> tuple:
        for buffer, value in zip(buffers, values, strict=True):
            buffer.copy_(value)
        graph.replay()
        return tuple(None if part is None else part.clone() for part in outputs)

    return replay
