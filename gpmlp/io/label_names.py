"""Names of labels in files: which key is an energy, forces, a stress or a virial, by whom, and which of several sources is taken.

A name is a word (energy, free_energy, force, stress, virial; singular or plural, any case) with a prefix or suffix that says where
the number comes from, its source: REF_energy and REF_forces are of the source `ref`, energy and forces of the source ``. Labels of
a file are taken from one source.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from gpmlp.core.errors import UserError, suggest_name
from gpmlp.core.findings import Finding, Severity
from gpmlp.io.frames import Frame

KINDS = ("energy", "forces", "stress")
PLURAL = {"energy": "energies", "forces": "forces", "stress": "stresses"}
NONE = "none"  # of --keys: this kind is not to be read
SAME_ENERGY, SAME_FORCE = 1e-6, 1e-4  # eV/atom, eV/A: two names of one number

# a source that says it is the reference; a code or method, whose name alone makes it a source; a model or a part of the energy
REFERENCES = frozenset("ref reference dft qm target label labels true abinitio ab_initio ground_truth".split())
METHODS = REFERENCES | frozenset(
    "vasp outcar qe espresso pwscf cp2k aims fhiaims castep abinit gpaw siesta orca gaussian psi4 turbomole nwchem molpro pyscf "
    "abacus openmx quantum_espresso ccsd ccsdt ccsd_t mp2 rpa hf pbe pbesol pbe0 rpbe revpbe blyp b3lyp hse hse06 scan rscan r2scan "
    "lda wb97x wb97m quip".split()
)
MODELS = frozenset(
    "gpmlp pred predicted prediction model mace nep gap ace nequip allegro deepmd dp chgnet m3gnet mtp snap ml mlip mlff mlp nn nnp "
    "schnet painn sevennet orb mattersim uma grace pet metatrain xtb gfn dftb emt lj sw tersoff eam meam reaxff reax zbl d3 d4 "
    "baseline ff forcefield".split()
)
# words that make another quantity of an energy, or a statement about a label
OTHER = frozenset(
    "kinetic formation binding adsorption ads cohesive atomization interaction inter intra dispersion vdw ewald fermi zero point zpe "
    "per atomic isolated dipole correction corrected band homo lumo relative reaction solvation surface mixing excess hull above "
    "coulomb electrostatic nuclear body exchange correlation xc delta difference diff error err mean max min norm shift std sigma "
    "noise weight weights variance var uncertainty mask unit units key name type mae rmse tolerance bias spring external random "
    "constraint local site one".split()
)
WHOLE = (
    "potential",
    "total",
)  # words that say no more of an energy than that it is one: NequIP's and Allegro's total_energy
# units that gpmlp does not convert, and those that it has
UNITS = frozenset("ha hartree hartrees kcal kj mol ry rydberg au bohr mev gpa kbar bar pa".split())
UNIT_WORDS = frozenset("unit units".split())
LENGTHS = frozenset("length lengths position positions pos distance cell volume".split())
_OWN_UNIT = re.compile(r"^(ev|electron_?volts?|metal|ase)?([/*]?(a|å|ang|angstroms?)([\^*]*-?[123])?)*$")
OWN_UNITS = frozenset("ev a ang angstrom a3 ang3".split())
_LOOKS = {
    "energy": re.compile(r"ener|toten|etot|^e$|^e[_\d]|_e$"),
    "forces": re.compile(r"forc|frc|^f$|^f[_\d]|_f$|grad"),
    "stress": re.compile(r"vir|stress"),
}
_WORD = re.compile(r"^(.*?)([_\-. ]?)(free_?energy|energy|energies|forces?|stress(?:es)?|virials?)(?:[_\-. ](.+))?$")
_NOISE_WORDS = re.compile(r"sigma|std|noise|uncert|weight|varian")
_LABEL_WORDS = re.compile(r"ener|forc|vir|stress|config|^weight")
NO_FORCES = frozenset("positions momenta velocities velo vel velocity initial_magmoms magmoms spin dipoles".split())

Place = tuple[str, str]  # 'results', 'info' or 'arrays', and the key


@dataclass(frozen=True)
class LabelName:
    """What a key says by its name: kind is 'energy', 'free_energy', 'forces', 'stress' or 'virial'."""

    kind: str
    source: str


@cache
def label_name(key: str) -> LabelName | None:
    """The label that a key names, None if it names none."""
    match = _WORD.match(key.lower())
    if match is None:
        return None
    prefix, separator, word, suffix = match.groups()
    if prefix and not separator and prefix not in METHODS:
        return None
    parts = [part for part in re.split(r"[_\-. ]+", f"{prefix}_{suffix or ''}") if part and part not in OWN_UNITS]
    if (OTHER | UNITS) & set(parts):
        return None
    kind = {"e": "energy", "fr": "free_energy", "fo": "forces", "s": "stress", "v": "virial"}
    return LabelName(next(value for start, value in kind.items() if word.startswith(start)), "_".join(parts))


def is_model(source: str) -> bool:
    """Whether a source is a model's, or a part of the energy, and no reference."""
    return bool(MODELS & set(source.split("_"))) and not REFERENCES & set(source.split("_"))


