"""LammpsRuns lets LAMMPS go on by an input script of the user's, with the model as it is, until it halts or comes to its end.

The script gets these variables: `model` and `plugin`, files; `novelty` and `sigma`, limits (trigger.novelty, trigger.local_energy);
`begun`, 0 or 1: whether there is a state to go on from, and `state`, its file; `next`, where it writes the state for the next run; and
`halted`, where it writes the frame at which it halted, and nothing otherwise. Both are in a folder of that attempt, which counts, by one
renaming, when LAMMPS has ended without an error; so a run that was killed begins again from its last state. What is left of LAMMPS then is
ended first.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

from gpmlp.core.errors import UserError
from gpmlp.core.structures import Structures
from gpmlp.engines.lammps import SOURCES, build_plugin, find_lammps
from gpmlp.io.ase_atoms import read_unlabelled
from gpmlp.io.export import export_model
from gpmlp.io.files import check_readable
from gpmlp.io.provenance import file_hash
from gpmlp.learning.oracles.results import LockHolder
from gpmlp.learning.recipe import LammpsRecipe
from gpmlp.potential.potential import Potential

NEVER = 1e30  # a limit that nothing exceeds
PROCESS = "process"  # a file of an attempt: who makes it
SAID = 12  # last lines of LAMMPS's output that an error shows


class LammpsRuns:
    """LAMMPS runs in the folder of the recipe; its files, in the folder `lammps` of the run."""

    def __init__(self, recipe: LammpsRecipe, base: Path, folder: Path) -> None:
        """Raises UserError: there is no script, no LAMMPS, or no such plugin."""
        check_readable(base / recipe.input, "the input script of LAMMPS")
        if recipe.plugin:
            check_readable(base / recipe.plugin, "the plugin of LAMMPS")
        self.recipe, self.base, self.folder = recipe, base.resolve(), folder.resolve() / "lammps"
        self.ended, self.state = self.folder / "ended", self.folder / "state"
        self.installation = None if recipe.command and recipe.plugin else find_lammps()
        self.command = shlex.split(recipe.command or str(self.installation and self.installation.executable))

    def waiting(self) -> Structures | None:
        """The frame at which LAMMPS has halted, until it is `done` with; None if there is none."""
        return _frame(self.ended)

    def plugin(self) -> Path:
        """That of the recipe, or one for this LAMMPS and this gpmlp, which takes half a minute to build where there is none yet.

        Raises:
            UserError: it cannot be built.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.recipe.plugin:
            return self.base / self.recipe.plugin
        assert self.installation is not None
        made_of = sorted(path for path in SOURCES.glob("*/*.?pp"))
        parts = [repr(self.installation).encode(), *(path.read_bytes() for path in made_of)]
        made = self.folder / f"gpmlp_{hashlib.sha256(b''.join(parts)).hexdigest()[:12]}_plugin.so"
        return made if made.exists() else build_plugin(self.installation.executable, made)[0]

    def advance(
        self, potential: Potential, source: Path, novelty: float | None, sigma: float | None
    ) -> Structures | None:
        """The frame at which LAMMPS halts; None when it has come to its end.

        Args:
            source: the model file of the potential. novelty, sigma: limits for the script.

        Raises:
            UserError: LAMMPS ended with an error, which is told, or wrote no single frame.
        """
        self._clear()
        plugin = self.plugin()
        attempt = Path(tempfile.mkdtemp(prefix="attempt.", dir=self.folder))
        export_model(potential, self.folder / "model", file_hash(source))
        limits = {"novelty": novelty, "sigma": sigma}
        variables: dict[str, object] = {name: NEVER if limit is None else limit for name, limit in limits.items()}
        variables |= {"model": self.folder / "model", "plugin": plugin, "halted": attempt / "halted.xyz"}
        variables |= {"begun": int(self.state.exists()), "state": self.state, "next": attempt / "state"}
        self._run([word for name, value in variables.items() for word in ("-var", name, str(value))], attempt / PROCESS)
        frame = _frame(attempt)
        attempt.rename(self.ended)
        return frame

    def done(self) -> None:
        """The next run goes on from where the last one ended."""
        if (self.ended / "state").exists():
            (self.ended / "state").replace(self.state)
        shutil.rmtree(self.ended, ignore_errors=True)

    def _clear(self) -> None:
        """Remove attempts that do not count, after ending LAMMPS where one is still at work on them; and what is left of the last
        one that did: a folder without a frame does not tell whether LAMMPS had come to its end."""
        for left in (*self.folder.glob("attempt.*"), *self.folder.glob(self.ended.name)):
            process = left / PROCESS
            holder = LockHolder.from_text(process.read_text()) if process.exists() else None
            if holder is not None and holder.alive:
                holder.end()
            shutil.rmtree(left)

    def _run(self, variables: list[str], process: Path) -> None:
        command = [*self.command, "-in", self.recipe.input, "-log", str(self.folder / "log.lammps"), *variables]
        environment = os.environ | (self.installation.environment if self.installation else {})
        try:
            running = subprocess.Popen(
                command, cwd=self.base, env=environment, text=True, errors="replace",
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"lammps.command: {self.command[0]} cannot be run: {error.strerror}.") from error
        with running:
            holder = LockHolder.of_process(running.pid)
            try:
                process.write_text(holder.to_text())
                output = running.communicate()
            except BaseException:
                holder.end()
                raise
        if running.returncode:
            said = "\n".join(line for text in output for line in text.splitlines()[-SAID:])
            raise UserError(f"LAMMPS ended with an error ({shlex.join(command)}):\n{said}")


def _frame(folder: Path) -> Structures | None:
    """The frame at which LAMMPS halted that wrote to a folder; None if there is none."""
    halted = folder / "halted.xyz"
    if not halted.exists():
        return None
    _, frames = read_unlabelled(halted)
    if len(frames) != 1:
        raise UserError(
            f"{halted}: the script has to write the frame at which it halted; it wrote {len(frames)}. Correct it and go on (--resume)."
        )
    return replace(frames, names=("LAMMPS' frame",))
