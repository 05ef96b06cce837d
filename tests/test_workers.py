"""A fit by many processes: the same to the last bit, however many there are, and when one of them dies."""

from __future__ import annotations

import gzip
import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import pieces_of_work
import pytest
import torch
from conftest import copper

import gpmlp
from gpmlp.cli.main import main
from gpmlp.core.errors import UserError
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.fitting import left_out, partitions, passes, sparse_points, workers
from gpmlp.fitting.partitions import Partitions
from gpmlp.fitting.workers import RemoteWorkers, Workers, open_executor
from gpmlp.io import ase_atoms, structure_files
from gpmlp.io.frames import PackedFrames
from gpmlp.recipe import Recipe

distributed = pytest.importorskip("distributed")
psutil = pytest.importorskip("psutil")  # comes with it

SMALL = {"inducing": {"n": 12, "gradients": 1}, "descriptor": {"cutoff": 4.0, "n_max": 4, "l_max": 2}}
WITH_NOVELTY = Recipe.model_validate(SMALL | {"kernel": {"zeta": 2}})
RECIPE = Recipe.model_validate(SMALL | {"kernel": {"zeta": 2}, "novelty": False})  # which takes half of the time
FEW_SAMPLES = Recipe.model_validate(SMALL | {"kernel": {"zeta": 2}, "novelty": {"samples": 30}})
ATOMS = 40  # of a partition, about


@pytest.fixture(scope="module")
def labelled():
    """24 cells of 4 or 8 copper atoms with labels."""
    return ase_atoms.from_ase([copper(seed, 1 + seed % 2) for seed in range(24)])


@pytest.fixture(scope="module")
def client():
    """Two processes of dask."""
    with open_executor(2) as made:
        yield made


def numbers(fitted, structures) -> list[torch.Tensor]:
    """Whatever a fit predicts, and its noises."""
    potential, report = fitted
    found = potential(structures, variance=("energies", "forces"), novelty=potential.novelty is not None)
    values = [found.energies, found.forces, found.stresses, found.energies_variance.total, found.forces_variance.total]
    values += [found.novelty] if found.novelty is not None else []
    return [*values, torch.tensor([*report.noise.values(), *report.signal.values(), report.condition])]


def same_bits(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def make_small(patch) -> None:
    """Several partitions, and many pieces that are left out, for which workers take the potential from each other."""
    patch.setattr(partitions, "PARTITION_ATOMS", ATOMS)
    patch.setattr(left_out, "PART_ATOMS", 8)


@pytest.fixture
def small_partitions(monkeypatch):
    make_small(monkeypatch)


@pytest.fixture(scope="module")
def alone(labelled):
    """The fit of small partitions in this process."""
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        return numbers(gpmlp.fit(*labelled, RECIPE), labelled[0])


# pieces, trees, partitions --------------------------------------------------------------------------------------------------


def by_levels(names: list[str]) -> str:
    """Neighbours joined, then pairs of these, and so on; the odd one waits."""
    while len(names) > 1:
        pairs = [pieces_of_work.join(a, b) for a, b in zip(names[::2], names[1::2], strict=False)]
        names = pairs + names[2 * len(pairs) :]
    return names[0]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 11])
def test_merged_along_a_tree_that_the_number_of_pieces_fixes(n, client):
    pieces = [(k,) for k in range(n)]
    expected = by_levels([str(k) for k in range(n)])
    with ThreadPoolExecutor(3) as threads:
        for found in (Workers(), RemoteWorkers(threads), RemoteWorkers(client)):
            assert found.reduce(pieces_of_work.named, pieces_of_work.join, pieces) == expected


def test_results_in_order_and_progress_by_pieces(client):
    with ThreadPoolExecutor(3) as threads:
        for found in (Workers(), RemoteWorkers(threads), RemoteWorkers(client)):
            told: list[tuple] = []
            shared = found.keep(100)
            pieces = [(shared, k) for k in range(4)]
            assert found.map(pieces_of_work.doubled, pieces, lambda *report, told=told: told.append(report)) == [
                100,
                102,
                104,
                106,
            ]
            if isinstance(found, RemoteWorkers):
                assert [(done, total) for done, total, _ in told] == [(k, 4) for k in range(1, 1 + len(told))]
                assert told[-1] == (len(told), 4, f"{len(told)} of 4 partitions")
            else:
                assert told == [(k + 0.5, 4, f"{k + 1} of 4: half") for k in range(4)]