@dataclass(frozen=True)
class LabelKeys:
    """The keys that labels of a file are read from, in the order in which they are tried.

    Attributes:
        energy, forces, stress, virial: places; a frame's label is that of the first place that is there.
    """

    energy: tuple[Place, ...] = ()
    forces: tuple[Place, ...] = ()
    stress: tuple[Place, ...] = ()
    virial: tuple[Place, ...] = ()

    def of_kind(self, kind: str) -> tuple[Place, ...]:
        """Places of a kind; the virial is a stress too."""
        return self.stress + self.virial if kind == "stress" else getattr(self, kind)


def parse_keys(text: str) -> dict[str, tuple[str, ...]]:
    """Keys of labels from text as 'energy=REF_energy,forces=REF_forces,stress=none'; alternatives are joined by +.

    Raises:
        UserError: not of this form.
    """
    keys: dict[str, tuple[str, ...]] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        kind, equals, names = part.partition("=")
        if not equals or not names or kind not in (*KINDS, "virial", "charges", "dipole"):
            raise UserError(
                f"--keys must be as energy=REF_energy,forces=REF_forces,stress=REF_stress (or virial=..., charges=..., dipole=..., or "
                f"{NONE}); got '{part}'."
            )
        keys[kind] = tuple(names.split("+"))
    return keys


class LabelTable:
    """Which frames of a file hold which keys, and which of these are labels by their names."""

    def __init__(self, frames: Sequence[Frame], names: Sequence[str]) -> None:
        self.frames, self.names = frames, names
        holders: dict[Place, list[int]] = {}
        groups: dict[tuple[tuple[str, ...], ...], list[int]] = {}
        for i, frame in enumerate(frames):
            groups.setdefault((tuple(frame.results), tuple(frame.info), tuple(frame.arrays)), []).append(i)
        for signature, members in groups.items():
            for place, keys in zip(("results", "info", "arrays"), signature, strict=True):
                for key in filter(lambda key: isinstance(key, str), keys):
                    holders.setdefault((place, key), []).extend(members)
        self.holders = {place: np.array(sorted(members)) for place, members in holders.items()}
        self._known: dict[Place, np.ndarray] = {}
        self.labels = {place: name for place in self.holders if (name := self._name(place)) is not None}
        self._without_whole()

    def _without_whole(self) -> None:
        """Let total_energy be of the source of bare forces, unless a plainer name is there."""
        for word in WHOLE:
            for place, name in self.labels.items():
                parts = name.source.split("_")
                plain = LabelName(name.kind, "_".join(part for part in parts if part != word))
                if name.kind == "energy" and word in parts and plain not in self.labels.values():
                    self.labels[place] = plain

    def _name(self, place: Place) -> LabelName | None:
        """What a key is by its name; energies and stresses of atoms are no labels."""
        name = label_name(place[1])
        if name is None or place[0] not in ("results", "arrays" if name.kind == "forces" else "info"):
            return None
        of_atoms = place[1].lower().endswith("energies") and np.size(self.value(place, int(self.holders[place][0]))) > 1
        return None if of_atoms or place == ("results", "stresses") else name

    def value(self, place: Place, frame: int) -> Any:
        """What a frame holds there."""
        return getattr(self.frames[frame], place[0])[place[1]]

    def known(self, place: Place) -> np.ndarray:
        """Frames that hold something there other than NaN."""
        if place not in self._known:
            members = self.holders.get(place, np.zeros(0, dtype=int))
            self._known[place] = members[[not is_unknown(self.value(place, int(i))) for i in members]]
        return self._known[place]

    def places(self, kind: str, source: str) -> list[Place]:
        """Where labels of a kind are, of a source; the results of a calculator first, the key of most frames before others."""
        found = [p for p, name in self.labels.items() if name.source == source and name.kind == kind]
        return sorted(found, key=lambda p: (p[0] != "results", -len(self.holders[p])))

    def sources(self, kinds: Sequence[str]) -> list[str]:
        """Sources that have labels of one of the kinds."""
        return list(dict.fromkeys(name.source for name in self.labels.values() if name.kind in kinds))

    def frames_of(self, places: Sequence[Place]) -> np.ndarray:
        """Frames that have a number in at least one of the places."""
        held = [self.known(p) for p in places]
        return np.unique(np.concatenate(held)) if held else np.zeros(0, dtype=int)

    def spell(self, places: Sequence[Place]) -> str:
        """Keys with the number of their frames, for a message."""
        return ", ".join(f"`{place[1]}` ({len(self.known(place))})" for place in places)


