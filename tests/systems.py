"""Small structures, and one case of every descriptor, kernel and baseline that the package knows: what the batteries run over."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import get_args

import torch
import toy_network
from torch import Tensor

from gpmlp import descriptors
from gpmlp.core import neighbors, parallel
from gpmlp.core.environments import Descriptor, StructureEnvironments, Surroundings
from gpmlp.core.quantities import Prediction, Targets
from gpmlp.core.structures import Structures
from gpmlp.descriptors import radial
from gpmlp.gp.kernels import ExponentialKernel, PolynomialKernel, SumKernel, ZonalKernel, make_kernel
from gpmlp.native import library
from gpmlp.potential import baselines, chunked
from gpmlp.potential.charges import ChargeBasis
from gpmlp.potential.mean import EnergyTerm, LowRankForm, MeanBlock, ProjectedCentres
from gpmlp.potential.potential import Potential
from gpmlp.recipe import DescriptorRecipe, KernelRecipe, Recipe

CUTOFF = 3.6  # A: of every descriptor here, so that environments hold a handful of neighbours
SPECIES = (1, 6, 8)


def structure(positions, species, cell=None, periodic=(False, False, False)) -> Structures:
    """One structure from plain lists or tensors."""
    positions = torch.as_tensor(positions, dtype=torch.float64)
    cell = torch.zeros(3, 3) if cell is None else torch.as_tensor(cell)
    species = torch.as_tensor(species)
    return Structures(
        positions, cell.double()[None], torch.tensor([periodic]), species, torch.zeros(len(species), dtype=torch.long)
    )


def scattered(n: int, box: Tensor, seed: int, closest: float = 1.1) -> Tensor:
    """n random points in a box (rows are its edges), none closer to another than `closest` in the open box."""
    generator = torch.Generator().manual_seed(seed)
    points: list[Tensor] = []
    while len(points) < n:
        trial = torch.rand(3, generator=generator, dtype=torch.float64) @ box
        if all((trial - p).norm() > closest for p in points):
            points.append(trial)
    return torch.stack(points)


def cluster(species=(6, 1, 8, 1, 6), seed: int = 0, size: float = 3.2) -> Structures:
    """An isolated molecule-like heap of atoms."""
    return structure(scattered(len(species), size * torch.eye(3, dtype=torch.float64), seed), species)


TRICLINIC = torch.tensor([[3.1, 0.2, -0.3], [0.9, 3.4, 0.4], [-0.6, 0.8, 3.7]], dtype=torch.float64)
LEFT_HANDED = TRICLINIC[[1, 0, 2]]
CELLS = {  # cell and periodic axes; lengths are below the cutoff in most, so that atoms see their own images
    "cubic": (3.9 * torch.eye(3, dtype=torch.float64), (True, True, True)),
    "triclinic": (TRICLINIC, (True, True, True)),
    "left-handed": (LEFT_HANDED, (True, True, True)),
    "slab": (torch.diag(torch.tensor([3.3, 3.5, 14.0], dtype=torch.float64)), (True, True, False)),
    "slab-no-height": (
        torch.tensor([[3.3, 0.2, 0.0], [0.4, 3.5, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64),
        (True, True, False),
    ),
    "wire": (torch.diag(torch.tensor([3.3, 9.0, 9.0], dtype=torch.float64)), (True, False, False)),
}


def crystal(kind: str = "triclinic", species=(6, 8), seed: int = 1) -> Structures:
    """Atoms in one of CELLS, placed so that neither they nor their images are closer than about 1.2 A."""
    cell, periodic = CELLS[kind]
    fractions = torch.tensor([[0.05, 0.10, 0.02], [0.52, 0.47, 0.55], [0.10, 0.55, 0.60]], dtype=torch.float64)[
        : len(species)
    ]
    box = cell.clone()
    for axis in range(3):
        if not periodic[axis]:
            box[axis] = torch.nn.functional.one_hot(torch.tensor(axis), 3).double() * 3.0
    noise = torch.rand(len(species), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return structure(fractions @ box + 0.15 * noise, species, cell, periodic)


def everything() -> Structures:
    """One of each kind of structure, of several species, in one batch."""
    return Structures.concatenate([cluster(), *(crystal(kind) for kind in CELLS), structure([[0, 0, 0]], [1])])


def dimer(r: float, species=(6, 8)) -> Structures:
    return structure([[0, 0, 0], [0.6 * r, 0, 0.8 * r]], species)


# one case of everything that is registered ----------------------------------------------------------------------------------


def _descriptor_cases() -> dict[str, dict]:
    plain = {
        "cutoff": CUTOFF,
        "n_max": 3,
        "l_max": 3,
        "sigma_atom": 0.5,
        "basis": "gto",
        "cutoff_function": "smoothstep",
        "cutoff_width": 1.0,
        "cutoff_exponent": 2.0,
        "central_weight": 1.0,
        "shortest": 1.0,
        "radial_scaling": {"scale": 2.0, "exponent": 3.0},
    }
    cases = {}
    for name in descriptors.NAMES:
        if name == "soap":
            for basis in radial.BASES:
                cases[f"soap {basis}"] = plain | {"name": name, "basis": basis}
            cases["soap poly"] = plain | {"name": name, "cutoff_function": "poly", "radial_scaling": False}
            four_body = {"channels": 3, "l_max": 3, "weight": 0.5}
            cases["four-body soap"] = plain | {"name": name, "four_body": four_body}
            cases["compressed soap"] = plain | {"name": name, "compression": {"channels": 5}}
            cases["compressed four-body soap"] = cases["compressed soap"] | {"four_body": four_body}
        else:
            cases[name] = plain | {"name": name}
    return cases


DESCRIPTORS = _descriptor_cases()


def descriptor(case: str, species: tuple[int, ...] = SPECIES, **changes) -> Descriptor:
    """The descriptor of a case of DESCRIPTORS, some of its parameters changed."""
    some = Structures.concatenate([cluster((*species, z), 60 + k) for k, z in enumerate(species)])
    return descriptors.learn_descriptor(species, DESCRIPTORS[case] | changes, some, 0)


def _kernel_cases() -> dict[str, ZonalKernel]:
    cases: dict[str, ZonalKernel] = {}
    for name in get_args(KernelRecipe.model_fields["name"].annotation):
        if name == "polynomial":
            cases |= {f"polynomial {zeta}": make_kernel(KernelRecipe(name=name, zeta=zeta)) for zeta in (1, 2, 3, 4)}
        elif name == "sum":
            terms = [PolynomialKernel(2), ExponentialKernel(0.6)]
            cases[name] = SumKernel(terms, [0.7, 1.9])
        else:
            cases[name] = make_kernel(KernelRecipe(name=name, length=0.7))
    return cases


KERNELS = _kernel_cases()


def _baseline_cases() -> dict:
    pairs = [(a, b) for a in SPECIES for b in SPECIES if a <= b]
    made = {
        "IsolatedAtoms": lambda: baselines.IsolatedAtoms({1: -13.5, 6: -1029.0, 8: -2041.0}),
        "ZBL": lambda: baselines.ZBL(dict.fromkeys(pairs, 0.9), dict.fromkeys(pairs, CUTOFF - 0.5)),
    }
    # a baseline is what has a state() and can be called; one without a case here is a KeyError
    known = [n for n, c in inspect.getmembers(baselines, inspect.isclass) if hasattr(c, "state")]
    known = [n for n in known if n not in ("Baseline", "LocalBaseline")]
    # the first is in TERMS, the second is code of others, the last are of whole structures (test_dispersion.py)
    others = ("NetworkEnergies", "CalculatorEnergies", "R6Tail", "D3Dispersion")
    return {name: made[name] for name in known if name not in others}


BASELINES = _baseline_cases()


def network_descriptor(case: str | None = "soap gto", weight: float = 0.3) -> Descriptor:
    """Features of the toy network beside those of a case of DESCRIPTORS, or alone."""
    network = {"name": "network", "checkpoint": "toy", "layers": None, "weight": weight, "components": 7}
    parameters = network if case is None else DESCRIPTORS[case] | {"beside": network}
    return descriptors.learn_descriptor(SPECIES, parameters, everything(), 0)


class OwnTerm(EnergyTerm):
    """A term that can be called on structures, as baselines can."""

    def __call__(self, structures: Structures) -> Prediction:
        reach = min(self.descriptor.cutoff, CUTOFF)  # what has no cutoff makes its own list
        return chunked.predict_mean([self], structures, neighbors.find_neighbors(structures, reach).of_centers)


def random_term(made: Descriptor, kernel: ZonalKernel, seed: int = 3, scale: float = 1.0) -> EnergyTerm:
    """An energy term with random weights on values and on gradients: whatever a fit could come to."""
    generator = torch.Generator().manual_seed(seed)
    blocks = {}
    for z in SPECIES:
        source = Structures.concatenate([cluster((z, *SPECIES), 40 + z + k) for k in range(3)])
        centers = (source.species == z).nonzero()[:, 0]
        surroundings = Surroundings.from_structures(source, neighbors.find_neighbors(source, made.cutoff)).select(
            centers
        )
        x = made(surroundings).features
        weights = torch.randn(len(x), generator=generator, dtype=torch.float64)
        tangents = torch.randn(x.shape, generator=generator, dtype=torch.float64) / x.shape[1] ** 0.5
        blocks[z] = MeanBlock(x, scale * weights, scale * tangents)
    return OwnTerm(made, kernel, blocks)


def low_rank_form(block: MeanBlock, kernel: ZonalKernel, rank: int) -> LowRankForm:
    """The mean of a block with so many eigenvectors of its matrix, those of the largest eigenvalues."""
    form = block.quadratic_form(kernel)
    values, vectors = torch.linalg.eigh(form.hessian)
    kept = values.abs().argsort(descending=True)[:rank]
    return LowRankForm(form.linear, values[kept], vectors[:, kept].clone())


def projected_centres(block: MeanBlock, kernel: ZonalKernel, rank: int) -> ProjectedCentres:
    """The mean of a block in so many directions, drawn at random, with a constant and a linear part."""
    generator = torch.Generator().manual_seed(11)
    d = block.features.shape[1]
    vectors, other = (torch.linalg.qr(torch.randn(d, d, generator=generator).double())[0][:, :rank] for _ in range(2))
    duals = vectors + 0.1 * (other - vectors @ (vectors.T @ other))  # a projector that is not quite orthogonal
    constant, linear = torch.randn(1, generator=generator).double(), torch.randn(d, generator=generator).double()
    return ProjectedCentres.from_exact(block, kernel, vectors, duals, constant, linear)


def low_rank_term(made: Descriptor, rank: int = 3, kernel: str = "polynomial 2") -> EnergyTerm:
    """A random term with means of low rank."""
    term = random_term(made, KERNELS[kernel])
    make = projected_centres if term.kernel.quadratic is None else low_rank_form
    forms = {z: make(block, term.kernel, rank) for z, block in term.blocks.items()}
    return OwnTerm(term.descriptor, term.kernel, term.blocks, forms, exact=False)


def _term_cases() -> dict:
    """Every descriptor with one kernel, every kernel with one descriptor, a mean of low rank, every baseline: name -> energy term."""
    usual = KERNELS["polynomial 3"]
    cases = {name: (lambda name=name: random_term(descriptor(name), usual)) for name in DESCRIPTORS}
    first = next(iter(DESCRIPTORS))
    cases |= {f"{first} {k}": (lambda k=k: random_term(descriptor(first), KERNELS[k])) for k in KERNELS}
    cases |= {f"low rank {k}": (lambda k=k: low_rank_term(descriptor(first), 3, k)) for k in ("polynomial 2", "sum")}
    cases |= {"network beside soap": lambda: random_term(network_descriptor(), usual)}
    cases |= {"network alone": lambda: random_term(network_descriptor(None), usual)}
    cases |= {"NetworkEnergies": lambda: baselines.NetworkEnergies("network", "toy", toy_network.SHA256)}
    return cases | BASELINES


TERMS = _term_cases()


def mixed_potential(kernel: str = "polynomial 2") -> Potential:
    """A potential of several species with a random term and all baselines, whose mean the compiled core has; without variances."""
    term = random_term(descriptor("soap gto"), KERNELS[kernel])
    return Potential((term,), tuple(made() for made in BASELINES.values()), SPECIES, Recipe())


def reach(term) -> float:
    """Distance at which atoms stop seeing each other in an energy term; 0 where they never do."""
    # of the graph of a network that is
    return min(term.descriptor.cutoff, CUTOFF) if isinstance(term, EnergyTerm) else getattr(term, "cutoff", 0.0)


def single(term):
    """The same energy term with its weights in single precision."""
    if not isinstance(term, EnergyTerm):
        return term
    blocks = {z: MeanBlock(*(v.float() for v in vars(b).values())) for z, b in term.blocks.items()}
    forms = {}
    for z, form in term.low_rank.items():
        parts = {name: value.float() for name, value in form.stored().items()}
        if isinstance(form, LowRankForm):
            forms[z] = LowRankForm(**parts)
        else:
            forms[z] = ProjectedCentres.from_exact(blocks[z], term.kernel, **parts)
    return OwnTerm(term.descriptor, term.kernel, blocks, forms, term.exact)


def targets_of(structures: Structures, prediction: Prediction) -> Targets:
    """Labels equal to a prediction."""
    unknown = vars(Targets.unlabelled(structures))
    return Targets(
        **unknown | {"energies": prediction.energies, "forces": prediction.forces, "stresses": prediction.stresses}
    )


def rotation(seed: int = 0) -> Tensor:
    """A random proper rotation matrix."""
    q, r = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    q = q * r.diagonal().sign()
    return q if torch.linalg.det(q) > 0 else -q


def replicate(one: Structures, times: tuple[int, int, int]) -> Structures:
    """The same crystal in a larger cell; atoms of the first cell come first."""
    cell = one.cells[0]
    shifts = [
        torch.tensor([i, j, k], dtype=torch.float64) @ cell
        for i in range(times[0])
        for j in range(times[1])
        for k in range(times[2])
    ]
    positions = torch.cat([one.positions + s for s in shifts])
    larger = cell * torch.tensor(times, dtype=torch.float64)[:, None]
    return structure(positions, one.species.repeat(math.prod(times)), larger, tuple(one.periodic[0].tolist()))


def evaluate_by_core(model, given: Surroundings, errors: bool = False) -> list[Tensor]:
    """What the core's model gives of environments: local energies, pair gradients; with `errors` also standard deviations and novelties."""
    n, vectors = len(given), given.vectors
    made = [vectors.new_empty(n), torch.empty_like(vectors), *(vectors.new_empty(n) for _ in range(2 * errors))]
    parts = (t.contiguous() for t in (given.species, given.centers, given.neighbor_species, vectors, *made[:2]))
    asked = made[2:] or (0, 0)
    assert library.call("evaluate", model, n, len(vectors), *parts, 0, *asked, parallel.available_threads()) == 0
    return made


