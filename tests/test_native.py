"""The compiled core: how it is built, found and called, and what happens without it; its numbers are tested where they are used."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gpmlp.native import library

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(library.__file__).parents[1]
SOURCES = sorted((PACKAGE / "native/src").iterdir())

# predicts by a model, and by one that is fitted here if there are three arguments; a process of its own, as the library is loaded once
PREDICT = """
import json, sys, warnings
import torch
torch.set_num_threads(1)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import gpmlp
    from gpmlp.io.recipe_files import load_recipe
    from gpmlp.native import library
    structures, targets = gpmlp.read(sys.argv[2])
    models = [gpmlp.load(sys.argv[1])]
    models += [gpmlp.fit(structures, targets, models[0].recipe)[0]] * (sys.argv[3] == "fit")
    found = [model(structures, variance="forces") for model in models]
print(json.dumps({
    "loaded": library.instruction_set(),
    "said": [str(w.message) for w in said if "compiled core" in str(w.message)],
    "energies": [f.energies.tolist() for f in found],
    "forces": [f.forces.tolist() for f in found],
    "stresses": [f.stresses.tolist() for f in found],
    "variances": [f.forces_variance.total.tolist() for f in found],
}))
"""
NUMBERS = ("energies", "forces", "stresses", "variances")


@pytest.fixture(scope="module")
def results(model_file, train_file) -> dict[str, dict]:
    """Of each choice of GPMLP_NATIVE that this processor has."""
    out = {}
    for choice in ["off", "baseline"] + ["v3"] * (library.call("supports_v3") == 1):
        command = [
            sys.executable,
            "-c",
            PREDICT,
            str(model_file),
            str(train_file),
            "fit" if choice == "off" else "predict",
        ]
        run = subprocess.run(command, env=os.environ | {"GPMLP_NATIVE": choice}, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        out[choice] = json.loads(run.stdout.splitlines()[-1])
    return out


def test_the_choice_is_loaded(results):
    assert library.instruction_set() == ("v3" if "v3" in results else "baseline")
    for choice, result in results.items():
        assert result["loaded"] == ("none" if choice == "off" else choice)


def test_every_choice_gives_the_same_numbers(results):
    """PyTorch, too. Products that are rounded once or twice differ by 1e-16; weights of some 1e4 eV make 1e-12 eV/A of it."""
    for choice, name in itertools.product(results, NUMBERS):
        here, there = results[choice][name][0], results["baseline"][name][0]
        np.testing.assert_allclose(here, there, rtol=1e-8, atol=1e-10, err_msg=f"{choice} {name}")


def test_a_fit_without_the_core_is_the_same(results):
    """To what the condition of the fit, some 1e6, makes of rounding."""
    for name in NUMBERS:
        predicted, of_own_fit = results["off"][name]
        np.testing.assert_allclose(of_own_fit, predicted, rtol=1e-5, atol=1e-6, err_msg=name)


def test_without_the_core_this_is_said_once(results):
    (said,) = results["off"]["said"]
    assert "several times slower (GPMLP_NATIVE=off)" in said and "apt install g++" in said
    assert not any(result["said"] for choice, result in results.items() if choice != "off")


@pytest.fixture
def afresh(monkeypatch):
    """The library is looked for again, here and after the test."""
    library.compiled.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    library.compiled.cache_clear()


def test_a_wrong_choice_is_named(afresh):
    afresh.setenv("GPMLP_NATIVE", "fast")
    with pytest.warns(UserWarning, match="GPMLP_NATIVE=fast is left out of account: use v3, baseline, off"):
        assert library.compiled() is not None


def test_a_library_of_other_sources_is_not_used(afresh):
    afresh.delenv("GPMLP_NATIVE", raising=False)
    afresh.setattr(library, "ABI", library.ABI + 1)
    with pytest.warns(UserWarning, match="_core_baseline.so was made of other sources"):
        assert library.compiled() is None
    assert library.instruction_set() == "none"


def test_arguments_are_checked():
    length, vectors = torch.empty(1, dtype=torch.float64), torch.ones(2, 3)
    assert library.call("shortest_vector", 2, vectors, length) == 0 and length.item() == pytest.approx(3**0.5)
    for wrong in (vectors.T, vectors[:, :2]):
        with pytest.raises(TypeError, match="gpmlp_shortest_vector: argument 1"):
            library.call("shortest_vector", 2, wrong, length)
    with pytest.raises(TypeError, match="argument 2"):
        library.call("shortest_vector", 2, vectors, length.float())
    with pytest.raises(ValueError):
        library.call("shortest_vector", 2, vectors)


def test_no_memory_is_said():
    none, small = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int32)
    with pytest.raises(MemoryError, match="gpmlp_sort_pairs"):
        library.call("sort_pairs", 0, none, small, 1 << 50, 0, none, none, none)


LETTERS = {
    "const int64_t *": "I", "int64_t *": "I", "const int32_t *": "S", "const double *": "D", "double *": "D",
    "const float *": "E", "const T *": "F", "T *": "F", "int64_t ": "n", "double ": "x", "const char *": "s", "char *": "c",
}  # fmt: skip


def test_signatures_are_those_of_the_sources():
    """A pointer where a number is expected would not be noticed by ctypes."""
    found = {}
    for path in SOURCES:
        text = path.read_text().replace("\\\n", "\n")
        for name, arguments in re.findall(r"GPMLP_API int64_t gpmlp_(\w+)(?:##SUFFIX)?\(([^)]*)\)", text):
            parts = [re.sub(r"\w+$", "", " ".join(a.split())) for a in arguments.split(",") if a.strip()]
            found[name] = "".join(LETTERS[part] for part in parts)
    objects = str.maketrans("oO", "nI")
    assert found == {name: letters.translate(objects) for name, letters in library.SIGNATURES.items()}


def tree(folder: Path) -> Path:
    """The sources alone, without what was built of them."""
    for name in ("setup.py", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "gpmlp", folder / "gpmlp", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


def build(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", *options]
    return subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.parametrize("compiler", ["g++", *filter(shutil.which, ["clang++"])])
def test_no_warning_of_the_compiler(compiler):
    flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Wno-psabi"]
    done = subprocess.run([compiler, *flags, str(PACKAGE / "native/src/core.cpp")], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.parametrize("compiler", ["/bin/false", "/nowhere/g++"])
def test_a_build_without_a_compiler_goes_on(tmp_path, compiler):
    done = build(tree(tmp_path), CXX=compiler)
    assert done.returncode == 0, done.stderr
    assert "_core_baseline.so could not be compiled" in done.stderr and "apt install g++" in done.stderr
    assert not list((tmp_path / "gpmlp/native").glob("*.so"))


SANITIZED = """
import sys
import pytest
from gpmlp.native import library
assert library.instruction_set() == "baseline" and library.__file__.startswith(sys.argv[1])
options = ["-q", "-x", "-s", "-k", "not dscribe", "-p", "no:cacheprovider", "-c", "setup.cfg", "--rootdir", "."]
sys.exit(pytest.main([*options, *sys.argv[2:]]))
"""
USED_IN = ("test_neighbors.py", "test_descriptor_cpu.py", "test_covariances.py", "test_export.py")


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path):
    """Nothing is read or written outside of tensors, nor anything undefined done, in the tests of what uses the core."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    assert Path(runtime).is_absolute(), "g++ has no address sanitizer here"
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g"
    done = build(tree(tmp_path), CXXFLAGS=flags)
    assert done.returncode == 0 and not done.stderr, done.stderr
    (tmp_path / "setup.py").unlink()  # or conftest.py would build again
    tests = shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("golden", "__pycache__"))
    files = [str(tests / name) for name in USED_IN]
    environment = {
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps some
        "GPMLP_NATIVE": "baseline",
        "PYTHONPATH": str(tmp_path),
    }
    run = subprocess.run(
        [sys.executable, "-c", SANITIZED, str(tmp_path), *files],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]


