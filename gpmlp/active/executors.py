"""Executors are where attempts at labels run: worker processes of this machine, this very thread, or whatever dask and parsl reach."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from gpmlp.active import processes, worker
from gpmlp.active.oracle import OracleRecipe
from gpmlp.checks import UserError, suggest

OPTIONS = {
    "processes": ("threads",),
    "inline": (),
    "dask": ("threads", "address", "scheduler_file"),
    "parsl": ("threads", "config"),
}


@dataclass(frozen=True)
class Runner:
    """An executor and how to use it.

    Attributes:
        function: what makes an attempt there; takes a job, returns a record.
        close: to be called at the end.
        far: whether attempts have to be told to stop by a file, because nothing else reaches them.
    """

    executor: Executor
    function: Callable[..., dict[str, Any]]
    close: Callable[[], None]
    far: bool = False


def of(recipe: OracleRecipe) -> Runner:
    """The executor that a recipe asks for.

    Raises:
        UserError: it is not installed, or an option is not known to it.
    """
    for option in recipe.executor_options:
        if option not in OPTIONS[recipe.executor]:
            raise UserError(
                f"oracle: executor {recipe.executor} has no option '{option}'."
                f"{suggest(option, OPTIONS[recipe.executor]) if OPTIONS[recipe.executor] else ''}"
            )
    if recipe.executor == "dask":
        return _dask(recipe)
    if recipe.executor == "parsl":
        return _parsl(recipe)
    if recipe.executor == "inline":
        return Runner(processes.Inline(), worker.attempt, lambda: None)
    executor = processes.Processes(recipe.workers, recipe.executor_options.get("threads", 1))
    return Runner(executor, worker.attempt, executor.shutdown)


def _missing(name: str, error: ImportError) -> UserError:
    return UserError(f"oracle: executor {name} cannot be imported: {error}; pip install 'gpmlp[{name}]'.")


def _dask(recipe: OracleRecipe) -> Runner:
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise _missing("dask", error) from error
    where = {k: v for k, v in recipe.executor_options.items() if k in ("address", "scheduler_file")}
    cluster = None
    if not where:
        # threads are enough: each attempt gets a process of its own
        cluster = LocalCluster(
            n_workers=1,
            threads_per_worker=recipe.workers,
            processes=False,
            dashboard_address=None,
            protocol="inproc://",
        )
        where = {"address": cluster}
    try:
        client = Client(**where, set_as_default=False)
    except OSError as error:
        raise UserError(f"oracle: there is no dask scheduler at {where}: {error}.") from error

    executor = client.get_executor(pure=False)

    def close() -> None:
        executor.shutdown(wait=False)
        client.close()
        if cluster is not None:
            cluster.close()

    return Runner(executor, processes.in_own_process, close, far=True)


def _parsl(recipe: OracleRecipe) -> Runner:
    try:
        from parsl import Config, ThreadPoolExecutor
        from parsl.concurrent import ParslPoolExecutor
    except ImportError as error:
        raise _missing("parsl", error) from error
    path = recipe.executor_options.get("config")
    if path is None:
        config = Config(executors=[ThreadPoolExecutor(max_threads=recipe.workers)], initialize_logging=False)
    else:
        module, _, name = str(path).partition(":")
        try:
            config = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(
                f"oracle: executor_options.config '{path}' is no 'module:name' of a parsl Config: {error}."
            ) from error
    executor = ParslPoolExecutor(config=config)
    return Runner(executor, processes.in_own_process, executor.shutdown, far=True)