def surroundings_of(structures: Structures, cutoff: float = CUTOFF) -> Surroundings:
    """Every atom's neighbours."""
    return Surroundings.from_structures(structures, neighbors.find_neighbors(structures, cutoff))


def force_sigma_by_core(model, structures: Structures, pairs, atoms: Sequence[int]) -> Tensor:
    """Standard deviations of force components of these atoms (atoms, 3), from environments of all."""
    given = Surroundings.from_structures(structures, pairs)
    out, chosen = given.vectors.new_empty(len(atoms), 3), torch.tensor(atoms)
    parts = given.species, given.centers, pairs.neighbors, given.neighbor_species, given.vectors
    sizes = len(given), len(given.vectors)
    asked = len(chosen), chosen, out, parallel.available_threads()
    assert library.call("force_sigma", model, *sizes, *(t.contiguous() for t in parts), *asked) == 0
    return out


def charge_basis(*structures: Structures, n: int = 4) -> ChargeBasis:
    """Of hydrogen, oxygen, sodium and chlorine, with n centres at most of each from these structures."""
    choices = DescriptorRecipe(
        cutoff=3.8,
        n_max=3,
        l_max=2,
        sigma_atom=0.5,
        basis="optimal",
        radial_scaling=False,
        cutoff_width=3.0,
        shortest=0.8,
    )
    made = descriptors.make_descriptor((1, 8, 11, 17), choices.model_dump())
    kernel, centres, lowers = PolynomialKernel(2), {}, {}
    features = [StructureEnvironments.from_structures(made, s).environments for s in structures]
    for z in (1, 8, 11, 17):
        x = torch.cat([e.features[e.species == z] for e in features])[:n]
        centres[z] = x
        lowers[z] = torch.linalg.cholesky(kernel.value(x @ x.T) + 1e-8 * torch.eye(len(x)))
    return ChargeBasis(made, kernel, centres, lowers)