def is_unknown(value: Any) -> bool:
    """Whether a value is NaN in all its parts."""
    try:
        numbers = np.asarray(value, dtype=float).ravel()
    except (TypeError, ValueError):
        return False
    return bool(len(numbers)) and bool(np.isnan(numbers[0])) and bool(np.isnan(numbers).all())


def choose_keys(table: LabelTable, path: str, given: Mapping[str, Sequence[str]]) -> tuple[LabelKeys, list[Finding]]:
    """The keys that labels are taken from: those given, else of one source.

    Raises:
        UserError: several sources that differ, none of which is the reference by its name, or a given key that no frame has.
    """
    named = {kind: _given_places(table, path, kind, names) for kind, names in given.items()}
    of_forces = [p for kind in ("energy", "forces") for p in named.get(kind, ()) if p in table.labels]
    if of_forces:
        source: str | None = table.labels[of_forces[0]].source
    else:
        source = None if {"energy", "forces"} <= set(given) else choose_source(table, path, given)
    places = {
        kind: tuple(named[kind]) if kind in named else tuple(table.places(kind, source)) if source is not None else ()
        for kind in ("energy", "forces", "stress", "virial")
    }
    if "energy" not in named and source is not None:
        places["energy"] = _energy_places(table, source)
    if "stress" in named or "virial" in named:
        given_places = [*named.get("stress", ()), *named.get("virial", ())]
        is_virial = {p: "vir" in p[1].lower() or p in named.get("virial", ()) for p in given_places}
        places["stress"] = tuple(p for p in given_places if not is_virial[p])
        places["virial"] = tuple(p for p in given_places if is_virial[p])
    chosen = LabelKeys(**places)
    return chosen, _findings(table, path, chosen, given, "note" if of_forces else "warning")


def _energy_places(table: LabelTable, source: str) -> tuple[Place, ...]:
    """The free energy before the energy, unless it is in some frames only where both are and differ: then there is one zero."""
    free, energy = table.places("free_energy", source), table.places("energy", source)
    both = np.intersect1d(table.frames_of(free), table.frames_of(energy))
    if len(table.frames_of(free)) < len(table.frames_of(energy)) and _differ(table, "energy", free, energy, both):
        return tuple(energy)
    return (*free, *energy)


def _given_places(table: LabelTable, path: str, kind: str, names: Sequence[str]) -> list[Place]:
    """Where the keys are that the user gave; upper and lower case count only where that tells two apart."""
    if tuple(names) == (NONE,):
        return []
    rooms = ("results", "arrays") if kind == "forces" else ("results", "info")
    there = [place for place in table.holders if place[0] in rooms]
    out: list[Place] = []
    for name in names:
        exact = [p for p in there if p[1] == name] or [p for p in there if p[1].lower() == name.lower()]
        if not exact:
            hint = suggest_name(name, sorted({p[1] for p in there})) if there else " They hold no keys at all."
            raise UserError(
                f"{path}: no frame has `{name}`, which --keys gives for the {PLURAL.get(kind, kind)}.{hint}"
            )
        out += sorted(exact, key=lambda p: p[0] != "results")
    return out