@pytest.fixture
def threads_of_dask():
    """A Client whose two workers are threads of this process, which counts what they hold."""
    options = {"processes": False, "n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as made:
        yield made


@pytest.mark.parametrize("kind", ["dask", "threads", "alone"])
def test_few_factors_wait_to_be_merged(kind, threads_of_dask):
    """AHEAD for each worker and log2 of the pieces, those under way and what a merge makes; not one for each piece, as once."""
    n, workers_there = 64, 2
    with ThreadPoolExecutor(workers_there) as threads:
        executors = {"dask": threads_of_dask, "threads": threads}
        found = RemoteWorkers(executors[kind]) if kind in executors else Workers()
        pieces_of_work.Factor.most = 0
        total = found.reduce(pieces_of_work.factor, pieces_of_work.merged_factors, [(k,) for k in range(n)])
    assert total.pieces == tuple(range(n))
    waiting = workers.AHEAD * workers_there + 6 if kind in executors else 7
    under_way = {"dask": 5, "threads": 2, "alone": 0}[
        kind
    ] * workers_there  # dask tells its workers later what they may forget
    assert 6 < pieces_of_work.Factor.most <= waiting + under_way + 1 < 22


def test_leaves_are_triangles(labelled, small_partitions):
    """A factor that waits or is sent has no rows left to be folded in; one partition is left as it always was."""
    recipe = Recipe.model_validate(RECIPE.model_dump() | {"inducing": {"n": 15, "gradients": 1}})
    sizes: list[int] = []

    class Watching(Workers):
        def reduce(self, work, merge, pieces, report=workers.silent):
            def watched(*about):
                made = work(*about)
                if isinstance(made[0], dict):
                    sizes.extend(sum(len(part) for part in f._parts) - f.columns - 1 for f in made[0].values())
                return made

            return super().reduce(watched, merge, pieces, report)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpmlp.fitting.fit.workers_of", lambda *_: Watching())
        patch.setattr(passes, "PASS_ATOMS", 16)
        gpmlp.fit(*labelled, recipe)
        assert len(sizes) == 9 and max(sizes) == 0
        sizes.clear()
        patch.setattr(partitions, "PARTITION_ATOMS", 1000)
        gpmlp.fit(*labelled, recipe)
    assert len(sizes) == 3 and max(sizes) > 0


def test_progress_of_merges(client):
    told: list[tuple] = []
    RemoteWorkers(client).reduce(
        pieces_of_work.named, pieces_of_work.join, [(k,) for k in range(5)], lambda *report: told.append(report)
    )
    assert [(done, total) for done, total, _ in told] == [(k, 9) for k in range(1, 10)]
    assert told[-1][2] == "5 of 5 partitions, 4 of 4 merged" and told[0][2] == "1 of 5 partitions"


def test_what_pieces_share_travels_to_processes_a_few_times():
    """It is written down anew for each bundle of pieces, not for each piece."""
    with ThreadPoolExecutor(2) as threads:
        found = RemoteWorkers(threads)
        sent: list = []
        begin = threads.submit

        def submit(function, /, *arguments):
            sent.append(len(pickle.dumps(arguments)))
            return begin(function, *arguments)

        threads.submit = submit
        shared = bytes(100_000)
        lengths = found.map(pieces_of_work.length, [(shared, k) for k in range(50)])
        assert found.map(pieces_of_work.length, []) == []
    assert lengths == [100_000 + k for k in range(50)]
    assert len(sent) <= 2 * workers.BUNDLES and max(sent) < 110_000


def test_the_error_of_the_first_piece_is_told(client):
    """Whichever ends first; pieces that were not begun are left."""
    with ThreadPoolExecutor(2) as threads:
        for executor in (client, threads):
            with pytest.raises(UserError, match="piece 1 is wrong"):
                RemoteWorkers(executor).map(pieces_of_work.refuse_late, [(k,) for k in range(1, 30)])


def test_partitions_are_runs_of_about_equal_size(labelled, small_partitions):
    structures, targets = labelled
    made = Partitions.of_data(structures, targets, 24, Workers())
    assert len(made.kept) == structures.n_atoms // ATOMS == 3
    assert [b for _, b in made.bounds[:-1]] == [a for a, _ in made.bounds[1:]]
    assert made.bounds[0][0] == 0 and made.bounds[-1][1] == len(structures)
    before = 0
    for (first, last), part in zip(made.bounds, made.kept, strict=True):
        assert part.structures.names == structures.names[first:last] and part.first == first
        assert torch.equal(part.targets.energies, targets.energies[first:last])
        assert part.atoms_before == {29: before}
        before += part.structures.n_atoms
        assert abs(part.structures.n_atoms - structures.n_atoms / len(made.kept)) <= 8
    assert before == structures.n_atoms


def test_number_of_partitions():
    """At least so many atoms, and four rows a column, each; at most PARTITIONS."""
    assert partitions._number_of(1, 10) == partitions._number_of(2 * partitions.PARTITION_ATOMS - 1, 10) == 1
    assert partitions._number_of(2 * partitions.PARTITION_ATOMS, 10) == 2
    assert partitions._number_of(10**6, 10**5) == 10**6 // (4 * 10**5 // 3)
    assert partitions._number_of(10**9, 1000) == partitions.PARTITIONS


# fits -----------------------------------------------------------------------------------------------------------------------


def test_partitions_give_the_fit_of_one(labelled, small_partitions):
    """To rounding: within 1e-9 of the largest value of each kind."""
    parts = numbers(gpmlp.fit(*labelled, WITH_NOVELTY), labelled[0])
    partitions.PARTITION_ATOMS = 1000
    whole = numbers(gpmlp.fit(*labelled, WITH_NOVELTY), labelled[0])
    assert not same_bits(parts, whole)  # they are partitions indeed
    for a, b in zip(parts, whole, strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max()


def test_any_number_of_workers_gives_the_same_bits(labelled, small_partitions, monkeypatch):
    """With centres chosen in two levels: pools are thinned in their partitions, and again where they are merged."""
    monkeypatch.setattr(sparse_points, "_room", lambda *_: 30)
    merged = []
    monkeypatch.setattr(
        sparse_points._Pool, "keep", lambda *a, keep=sparse_points._Pool.keep: merged.append(1) or keep(*a)
    )
    found = []
    for number in (0, 1, 3):
        with ThreadPoolExecutor(max(number, 1)) as threads:
            fitted = gpmlp.fit(*labelled, FEW_SAMPLES, executor=threads if number else None)
        found.append(numbers(fitted, labelled[0]))
        assert len(merged) > 3
        merged.clear()
    assert all(same_bits(found[0], other) for other in found[1:])


@pytest.mark.parametrize("kind", ["dask", "processes"])
def test_processes_give_the_same_bits(labelled, small_partitions, alone, client, kind):
    if kind == "dask":
        before = client.run(os.getpid)
        found = gpmlp.fit(*labelled, RECIPE, executor=client)
        assert client.run(os.getpid) == before, "a worker was lost"
    else:
        with ProcessPoolExecutor(2, get_context("spawn")) as executor:
            found = gpmlp.fit(*labelled, RECIPE, executor=executor)
    assert same_bits(numbers(found, labelled[0]), alone)


@pytest.mark.parametrize("stage", ["inducing points", "covariances", "calibration"])
def test_what_a_lost_worker_did_is_done_again(labelled, small_partitions, alone, client, stage):
    """With the partitions and models that it held."""
    killed = []

    def kill(name, done, total, note):
        if name == stage and not killed and (done or name == "calibration"):
            killed.extend(sorted(client.run(os.getpid).values())[:1])
            os.kill(killed[0], signal.SIGKILL)

    found = gpmlp.fit(*labelled, RECIPE, progress=kill, executor=client)
    assert killed and same_bits(numbers(found, labelled[0]), alone)
    end = time.monotonic() + 240  # a call of the killed worker may wait for a minute until its connection is given up
    while killed[0] in (there := client.run(os.getpid, on_error="ignore").values()) or len(there) < 2:
        assert time.monotonic() < end, "it was not started again"
        time.sleep(0.1)


# errors ---------------------------------------------------------------------------------------------------------------------


def test_errors_of_the_work_are_those_of_the_work(client):
    for executor in (client, ThreadPoolExecutor(1)):
        with pytest.raises(UserError, match="piece 1 is wrong"):
            RemoteWorkers(executor).map(pieces_of_work.refuse, [(1,), (2,)])
        with pytest.raises(ZeroDivisionError, match="piece 0"):
            RemoteWorkers(executor).reduce(pieces_of_work.fail, pieces_of_work.join, [(0,), (0,), (0,)])


def test_workers_that_die_again_and_again():
    import dask

    with dask.config.set({"distributed.scheduler.allowed-failures": 1}), open_executor(1) as client:
        with pytest.raises(UserError, match="Workers died at one piece of work, again and again: .*inducing.n"):
            RemoteWorkers(client).map(pieces_of_work.die, [(0,)])
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        with pytest.raises(UserError, match="The workers are lost: .*"):
            RemoteWorkers(executor).map(pieces_of_work.die, [(0,)])


def test_a_fit_waits_for_workers_for_some_time(monkeypatch):
    """Progress says so; new ones go on with the work, and where none come there is a sentence."""
    monkeypatch.setattr(workers, "LOOK_S", 0.1)
    told: list[str] = []
    with (
        distributed.LocalCluster(n_workers=1, processes=False, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        found = RemoteWorkers(client)

        def watch(done, total, note):
            told.append(note)
            if note == "waiting for workers":
                cluster.scale(1)
            elif len(told) == 1:
                cluster.scale(0)

        assert found.map(pieces_of_work.slowly, [(k,) for k in range(8)], watch) == list(range(8))
        assert "waiting for workers" in told and told[-1] == "8 of 8 partitions"
        monkeypatch.setattr(workers, "ALONE_S", 0.5)
        cluster.scale(0)
        with pytest.raises(UserError, match=r"has had no workers for 0.00833 minutes, .* Start some"):
            found.map(pieces_of_work.slowly, [(0,)])


def test_workers_that_come_back_before_they_are_looked_for(threads_of_dask, monkeypatch):
    """Begun pieces may all have ended by then: others are begun."""
    monkeypatch.setattr(workers, "LOOK_S", 0.1)
    monkeypatch.setattr(workers, "ALONE_S", 1.0)
    found = RemoteWorkers(threads_of_dask)
    found.number, found.looked = 0, float("inf")
    assert found.map(pieces_of_work.slowly, [(k,) for k in range(5)]) == list(range(5))


def test_a_scheduler_that_is_gone(monkeypatch):
    """Is told, and not waited for."""
    monkeypatch.setattr(workers, "CONNECT_S", 8.0)
    monkeypatch.setattr(workers, "LOOK_S", 0.5)
    path = os.pathsep.join([os.path.dirname(pieces_of_work.__file__), *sys.path])
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", "0", "--no-dashboard"]
    how = {"env": os.environ | {"PYTHONPATH": path}, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **how) as scheduler:
        address = next(line.split()[-1] for line in scheduler.stderr if "tcp://" in line)
        how["stderr"] = subprocess.DEVNULL
        command = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-nanny"]
        worker = subprocess.Popen(command, **how)
        try:
            with (
                open_executor(address=address) as client,
                pytest.raises(UserError, match="workers are lost.*scheduler"),
            ):
                RemoteWorkers(client).map(
                    pieces_of_work.slowly, [(k,) for k in range(600)], lambda *_: scheduler.kill()
                )
        finally:
            scheduler.kill()
            worker.kill()
            worker.wait()


class Broken(Executor):
    """Whose work fails before it begins."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def submit(self, function, /, *arguments, **keywords):
        future: Future = Future()
        future.set_exception(self.error)
        return future


def test_workers_without_gpmlp_or_with_another():
    missing = ModuleNotFoundError("No module named 'gpmlp'", name="gpmlp")
    with pytest.raises(UserError, match="A worker cannot import gpmlp; install it"):
        RemoteWorkers(Broken(missing)).map(pieces_of_work.named, [(0,)])
    with ThreadPoolExecutor(1) as threads:
        other = RemoteWorkers(threads)
        other.versions = other.versions | {"gpmlp": "0.0.1"}
        with pytest.raises(
            UserError, match=r"A worker has gpmlp \S+ and torch \S+, this process gpmlp 0.0.1 and torch"
        ):
            other.map(pieces_of_work.named, [(0,)])


def test_executors_that_are_none(labelled):
    with pytest.raises(UserError, match="`executor` must have submit, as .* has; got 3"):
        gpmlp.fit(*labelled, RECIPE, executor=3)
    with pytest.raises(UserError, match="works on processors, not on 'cuda'"):
        workers.workers_of(ThreadPoolExecutor(1), "cuda")


def test_executors_that_cannot_be_opened(monkeypatch):
    monkeypatch.setattr(workers, "CONNECT_S", 1.0)
    cases = {
        "number of workers must be 1 or more; got 0": {"workers": 0},
        "give one of --workers and --dask": {"workers": 2, "address": "tcp://localhost:1"},
        "There is no dask scheduler at 'tcp://127.0.0.1:9'": {"address": "tcp://127.0.0.1:9"},
        "There is no dask scheduler at 'nonsense://1'": {"address": "nonsense://1"},
    }
    for text, options in cases.items():
        with pytest.raises(UserError, match=text), open_executor(**options):
            pass
    with distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=None) as cluster:
        with (
            pytest.raises(UserError, match="has no workers; start some"),
            open_executor(address=cluster.scheduler_address),
        ):
            pass
    with open_executor() as executor:
        assert executor is None
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match=r"pip install 'gpmlp\[dask\]'"), open_executor(2):
        pass


# the command line -----------------------------------------------------------------------------------------------------------

QUICK = [
    "--set",
    "descriptor.cutoff=4",
    "--set",
    "descriptor.n_max=4",
    "--set",
    "inducing.n=12",
    "--set",
    "novelty=false",
]


def test_the_command_with_workers(train_file, tmp_path, capfd):
    second = tmp_path / "second.xyz"  # files are read by the workers
    ase_atoms.write_frames(second, [copper(seed) for seed in range(30, 34)])
    for name, options in (("alone", []), ("two", ["--workers", "2"])):
        assert main(["fit", str(train_file), str(second), *QUICK, *options, "-o", str(tmp_path / f"{name}.gpmlp")]) == 0
        assert "wrote" in capfd.readouterr().out
    structures, _ = gpmlp.read(train_file)
    alone, two = (gpmlp.load(tmp_path / f"{name}.gpmlp")(structures, variance="forces") for name in ("alone", "two"))
    assert torch.equal(alone.forces, two.forces)
    assert torch.equal(alone.forces_variance.total, two.forces_variance.total)
    second.write_text("3\n\nSi 0 0 0\n")
    assert main(["fit", str(train_file), str(second), "--workers", "1", "-o", str(tmp_path / "no.gpmlp")]) == 2
    assert "second.xyz: cannot be read" in capfd.readouterr().err
    assert main(["fit", str(train_file), "--workers", "0", "-o", str(tmp_path / "no.gpmlp")]) == 2
    assert "number of workers must be 1 or more" in capfd.readouterr().err
    assert not (tmp_path / "no.gpmlp").exists()


def test_one_file_is_read_in_shards(tmp_path, monkeypatch, client):
    """By workers: order, numbers, names and findings are as without them, and so is what is wrong with a frame."""
    monkeypatch.setattr(structure_files, "SHARD_BYTES", 3000)
    file = tmp_path / "train.xyz"
    ase_atoms.write_frames(file, [copper(seed, 1 + seed % 2) for seed in range(30)])
    shards = []

    def each(function, pieces, report):
        shards.append(len(pieces))
        return RemoteWorkers(client).each(function, pieces, report)

    for index in (":", "::3", "::-1", "5"):
        alone, by_workers = ase_atoms.read_labelled(file, index), ase_atoms.read_labelled(file, index, each=each)
        assert by_workers.structures.names == alone.structures.names and by_workers.findings == alone.findings
        for name in ("positions", "cells", "species"):
            assert torch.equal(getattr(by_workers.structures, name), getattr(alone.structures, name))
        for name, value in vars(alone.targets).items():
            other = getattr(by_workers.targets, name)
            assert torch.equal(other.nan_to_num(-7), value.nan_to_num(-7)) if torch.is_tensor(value) else other == value
    assert shards[0] > 5 and shards[-1] == 1
    frames = structure_files.read_file(file).frames
    packed = PackedFrames.of(frames)
    assert isinstance(packed, PackedFrames) and PackedFrames.of([*frames[:3], replace(frames[3], unnamed_columns=2)])[3]
    for frame, other in zip(frames, packed.unpacked(), strict=True):
        assert list(frame.arrays) == list(other.arrays) and list(frame.info) == list(other.info)
        assert all(np.array_equal(value, other.info[key]) for key, value in frame.info.items())
    frames[3].arrays = frames[3].arrays | {"more": np.zeros(len(frames[3]))}
    assert PackedFrames.of(frames) is frames, "they are not alike"
    compressed = tmp_path / "train.xyz.gz"
    compressed.write_bytes(gzip.compress(file.read_bytes()))
    assert ase_atoms.read_labelled(compressed, each=each).structures.n_atoms and len(shards) == 4
    lines = file.read_text().splitlines()
    lines[-1] = lines[-1].replace("Cu", "Xx")
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError) as expected:
        ase_atoms.read_labelled(file)
    with pytest.raises(UserError) as found:
        ase_atoms.read_labelled(file, each=each)
    assert str(found.value) == str(expected.value) and "frame 29" in str(found.value)


def running(group: int) -> list[int]:
    """Processes of a group that have not ended."""
    found = []
    for process in psutil.process_iter(["status"]):
        with suppress(ProcessLookupError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def test_an_interrupted_fit_leaves_no_workers(train_file, tmp_path):
    """Ctrl-C reaches all processes of a terminal: the command says so, its workers say nothing, and none is left."""
    long = ["--set", "inducing.n=90", "--set", "descriptor.n_max=8"]  # to be there still when the signal comes
    command = [sys.executable, "-m", "gpmlp", "fit", str(train_file), *QUICK, *long, "--workers", "2", "-o", "m.gpmlp"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background may ignore it
    try:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
    finally:
        signal.signal(signal.SIGINT, before)
    lines = []
    for line in process.stderr:  # the first stage is over, work is going on
        lines.append(line)
        if line.startswith("data:"):
            break
    before = running(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130, "".join(lines) + rest
    assert len(before) >= 3 and rest.endswith(
        "interrupted; files that were complete are kept, others are as they were.\n"
    )
    assert "Traceback" not in rest and not (tmp_path / "m.gpmlp").exists()
    for _ in range(100):
        if not (left := running(process.pid)):
            break
        time.sleep(0.1)
    assert left == []


# many structures ------------------------------------------------------------------------------------------------------------


def trimers(n: int) -> tuple[Structures, Targets]:
    """Triangles of atoms at random, with the energies and forces of a Morse potential, in closed form."""
    generator = torch.Generator().manual_seed(0)
    place = torch.tensor([[0.0, 0.0, 0.0], [2.4, 0.0, 0.0], [1.2, 2.1, 0.0]], dtype=torch.float64)
    x = (place + 0.2 * torch.randn(n, 3, 3, generator=generator, dtype=torch.float64)).requires_grad_()
    distances = torch.stack([(x[:, a] - x[:, b]).norm(dim=1) for a, b in ((0, 1), (0, 2), (1, 2))])
    energies = ((1 - torch.exp(-1.2 * (distances - 2.4))).square() - 1).sum(0)
    forces = -torch.autograd.grad(energies.sum(), x)[0]
    never = torch.zeros(n, 3, dtype=torch.bool)
    cells, owner = torch.zeros(n, 3, 3, dtype=torch.float64), torch.arange(n).repeat_interleave(3)
    structures = Structures(x.detach().reshape(-1, 3), cells, never, torch.full((3 * n,), 14), owner)
    known = {"energies": energies.detach(), "forces": forces.reshape(-1, 3)}
    return structures, replace(Targets.unlabelled(structures), **known)


@pytest.mark.slow
def test_a_hundred_thousand_structures():
    """In nine partitions, by two processes, whose memory stays that of a small set; and the model is right."""
    structures, targets = trimers(100_000)
    choices = {"inducing": {"n": 60, "gradients": 0}, "descriptor": {"cutoff": 4.5, "n_max": 5, "l_max": 3}}
    recipe = Recipe.model_validate(choices | {"kernel": {"zeta": 3}, "calibration": {"atoms": 60}})
    assert partitions._number_of(structures.n_atoms, 60) == 9
    told = []
    with open_executor(2) as client:
        found = gpmlp.fit(structures, targets, recipe, progress=lambda *report: told.append(report), executor=client)
        peaks = [kB / 1e6 for kB in client.run(pieces_of_work.peak_memory_kB).values()]
    potential, report = found
    assert any(note.endswith(" of 9 partitions") for name, *_, note in told if name == "covariances")
    assert report.rows == {"energies": 100_000, "forces": 900_000}
    others, known = trimers(100_200)
    others, known = others.select(range(100_000, 100_200)), known.select(others, range(100_000, 100_200))
    error = (potential(others).forces - known.forces).square().mean().sqrt()
    assert error < 0.03 * known.forces.square().mean().sqrt()
    assert max(peaks) < 1.2, peaks  # GB
