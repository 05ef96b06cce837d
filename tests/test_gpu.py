"""The same numbers with descriptors in single precision, and on a CUDA device: `pytest -m gpu`, skipped where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from systems import CELLS, crystal, everything

import gpmlp
from gpmlp.core import neighbors
from gpmlp.core.errors import UserError
from gpmlp.core.quantities import Targets
from gpmlp.recipe import Recipe

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CHOICES = {
    "descriptor": {"cutoff": 3.6, "n_max": 4, "l_max": 3}, "inducing": {"n": 12, "gradients": 1}, "calibration": False,
    "noise": {"energy_per_atom": 0.01, "force": 0.1, "stress": 0.01},
}  # fmt: skip


@pytest.fixture(scope="module")
def potential():
    batch = everything()
    generator = torch.Generator().manual_seed(0)
    energies = torch.randn(len(batch), generator=generator, dtype=torch.float64)
    forces = 0.3 * torch.randn(batch.n_atoms, 3, generator=generator, dtype=torch.float64)
    targets = replace(Targets.unlabelled(batch), energies=energies, forces=forces)
    return gpmlp.fit(batch, targets, Recipe.model_validate(CHOICES))[0]


@pytest.mark.parametrize(
    ("device", "precision", "close"),
    [
        ("cpu", "float32", 3e-4),
        pytest.param("cuda", "float64", 1e-9, marks=GPU),
        pytest.param("cuda", "float32", 3e-4, marks=GPU),
    ],
)
def test_predictions(potential, device, precision, close):
    """Means, variances of all kinds and novelties."""
    batch = everything()
    here = potential(batch, variance="all", novelty=True)
    there = potential.to(device, precision)(batch.to(device=device), variance="all", novelty=True)
    assert there.forces.device.type == device and there.forces.dtype == torch.float64
    assert precision == "float64" or not torch.equal(there.forces.cpu(), here.forces)
    for name in ("energies", "atom_energies", "forces", "stresses", "novelty"):
        ours, theirs = getattr(here, name), getattr(there, name).cpu()
        torch.testing.assert_close(theirs, ours, rtol=close, atol=close, equal_nan=True)
    for name in ("atom_energies_variance", "energies_variance", "forces_covariance", "stresses_covariance"):
        ours, theirs = getattr(here, name).total, getattr(there, name).total.cpu()
        torch.testing.assert_close(theirs, ours, rtol=100 * close, atol=close, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", CELLS)
def test_neighbours(kind):
    one = crystal(kind, (6, 8, 1))
    here, there = (
        neighbors.find_neighbors(one, 5.0).sorted(),
        neighbors.find_neighbors(one.to(device="cuda"), 5.0).sorted(),
    )
    for name in ("centers", "neighbors", "shifts"):
        assert torch.equal(getattr(there, name).cpu(), getattr(here, name))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_memory_does_not_grow_and_results_repeat_to_rounding(potential):
    moved, batch = potential.to("cuda"), everything().to(device="cuda")
    first = moved(batch)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        again = moved(batch)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + 16 * again.forces.numel() * again.forces.element_size()
    torch.testing.assert_close(again.forces, first.forces, rtol=1e-12, atol=1e-12)


def test_where_it_cannot_be(potential):
    with pytest.raises(UserError, match="float16"):
        potential.to(descriptors="float16")
    with pytest.raises(UserError, match="device"):
        potential.to("cuda:77")


def test_the_benchmark_runs_where_there_is_no_device(tmp_path):
    """All of it at a tiny size on the CPU: rows of every kind, numbers that agree with the potential's own."""
    options = ["--device", "cpu", "--atoms", "8", "--zeta", "2", "--columns", "12", "--work", tmp_path]
    options += ["--json", tmp_path / "gpu.json"]
    command = [sys.executable, "-m", "tests.benchmarks.gpu", *map(str, options)]
    run = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["left out"] == []
    assert [len(found[kind]) for kind in ("differences", "steps", "batches")] == [2, 4, 3] and found["forms"]
    for row in found["differences"]:
        limit = 1e-6 if row["descriptors"] == "float64" else 0.1
        assert row["forces meV/A"] < limit and row["energy meV/atom"] < limit and row["local std, relative"] < limit
    assert all(row["us"] > 0 and row["search us"] > 0 for row in found["steps"])


def test_the_benchmark_goes_on_after_a_failure(tmp_path, monkeypatch):
    """What fails is kept with its reason beside what was measured before and after, and the file is whole after each case."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    from tests.benchmarks import gpu

    path = tmp_path / "gpu.json"
    record = gpu.Record(path, time.monotonic() + 60, device="CPU")

    def rows(error):
        yield {"us": 1.0}
        if error:
            raise error

    for k, error in enumerate(
        [None, RuntimeError("Failed to find C compiler"), torch.cuda.OutOfMemoryError("full"), None]
    ):
        record.attempt("steps", {"case": k}, lambda e=error: rows(e))
        assert record.failed == (k > 0)
        found = json.loads(path.read_text())
        assert [row["case"] for row in found["steps"]] == list(range(k + 1))
    record.end = 0.0
    record.attempt("forms", {"case": 4}, lambda: rows(None))
    found = json.loads(path.read_text())
    why = ["RuntimeError: Failed to find C compiler", "no memory: full", "no time"]
    assert [row["why"] for row in found["left out"]] == why and found["device"] == "CPU" and found["forms"] == []