def choose_source(table: LabelTable, path: str, given: Mapping[str, Sequence[str]]) -> str | None:
    """The source that labels are taken from; None where no key is known as one.

    A reference by its name comes before others that differ from it; a source of which nothing is known counts if it has both
    energies and forces; a model's never does.
    """
    energies, forces = (
        {s: _places(table, s, kind) for s in table.sources(kinds) if kind not in given} for kind, kinds in _KINDS[:2]
    )
    usable = [s for s in dict.fromkeys([*energies, *forces]) if not is_model(s)]
    complete = [s for s in usable if s in energies and s in forces]
    if complete:
        return _the_one(table, path, complete)
    known = [s for s in usable if not s or METHODS & set(s.split("_")) or s in METHODS]
    with_energy, with_forces = [s for s in known if s in energies], [s for s in known if s in forces]
    if with_energy and with_forces:
        a, b = energies[with_energy[0]], forces[with_forces[0]]
        raise UserError(
            f"{path}: energies are {table.spell(a)} and forces {table.spell(b)} of its {len(table.frames)} frames: they may be of two "
            f"sources. Say that they belong together by --keys energy={a[0][1]},forces={b[0][1]} (in Python keys=...), or rename them."
        )
    if with_energy or with_forces:
        return _the_one(table, path, with_energy or with_forces)
    stresses = [s for s in table.sources(("stress", "virial")) if not is_model(s) and (not s or s in METHODS)]
    return stresses[0] if stresses else None


_KINDS = (("energy", ("energy", "free_energy")), ("forces", ("forces",)), ("stress", ("stress", "virial")))


def _places(table: LabelTable, source: str, kind: str) -> list[Place]:
    return [p for name in dict(_KINDS)[kind] for p in table.places(name, source)]


def _the_one(table: LabelTable, path: str, sources: Sequence[str]) -> str:
    """One of several sources: they are the same numbers, or one is the reference by its name."""
    ranked = sorted(
        sources, key=lambda s: (not REFERENCES & {s, *s.split("_")}, -len(table.frames_of(_places(table, s, "energy"))))
    )
    first, *others = ranked
    reference = bool(REFERENCES & {first, *first.split("_")})
    rivals = [s for s in others if reference == bool(REFERENCES & {s, *s.split("_")})]
    for other in rivals:
        for kind in ("energy", "forces"):
            a, b = _places(table, first, kind), _places(table, other, kind)
            both = np.intersect1d(table.frames_of(a), table.frames_of(b))
            if a and b and (not len(both) or _differ(table, kind, a, b, both)):
                how = "which differ" if len(both) else "each in frames of its own"
                raise UserError(
                    f"{path}: has {PLURAL[kind]} of two sources, {table.spell(a)} and {table.spell(b)}, {how}. Say which are meant by "
                    f"--keys {_as_option(table, first)} or --keys {_as_option(table, other)} (in Python keys=...)."
                )
    return first


def _as_option(table: LabelTable, source: str) -> str:
    parts = [(kind, _places(table, source, kind)) for kind in KINDS]
    return ",".join(f"{kind}={places[0][1]}" for kind, places in parts if places)


def _differ(table: LabelTable, kind: str, a: Sequence[Place], b: Sequence[Place], frames: np.ndarray) -> bool:
    """Whether two names hold different numbers in a frame that has both."""
    for i in frames.tolist():
        frame = table.frames[i]
        x, y = (next(table.value(p, i) for p in places if p[1] in getattr(frame, p[0])) for places in (a, b))
        try:
            x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
        except (TypeError, ValueError):
            return True
        tolerance = SAME_ENERGY * max(len(frame), 1) if kind == "energy" else SAME_FORCE
        if x.shape != y.shape or not np.allclose(x, y, rtol=0, atol=tolerance, equal_nan=True):
            return True
    return False


