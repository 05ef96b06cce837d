"""LammpsRuns lets LAMMPS go on by an input script of the user's, with the model as it is, until it halts or comes to its end.

The script gets these variables: `model` and `plugin`, files; `novelty` and `sigma`, limits (trigger.novelty, trigger.local_energy);
`begun`, 0 or 1: whether there is a state to go on from, and `state`, its file; `next`, where it writes the state for the next run; and
`halted`, where it writes the frame at which it halted, and nothing otherwise. Both are in a folder of that attempt, which counts, by one
renaming, when LAMMPS has ended without an error; so a run that was killed begins again from its last state, whatever is left of LAMMPS.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

from gpmlp.core.errors import UserError
from gpmlp.core.structures import Structures
from gpmlp.engines.lammps import build_plugin, find_lammps
from gpmlp.io.ase_atoms import read_unlabelled
from gpmlp.io.export import export_model
from gpmlp.io.files import check_readable
from gpmlp.io.provenance import file_hash
from gpmlp.learning.recipe import LammpsRecipe
from gpmlp.potential.potential import Potential

NEVER = 1e30  # a limit that nothing exceeds
SAID = 12  # last lines of LAMMPS's output that an error shows


class LammpsRuns:
    """LAMMPS runs in the folder of the recipe; its files, in the folder `lammps` of the run."""

    def __init__(self, recipe: LammpsRecipe, base: Path, folder: Path) -> None:
        """Raises UserError: there is no script, or no LAMMPS."""
        check_readable(base / recipe.input, "the input script of LAMMPS")
        self.recipe, self.base, self.folder = recipe, base.resolve(), folder.resolve() / "lammps"
        self.ended, self.state = self.folder / "ended", self.folder / "state"
        self.installation = None if recipe.command and recipe.plugin else find_lammps()
        self.command = shlex.split(recipe.command or str(self.installation and self.installation.executable))

    def waiting(self) -> Structures | None:
        """The frame at which LAMMPS has halted, until it is `done` with; None if there is none."""
        halted = self.ended / "halted.xyz"
        if not halted.exists():
            return None
        _, frames = read_unlabelled(halted)
        if len(frames) != 1:
            raise UserError(f"{halted}: the script has to write the frame at which it halted; it wrote {len(frames)}.")
        return replace(frames, names=("LAMMPS' frame",))

    def advance(
        self, potential: Potential, source: Path, novelty: float | None, sigma: float | None
    ) -> Structures | None:
        """The frame at which LAMMPS halts; None when it has come to its end.

        Args:
            source: the model file of the potential. novelty, sigma: limits for the script.

        Raises:
            UserError: LAMMPS ended with an error, which is told.
        """
        if self.ended.exists():
            return None
        for left in self.folder.glob("attempt.*"):
            shutil.rmtree(left)
        attempt = self.folder / f"attempt.{os.getpid()}"
        attempt.mkdir(parents=True)
        export_model(potential, self.folder / "model", file_hash(source))
        limits = {"novelty": novelty, "sigma": sigma}
        variables: dict[str, object] = {name: NEVER if limit is None else limit for name, limit in limits.items()}
        variables |= {"model": self.folder / "model", "plugin": self._plugin(), "halted": attempt / "halted.xyz"}
        variables |= {"begun": int(self.state.exists()), "state": self.state, "next": attempt / "state"}
        self._run([word for name, value in variables.items() for word in ("-var", name, str(value))])
        attempt.rename(self.ended)
        return self.waiting()

    def done(self) -> None:
        """The next run goes on from where the last one ended."""
        if (self.ended / "state").exists():
            (self.ended / "state").replace(self.state)
        shutil.rmtree(self.ended, ignore_errors=True)

    def _run(self, variables: list[str]) -> None:
        command = [*self.command, "-in", self.recipe.input, "-log", str(self.folder / "log.lammps"), *variables]
        environment = os.environ | (self.installation.environment if self.installation else {})
        try:
            done = subprocess.run(command, cwd=self.base, env=environment, capture_output=True, text=True, check=False)
        except OSError as error:
            raise UserError(f"lammps.command: {self.command[0]} cannot be run: {error.strerror}.") from error
        if done.returncode:
            said = "\n".join([*done.stdout.splitlines()[-SAID:], *done.stderr.splitlines()[-SAID:]])
            raise UserError(f"LAMMPS ended with an error ({shlex.join(command)}):\n{said}")

    def _plugin(self) -> Path:
        if self.recipe.plugin:
            return self.base / self.recipe.plugin
        assert self.installation is not None
        made = self.folder / "gpmlp_plugin.so"
        return made if made.exists() else build_plugin(self.installation.executable, made)[0]
