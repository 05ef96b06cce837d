"""LammpsRuns lets LAMMPS go on by an input script of the user's, with the model as it is, until it halts or comes to its end.

The script gets these variables: `model` and `plugin`, files; `novelty` and `sigma`, limits (trigger.novelty, trigger.local_energy);
`begun`, 0 or 1: whether there is a state to go on from, and `state`, its file; `next`, where it writes the state for the next run; and
`halted`, where it writes the frame at which it halted, and nothing otherwise. What LAMMPS wrote counts when it has ended without an
error, so that a run that was killed begins again from its last state.
"""

from __future__ import annotations

import os
import shlex
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
    """LAMMPS runs in the folder of the recipe; its files, in the folder `lammps` of the run.

    Attributes:
        halted: the file of a frame at which LAMMPS has halted, until it is `done` with.
    """

    def __init__(self, recipe: LammpsRecipe, base: Path, folder: Path) -> None:
        """Raises UserError: there is no script, no LAMMPS, or no plugin can be built for it."""
        check_readable(base / recipe.input, "the input script of LAMMPS")
        self.recipe, self.base, self.folder = recipe, base.resolve(), folder.resolve() / "lammps"
        self.halted = self.folder / "halted.xyz"
        self.installation = find_lammps()
        self.command = shlex.split(recipe.command) if recipe.command else [str(self.installation.executable)]

    def _file(self, name: str) -> Path:
        return self.folder / name

    def waiting(self) -> Structures | None:
        """The frame at which LAMMPS halted when this run was interrupted, if it was then."""
        if not self.halted.exists():
            return None
        self._adopt()
        return self._frame()

    def advance(
        self, potential: Potential, source: Path, novelty: float | None, sigma: float | None
    ) -> Structures | None:
        """The frame at which LAMMPS halts; None when it has come to its end.

        Args:
            source: the model file of the potential. novelty, sigma: limits for the script.

        Raises:
            UserError: LAMMPS ended with an error, which is told.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("halting.xyz", "next"):
            self._file(name).unlink(missing_ok=True)
        export_model(potential, self._file("model"), file_hash(source))
        begun = self._file("state").exists()
        variables = {
            "model": self._file("model"),
            "plugin": self._plugin(),
            "begun": int(begun),
            "state": self._file("state"),
        }
        variables |= {"next": self._file("next"), "halted": self._file("halting.xyz")}
        variables |= {"novelty": NEVER if novelty is None else novelty, "sigma": NEVER if sigma is None else sigma}
        words = [word for name, value in variables.items() for word in ("-var", name, str(value))]
        command = [*self.command, "-in", self.recipe.input, "-log", str(self._file("log.lammps")), *words]
        try:
            environment = os.environ | self.installation.environment
            done = subprocess.run(command, cwd=self.base, env=environment, capture_output=True, text=True, check=False)
        except OSError as error:
            raise UserError(f"lammps.command: {self.command[0]} cannot be run: {error.strerror}.") from error
        if done.returncode:
            said = "\n".join([*done.stdout.splitlines()[-SAID:], *done.stderr.splitlines()[-SAID:]])
            raise UserError(f"LAMMPS ended with an error ({shlex.join(command)}):\n{said}")
        if self._file("halting.xyz").exists():
            self._file("halting.xyz").replace(self.halted)
        self._adopt()
        return self._frame() if self.halted.exists() else None

    def done(self) -> None:
        """The frame is learned, or was before."""
        self.halted.unlink(missing_ok=True)

    def _adopt(self) -> None:
        """What LAMMPS wrote for the next run is what that goes on from."""
        if self._file("next").exists():
            self._file("next").replace(self._file("state"))

    def _frame(self) -> Structures:
        _, frames = read_unlabelled(self.halted)
        if len(frames) != 1:
            raise UserError(
                f"{self.halted}: the script has to write the frame at which it halted; it wrote {len(frames)}."
            )
        return replace(frames, names=("LAMMPS' frame",))

    def _plugin(self) -> Path:
        if self.recipe.plugin:
            return self.base / self.recipe.plugin
        made = self._file("gpmlp_plugin.so")
        return made if made.exists() else build_plugin(self.installation.executable, made)[0]
