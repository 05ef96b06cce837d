"""The dense power spectrum, by batched products and by Triton's kernels (on the CPU, interpreted), against the plain PyTorch path."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from systems import CUTOFF, DESCRIPTORS, descriptor, everything

from gpmlp.core import neighbors
from gpmlp.core.environments import Surroundings
from gpmlp.core.errors import DataWarning
from gpmlp.descriptors import _triton, backends, gpu
from gpmlp.descriptors.spherical_harmonics import BatchedHarmonics, harmonics_with_gradients

SOAPS = [name for name in DESCRIPTORS if name.startswith(("soap", "compressed soap"))]
# sums of up to some hundred terms of order 1 in another order
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def seen(cutoff: float = CUTOFF, dtype: torch.dtype = torch.float64) -> Surroundings:
    batch = everything()
    whole = Surroundings.from_structures(batch, neighbors.find_neighbors(batch, cutoff))
    return Surroundings(whole.species, whole.centers, whole.neighbor_species, whole.vectors.to(dtype))


def compare(made, surroundings: Surroundings, several: bool = True) -> None:
    """Features, and one and several cotangents."""
    vectors = surroundings.vectors
    ours, reference = (
        gpu.dense_environments(made, surroundings, backends.fastest_backend(made, vectors)),
        made.reference(surroundings),
    )
    tolerance = {"rtol": 0, "atol": TOLERANCE[vectors.dtype]}
    torch.testing.assert_close(ours.features, reference.features, **tolerance)
    cotangents = torch.randn(2, *ours.features.shape, generator=torch.Generator().manual_seed(0)).to(vectors)
    for some in (cotangents[0], cotangents)[: 1 + several]:
        torch.testing.assert_close(ours.pull_back(some), reference.pull_back(some), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("name", SOAPS)
def test_as_the_reference(name, dtype):
    compare(descriptor(name), seen(dtype=dtype))


def test_unsorted_environments_without_neighbours_and_none_at_all():
    made, surroundings = descriptor(SOAPS[0]), seen()
    some = surroundings.select([7, 0, 11, 3])
    kept = some.centers > 1
    compare(made, Surroundings(some.species, some.centers[kept], some.neighbor_species[kept], some.vectors[kept]))
    compare(made, surroundings.select([]))


def test_chunks_do_not_show(monkeypatch):
    made, surroundings = descriptor(SOAPS[0]), seen()
    backend = backends.fastest_backend(made, surroundings.vectors)
    whole = gpu.dense_environments(made, surroundings, backend)
    cotangents = whole.features.roll(1, 0)
    pulled = whole.pull_back(cotangents)
    monkeypatch.setattr(gpu, "ENVIRONMENTS", 5)
    parts = gpu.dense_environments(made, surroundings, backend)
    torch.testing.assert_close(parts.features, whole.features, rtol=0, atol=1e-14)
    torch.testing.assert_close(parts.pull_back(cotangents), pulled, rtol=0, atol=1e-13)


def test_jacobians_are_those_of_the_reference():
    made, surroundings = descriptor(SOAPS[0]), seen().select([0, 5])
    backend = backends.fastest_backend(made, surroundings.vectors)
    found = gpu.dense_environments(made, surroundings, backend).jacobian()
    assert torch.equal(found, made.reference(surroundings).jacobian())


@pytest.mark.parametrize("l_max", [0, 1, 2, 7, 12])
def test_harmonics_by_recurrence(l_max):
    """Values and Cartesian gradients as sphericart has them, at the poles too; slopes grow as l²."""
    vectors = torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    vectors[:2] = torch.tensor([[0.0, 0, 2], [0, 0, -1.5]])
    made, r = BatchedHarmonics.from_degree(l_max, vectors), vectors.norm(dim=1)
    units = (vectors / r[:, None]).T
    q, slopes, powers = made(units)
    values, gradients = harmonics_with_gradients(l_max, vectors)
    torch.testing.assert_close(made.values(q, powers).T, values, rtol=0, atol=1e-12)
    ours = torch.stack(made.gradients(q, slopes, powers))
    ours = (ours - units[:, None] * (units[:, None] * ours).sum(0)) / r
    torch.testing.assert_close(ours.permute(2, 0, 1), gradients, rtol=0, atol=1e-11)


@pytest.mark.parametrize("error", [RuntimeError("many lines\nFailed to find C compiler"), ZeroDivisionError()])
def test_products_where_kernels_do_not_compile(monkeypatch, error):
    """Tried once for equal descriptors, and said once."""
    tried = []

    def compile_and_fail(self, *rest):
        tried.append(rest)
        raise error

    monkeypatch.setattr(_triton, "can_use_triton", lambda like: True)
    monkeypatch.setattr(_triton.TritonKernels, "expand", compile_and_fail)
    backends._form.cache_clear()
    last = "RuntimeError: Failed to find C compiler" if str(error) else "ZeroDivisionError: no message"
    try:
        with pytest.warns(DataWarning, match=rf"do not work on cpu \({last}\).*products"):
            compare(descriptor(SOAPS[0]), seen())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert isinstance(backends.fastest_backend(descriptor(SOAPS[0]), seen().vectors), gpu.BatchedProducts)
        assert len(tried) == 1
    finally:
        backends._form.cache_clear()


PARITY = """
import torch
from test_descriptor_gpu import SOAPS, compare, seen
from systems import descriptor
from gpmlp.descriptors import _triton, backends

