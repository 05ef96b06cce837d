"""Steps of electronic-structure codes that did not converge: found in their outputs, and left out with a warning."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from gpmlp.core.errors import UserError
from gpmlp.core.findings import FindingWarning
from gpmlp.io.ase_atoms import read
from gpmlp.io.convergence import unconverged_steps

ENERGY = '<energy><i name="e_fr_energy">{0}</i><i name="e_wo_entrp">{0}</i><i name="e_0_energy">{0}</i></energy>'
HEAD = (
    '<?xml version="1.0" encoding="ISO-8859-1"?>\n<modeling>\n<incar><i name="EDIFF">0.00001</i><i type="int" name="NELM">3</i>'
    '<i type="int" name="NELMDL">-5</i></incar>\n<kpoints><varray name="kpointlist"><v>0 0 0</v></varray><varray name="weights"><v>1</v>'
    '</varray></kpoints>\n<parameters><i name="EDIFF">0.00001</i><i type="int" name="NELM">3</i></parameters>\n<atominfo><atoms>1</atoms>'
    '<array name="atoms"><set><rc><c>Cu</c><c>1</c></rc></set></array></atominfo>\n'
)
CRYSTAL = (
    '<crystal><varray name="basis"><v>0 2 2</v><v>2 0 2</v><v>2 2 0</v></varray></crystal>'
    '<varray name="positions"><v>0 0 0</v></varray></structure>\n'
)


def vasprun(steps: list[list[float]]) -> str:
    """A vasprun.xml with the energies of the electronic steps of each ionic step."""
    text = HEAD + '<structure name="initialpos">' + CRYSTAL
    for energies in steps:
        scf = "\n".join(f"<scstep>{ENERGY.format(e)}</scstep>" for e in energies)
        forces = '<varray name="forces"><v>0 0 0</v></varray>'
        text += f"<calculation>{scf}<structure>{CRYSTAL}{forces}{ENERGY.format(energies[-1])}</calculation>\n"
    return text + '<structure name="finalpos">' + CRYSTAL + "</modeling>\n"


def test_steps_of_vasp_without_ediff_are_left_out(tmp_path):
    # converged early; used all steps and did not; used all steps, the last of which did
    path = tmp_path / "vasprun.xml"
    path.write_text(vasprun([[-1, -1], [-1, -2, -3], [-5, -4, -4.000001]]))
    with pytest.warns(
        FindingWarning, match=r"vasprun.xml frame 1: the electronic steps have not converged .*NELM"
    ) as caught:
        structures, targets = read(path)
    assert structures.names == ("vasprun.xml frame 0", "vasprun.xml frame 2")
    assert targets.energies.tolist() == [-1, -4.000001]
    assert caught[0].message.finding.kind == "step-not-converged"
    with pytest.raises(UserError, match="the frames '5' of 3|cannot take"):
        read(path, 5)
    path.write_text(vasprun([[-1, -2, -3]]))
    with pytest.raises(UserError, match="none of its 1 steps has converged"):
        read(path)


def test_compressed_and_on_one_line(tmp_path):
    text = vasprun([[-1, -2, -3], [-1, -1]]).replace("\n", "")
    with gzip.open(tmp_path / "vasprun.xml.gz", "wt") as file:
        file.write(text)
    assert unconverged_steps(tmp_path / "vasprun.xml.gz", 2).steps == {0}


def outcar(version: int, *steps: tuple[int, bool]) -> str:
    text = (
        f" vasp.{version}.4.2 18Apr23 complex\n" + 20 * "some line\n" + "   NELM   =      6;   NELMIN=  2; NELMDL=-12\n"
    )
    for i, (n, reached) in enumerate(steps):
        text += "".join(f"----- Iteration{i + 1:7d}({k + 1:4d}) -----\n" for k in range(n))
        if reached:
            text += "------ aborting loop because EDIFF is reached ------\n"
        elif version > 5:
            text += "------ aborting loop EDIFF was not reached (unconverged) ------\n"
        text += " POSITION                                       TOTAL-FORCE (eV/Angst)\n"
    return text


@pytest.mark.parametrize("version", [5, 6])
def test_outcar(tmp_path, version):
    (tmp_path / "OUTCAR").write_text(outcar(version, (4, True), (6, False), (6, True), (6, False)))
    found = unconverged_steps(tmp_path / "OUTCAR", 4)
    assert found.steps == {1, 3} and "EDIFF" in found.reason


def pwscf(accuracies: list[float]) -> str:
    """An output of pw.x with forces of each step, and the accuracy of its last iteration."""
    text = "     Program PWSCF v.7.2 starts\n     scf convergence threshold =      1.0E-09\n"
    for i, accuracy in enumerate(accuracies):
        text += "ATOMIC_POSITIONS (angstrom)\n" if i else ""
        text += "     estimated scf accuracy    <       0.00088135 Ry\n!    total energy = -1.0 Ry\n"
        text += f"     estimated scf accuracy    <       {accuracy:.1E} Ry\n     convergence has been achieved in   3 iterations\n"
        text += "     Forces acting on atoms (cartesian axes, Ry/au):\n"
    return text


def test_pwscf(tmp_path):
    # with scf_must_converge = .false. pw.x 7.2 says that convergence has been achieved where it has not
    text = pwscf([2e-10, 7e-5, 9e-10])
    text += "ATOMIC_POSITIONS (angstrom)\n"  # the last positions once more, without results: no frame of ASE's
    (tmp_path / "pw.out").write_text(text)
    assert unconverged_steps(tmp_path / "pw.out", 3).steps == {1}
    text += "     End of self-consistent calculation\n     convergence NOT achieved after 100 iterations: stopping\n"
    (tmp_path / "pw.out").write_text(text)
    assert unconverged_steps(tmp_path / "pw.out", 4).steps == {1, 3}


def test_aims(tmp_path):
    def step(ok: bool, restart: bool = False) -> str:
        text = "          Begin self-consistency iteration #    1\n"
        if restart:
            text += "  Self-consistency cycle not yet converged - restarting mixer to attempt better convergence.\n"
            text += "          Begin self-consistency loop: Re-initialization.\n          Begin self-consistency iteration #    1\n"
        return text + ("  Self-consistency cycle converged.\n" if ok else "")

    head = "          Invoking FHI-aims ...\n  Begin self-consistency loop: Initialization.\n"
    md = "          Begin self-consistency loop: Re-initialization.\n"
    (tmp_path / "aims.out").write_text(head + step(True) + md + step(False) + md + step(True, restart=True))
    assert unconverged_steps(tmp_path / "aims.out", 3).steps == {1}
    again = "  Geometry optimization: Attempting to predict improved coordinates.\n" + md
    relaxation = head.replace("\n", "\n Geometry relaxation: A file is created\n", 1)
    (tmp_path / "aims.out").write_text(relaxation + step(False) + again + step(True))
    assert unconverged_steps(tmp_path / "aims.out", 2).steps == {0}


def test_other_files_have_none(tmp_path):
    path = Path(tmp_path / "POSCAR")
    path.write_text("Cu\n1\n0 2 2\n2 0 2\n2 2 0\nCu\n1\nDirect\n0 0 0\n")
    assert unconverged_steps(path, 1).steps == frozenset()
    assert len(read(path)[0]) == 1