def _findings(
    table: LabelTable, path: str, chosen: LabelKeys, given: Mapping[str, Sequence[str]], severity: Severity
) -> list[Finding]:
    """What was taken, from how many frames, and what was not though it looks like labels (of that severity)."""
    findings = [_taken(table, path, chosen)]
    n = len(table.frames)
    for kind, kinds in _KINDS:
        taken = chosen.of_kind(kind)
        if given.get(kind) == (NONE,):
            continue
        having = table.frames_of(taken)
        others = [p for p, name in table.labels.items() if name.kind in kinds and p not in taken]
        others = [
            p for p in others if table.labels[p].source != "gpmlp" and not table.labels[p].source.startswith("gpmlp_")
        ]
        rest = np.setdiff1d(table.frames_of(others), having)
        if others and kind in given:
            others = []
        models = [p for p in others if is_model(table.labels[p].source)]
        real = [p for p in others if p not in models]
        differ = [p for p in real if not taken or not len(having) or _other_numbers(table, kind, taken, p)]
        of_models: Severity = "note" if taken else "warning"
        parts: tuple[tuple[list[Place], Severity], ...] = ((differ, severity), (models, of_models))
        for places, grave in parts:
            if not places:
                continue
            where = "" if len(rest) else f"{path}: "
            beside = f"beside {table.spell(taken)}" if taken else "as their source is not the one that is read"
            unread = f"; {len(rest)} of {n} frames have no other {kind} label" if len(rest) else ""
            findings.append(
                Finding(
                    "labels-not-taken",
                    grave,
                    f"{where}{PLURAL[kind]} {table.spell(places)} are not read {beside}{unread}.",
                    tuple(table.names[i] for i in rest.tolist()),
                    {"frames": float(len(table.frames_of(places)))},
                    f"Use --keys {_meant(kind, taken, places, len(rest))} if they are meant (in Python keys=...).",
                )
            )
        if given.get(kind) is None and len(having) < n:
            findings += _unknown_names(table, path, kind, having)
    findings += _two_energies(table, path, chosen)
    if len(findings) == 1 and not any(chosen.of_kind(kind) for kind in KINDS):
        text = f"{path}: no energies, forces or stresses were recognised, and nothing that could be them, in its {n} frames."
        findings.append(Finding("no-labels", "warning", text))
    return findings


def _meant(kind: str, taken: Sequence[Place], places: Sequence[Place], filled: int) -> str:
    """The option that reads other places: in place of those taken, or beside them where they fill frames without a label."""
    keys = f"{kind}={places[0][1]}"
    return (
        f"{kind}={taken[0][1]}+{places[0][1]} (first or, in frames without it, second) or {keys}"
        if taken and filled
        else keys
    )


def _other_numbers(table: LabelTable, kind: str, taken: Sequence[Place], place: Place) -> bool:
    """Whether a key holds something that the keys taken do not."""
    both = np.intersect1d(table.frames_of(taken), table.known(place))
    if len(both) < len(table.known(place)):
        return True
    if kind == "stress":
        virial = {"stress": False, "virial": True}
        if len({virial[table.labels[p].kind] for p in (*taken, place) if p in table.labels}) > 1:
            return False  # of one source and compared frame by frame, or of another source whose energies are compared
    return _differ(table, kind, taken, [place], both)


def _taken(table: LabelTable, path: str, chosen: LabelKeys) -> Finding:
    n = len(table.frames)
    parts = []
    for kind in KINDS:
        places = chosen.of_kind(kind)
        keys = " or ".join(f"`{key}`" for _, key in places)
        count = len(table.frames_of(places))
        unknown = len(set().union(*(table.holders[p].tolist() for p in places))) - count
        where = f" in {count}{f' (NaN in {unknown} more)' if unknown else ''}" if places else ""
        parts.append(f"{PLURAL[kind]} from {keys or 'none'}{where}")
    counts = {f"{PLURAL[kind]}_frames": float(len(table.frames_of(chosen.of_kind(kind)))) for kind in KINDS}
    return Finding("labels-taken", "note", f"{path}: {', '.join(parts)} of {n} frames.", (), counts)


def _two_energies(table: LabelTable, path: str, chosen: LabelKeys) -> list[Finding]:
    """A warning where some frames have only a free energy and all others only an energy: nothing says that these are alike."""
    names = {p: table.labels[p].kind for p in chosen.energy if p in table.labels}
    free, plain = (table.frames_of([p for p, k in names.items() if k == kind]) for kind in ("free_energy", "energy"))
    if not len(free) or not len(plain) or len(np.intersect1d(free, plain)):
        return []
    text = f"{path}: energies are free energies in {len(free)} frames and energies in {len(plain)} others; both are taken for the same."
    numbers = {"free_energy_frames": float(len(free)), "energy_frames": float(len(plain))}
    return [
        Finding(
            "two-kinds-of-energy", "warning", text, (), numbers, "Give all frames the energy that forces belong to."
        )
    ]


