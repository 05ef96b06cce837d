"""SevenNet's pretrained networks as InvariantNetworks: scalars of their layers, and their energies.

Park, Kim, Hwang, Han, J. Chem. Theory Comput. 20, 4857 (2024). The weights are those in the wheel of the package `sevenn`, known by their
SHA-256; no other file is ever read.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpmlp.core import errors

# in sevenn/pretrained_potentials
CHECKPOINTS = {
    "7net-0": (
        "SevenNet_0__11Jul2024/checkpoint_sevennet_0.pth",
        "7052cb42b7b3be42b40b97fa0d21077a48c54b5548948fc4dcf346629f813c36",
    ),
    "7net-l3i5": (
        "SevenNet_l3i5/checkpoint_l3i5.pth",
        "a7ff190d41efe5b8317a03d20a468e4036a1a3e64e0b14fdbab64ac3f4bfc09d",
    ),
}
ENERGY = "atomic_energy"  # where the network leaves energies of atoms
COUPLING = re.compile(r"_w3j_(\d+)_(\d+)_(\d+)$")
_building = threading.Lock()


class SevenNet(torch.nn.Module):
    """A network of SevenNet in double precision, whose scalars are made invariant under reflections: it is trained without parity, so
    that its scalars of an environment and of its mirror image differ (by 1 % for an ethanol molecule), and their mean is taken.

    Attributes: as in InvariantNetwork.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model
        parts = dict(model.named_children())
        self.gates = {
            name: part.gate.irreps_out[0].dim for name, part in parts.items() if name.endswith("equivariant_gate")
        }
        self.cutoff = float(model.cutoff)
        self.widths = tuple(self.gates.values())
        self.species = tuple(sorted(model.type_map))

    def layers(self, species: Tensor, centers: Tensor, neighbors: Tensor, vectors: Tensor) -> Iterator[Tensor]:
        """As in InvariantNetwork."""
        last = list(self.gates)[-1]
        for name, data in self._run(species, centers, neighbors, vectors):
            if name in self.gates:
                yield _mean_of_images(data["x"][:, : self.gates[name]])
            if name == last:
                return

    def atom_energies(self, species: Tensor, centers: Tensor, neighbors: Tensor, vectors: Tensor) -> Tensor:
        """As in InvariantNetwork."""
        for _, data in self._run(species, centers, neighbors, vectors):
            if ENERGY in data:
                return _mean_of_images(data[ENERGY]).flatten()
        raise RuntimeError("this network has no energies of atoms")

    def _run(self, species: Tensor, centers: Tensor, neighbors: Tensor, vectors: Tensor) -> Iterator[tuple[str, dict]]:
        """Names of the parts and the data that each leaves, of the structures and, behind them, their mirror images."""
        n, both = len(species), torch.cat([species, species])
        edges = torch.stack([torch.cat([centers, centers + n]), torch.cat([neighbors, neighbors + n])])
        data = {
            "atomic_numbers": both,
            "edge_index": edges,
            "edge_vec": torch.cat([vectors, -vectors]),
            "batch": torch.zeros_like(both),
            "num_atoms": both.new_tensor([2 * n]),
            "x": self.model._atomic_numbers_to_onehot(both),
        }
        for name, part in self.model.named_children():
            data = part(data)
            # the one-hot species come in single precision, whatever the network has
            data = {key: x.double() if x.is_floating_point() else x for key, x in data.items()}
            yield name, data


def _mean_of_images(values: Tensor) -> Tensor:
    return 0.5 * (values[: len(values) // 2] + values[len(values) // 2 :])


def load_sevennet(checkpoint: str) -> tuple[SevenNet, str]:
    """A network of CHECKPOINTS and the SHA-256 of its file.

    Raises:
        UserError: another name, the package is not installed, or the file in it is another one.
    """
    errors.check_choice("checkpoint", checkpoint, tuple(CHECKPOINTS))
    found = importlib.util.find_spec("sevenn")
    if found is None or found.origin is None:
        raise errors.UserError(
            f"The network {checkpoint!r} needs the package sevenn, which is not installed: pip install 'gpmlp[pretrained]'."
        )
    name, sha256 = CHECKPOINTS[checkpoint]
    path = Path(found.origin).parent / "pretrained_potentials" / name
    if not path.is_file():
        raise errors.UserError(f"The package sevenn holds no weights of {checkpoint!r}; install sevenn 0.13.")
    weights = path.read_bytes()
    digest = hashlib.sha256(weights).hexdigest()
    if digest != sha256:
        raise errors.UserError(
            f"The weights of {checkpoint!r} in the package sevenn have the SHA-256 {digest}, not {sha256}: not read. Install sevenn 0.13."
        )
    return SevenNet(_build(weights)), sha256


def _build(weights: bytes) -> torch.nn.Module:
    """The model as plain PyTorch in double precision: TorchScript has no forward-mode derivatives."""
    import e3nn
    from sevenn.checkpoint import SevenNetCheckpoint

    with _building, tempfile.TemporaryDirectory() as folder:
        # a pickle, whose bytes are known: these ones, whatever becomes of the package's file meanwhile
        path = Path(folder) / "weights.pth"
        path.write_bytes(weights)
        script = e3nn.get_optimization_defaults()["jit_script_fx"]
        try:
            e3nn.set_optimization_defaults(jit_script_fx=False)
            model = SevenNetCheckpoint(path).build_model()
        finally:
            e3nn.set_optimization_defaults(jit_script_fx=script)
    model = model.double().eval().requires_grad_(False)
    _couple_in_double(model)
    return model


def _couple_in_double(model: torch.nn.Module) -> None:
    """Wigner's 3j symbols, which the file has in single precision, without its rounding: by it energies would change with rotations."""
    from e3nn import o3

    for name, symbols in model.named_buffers():
        degrees = COUPLING.search(name)
        if degrees:
            exact = o3.wigner_3j(*map(int, degrees.groups()), dtype=torch.float64)
            if not torch.allclose(symbols, exact, rtol=0, atol=1e-5):
                raise errors.UserError(
                    "The package e3nn has other coupling coefficients than the weights; install sevenn 0.13."
                )
            symbols.copy_(exact)