SHARES = """
#include "threads.hpp"
#include <cstdlib>
#include <sys/wait.h>

// As often as asked, blocks that write a number each: all must be there, whoever did them.
static bool share(int rounds) {
    bool right = true;
    for (int round = 0; round < rounds; round++) {
        std::vector<int64_t> done(round % 23, -1);
        gpmlp::Pool::share(done.size(), round % 5, [&](int64_t block) { done[block] = block * round; });
        for (std::size_t block = 0; block < done.size(); block++) right &= done[block] == int64_t(block) * round;
    }
    return right;
}

int main() {
    bool right = share(3000), others[2];
    std::thread first([&] { others[0] = share(1000); }), second([&] { others[1] = share(1000); });
    first.join(), second.join();
    try {
        gpmlp::Pool::share(20, 3, [](int64_t block) { if (block == 7) throw std::bad_alloc(); });
        right = false;
    } catch (const std::bad_alloc &) {
    }
    const pid_t child = fork();
    if (!child) _exit(!share(100));
    int status = 1;
    waitpid(child, &status, 0);
    return !(right && others[0] && others[1] && share(100) && status == 0);
}
"""


@pytest.mark.parametrize("sanitizer", ["none", pytest.param("thread", marks=pytest.mark.slow)])
def test_threads_share_all_blocks(tmp_path, sanitizer):
    """Of callers one after another, two at once, in a process that was forked, and where a block fails; without races."""
    (tmp_path / "shares.cpp").write_text(SHARES)
    flags = ["-std=c++17", "-O1", "-g", "-pthread", "-Wall", "-Wextra", "-Werror", f"-I{PACKAGE / 'native/src'}"]
    if sanitizer != "none":
        flags.append(f"-fsanitize={sanitizer}")
    subprocess.run(["g++", *flags, "shares.cpp", "-o", "shares"], cwd=tmp_path, check=True)
    run = subprocess.run(
        [tmp_path / "shares"], env={"TSAN_OPTIONS": "die_after_fork=0"}, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