def check(surroundings, name=SOAPS[0], **changes):
    made = descriptor(name, **changes)
    assert isinstance(backends.fastest_backend(made, surroundings.vectors), _triton.TritonKernels)
    compare(made, surroundings, several=False)

# the interpreter takes a tenth of a second for a pair: few of them
for dtype in (torch.float64, torch.float32):
    check(seen(dtype=dtype).select([0, 17]))
check(seen().select([3]), "soap poly")
check(seen().select([8]), n_max=5, l_max=0)  # not a power of two anywhere
check(seen(2.2).select([8]), n_max=9, l_max=8)  # more than one warp
check(seen().select([]))
"""

COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from gpmlp.descriptors import _triton_kernels

def compiled(name, constants, number):
    kernel, types = getattr(_triton_kernels, name), {"width": "i32", "intervals": "i32", "center_slots": "*i64"}
    signature = {a: types.get(a, "*i32" if a.startswith("of_") else "*" + number) for a in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(a),): value for a, value in constants.items()}
    return compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})

tile = {"S": 2, "N": 5, "L": 4, "NP": 8, "LP": 4, "LM": 16}
for number in ("fp32", "fp64"):
    for name, constants in {"expand": tile, "pull_back": tile, "multiply": {"C": 10, "L": 4, "CP": 16, "MP": 8}}.items():
        assert len(compiled(name, constants, number).asm["cubin"]) > 1000, name
"""


def in_process(code: str, **environment: str) -> None:
    """Whether kernels are interpreted or compiled is settled when they are imported, so that each way has a process of its own."""
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    variables = os.environ | {"PYTHONPATH": paths} | environment
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables)
    assert run.returncode == 0, run.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("form", [gpu.BatchedProducts, _triton.TritonKernels])
@pytest.mark.parametrize("changes", [{}, {"n_max": 9, "l_max": 8}], ids=["small", "large"])
def test_on_a_device(form, dtype, changes):
    """Both forms on CUDA against the plain path on the CPU."""
    made, here = descriptor(SOAPS[0], **changes), seen(dtype=dtype)
    there = Surroundings(*(part.to("cuda") for part in vars(here).values()))
    if form is _triton.TritonKernels and not _triton.can_use_triton(there.vectors):
        pytest.skip("Triton is not installed")
    reference, found = (
        made.reference(here),
        gpu.dense_environments(made, there, form.from_descriptor(made, there.vectors)),
    )
    tolerance = {"rtol": 0, "atol": 10 * TOLERANCE[dtype]}
    torch.testing.assert_close(found.features.cpu(), reference.features, **tolerance)
    cotangents = torch.randn(here.species.shape[0], made.n_features, generator=torch.Generator().manual_seed(0)).to(
        dtype
    )
    pulled = found.pull_back(cotangents.to("cuda"))
    torch.testing.assert_close(pulled.cpu(), reference.pull_back(cotangents), **tolerance)


@TRITON
def test_triton_as_the_reference():
    in_process(PARITY, TRITON_INTERPRET="1")


@TRITON
def test_triton_compiles_for_a_device_that_is_not_here():
    """To machine code of the H100 (sm_90), by the assembler that Triton brings."""
    in_process(COMPILE, TRITON_INTERPRET="0")