def _unknown_names(table: LabelTable, path: str, kind: str, having: np.ndarray) -> list[Finding]:
    """Keys of frames without a label of a kind that may hold it, by the shape of their values and, where others have one, by name."""
    room = "arrays" if kind == "forces" else "info"
    found = [
        place
        for place, members in table.holders.items()
        if place[0] == room
        and place not in table.labels
        and not np.isin(members, having).any()
        and _may_be(kind, place[1], table.value(place, int(members[0])), len(table.frames[int(members[0])]))
        and (not len(having) or _LOOKS[kind].search(place[1].lower()))
    ]
    if not found:
        return []
    found.sort(key=lambda place: not _LOOKS[kind].search(place[1].lower()))  # the likely ones first
    n, rest = len(table.frames), np.setdiff1d(table.frames_of(found), having)
    words = {"energy": "energy or free_energy", "forces": "forces or force", "stress": "stress or virial"}[kind]
    where = f"of {len(rest)} of its {n} frames" if len(having) else f"in any of its {n} frame{'s' * (n > 1)}"
    return [
        Finding(
            "labels-of-unknown-name",
            "warning",
            f"{path}: no {PLURAL[kind]} were recognised {where}; their {room} hold {', '.join(key for _, key in found)}. "
            f"{PLURAL[kind].capitalize()} are called {words}, bare or with the name of their source, as REF_.",
            (),
            {"frames": float(len(rest))},
            f"Name them by --keys {kind}={found[0][1]} (in Python keys=...) if they are in eV and A, or rename them.",
        )
    ]


def _may_be(kind: str, key: str, value: Any, n_atoms: int) -> bool:
    name, array = key.lower(), np.asarray(value)
    if array.dtype.kind not in "fi" or _NOISE_WORDS.search(name) or name in NO_FORCES:
        return False
    if kind == "stress":
        return array.size in (6, 9) and bool(_LOOKS[kind].search(name))
    return array.dtype.kind == "f" and array.shape == (() if kind == "energy" else (n_atoms, 3))


def weights(table: LabelTable, path: str, read: Collection[str]) -> list[Finding]:
    """Weights and standard deviations of labels, those that are read and those without a meaning here, with their counts."""
    findings = []
    for (place, key), members in table.holders.items():
        name = key.lower()
        if name.startswith("gpmlp") or place == "results":
            continue
        if name in read:
            text = f"{path}: `{key}` of {len(members)} frames is read (standard deviations of labels, or which of them count)."
            findings.append(Finding("weights-read", "note", text, (), {"frames": float(len(members))}))
            continue
        if not (_NOISE_WORDS.search(name) and _LABEL_WORDS.search(name)):
            continue
        zero = [i for i in members.tolist() if place == "info" and _is_zero(table.value((place, key), i))]
        findings.append(
            Finding(
                "weights-not-read",
                "warning" if zero else "note",
                f"{'' if zero else path + ': '}`{key}` of {len(members)} frames is not read"
                + (f"; it is 0 in {len(zero)}, which count here like all others." if zero else "."),
                tuple(table.names[i] for i in zero),
                {"frames": float(len(members)), "zeros": float(len(zero))},
                "Standard deviations of labels are energy_noise (eV/atom), force_noise (eV/A) and stress_noise (eV/A^3).",
            )
        )
    return findings


def other_units(table: LabelTable, path: str) -> list[Finding]:
    """Units that a file states for its frames (`energy_unit=Hartree`, `units=metal`) and that are not those in which labels are read."""
    findings = []
    for place, members in table.holders.items():
        if place[0] != "info" or not UNIT_WORDS & set(re.split(r"[_\-. ]+", place[1].lower())):
            continue
        stated: dict[str, list[int]] = {}
        for i in members.tolist():
            stated.setdefault(str(table.value(place, i)), []).append(i)
        for text, where in stated.items():
            words = [word for word in re.split(r"[,;\s]+|(?<=[a-z])[:=]", text.lower()) if word]
            if all(_OWN_UNIT.match(word) or label_name(word) or word in LENGTHS for word in words):
                continue
            known = UNITS & set(re.split(r"[^a-z]+", text.lower()))
            findings.append(
                Finding(
                    "labels-in-another-unit",
                    "error" if known else "warning",
                    f"`{place[1]}` says {text[:40]!r}; labels are read as eV, eV/A and eV/A^3 whatever it says.",
                    tuple(table.names[i] for i in where),
                    {"frames": float(len(where))},
                    "Convert the labels and the key, or remove the key if they are in eV and A.",
                )
            )
    return findings


def _is_zero(value: Any) -> bool:
    try:
        return float(value) == 0.0
    except (TypeError, ValueError):
        return False
