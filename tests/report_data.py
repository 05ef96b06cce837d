"""Synthetic data of a model's report, its page built of them, and a parser that checks it."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import numpy as np

from gpmlp.report.model.data import CAUSES, ReportData
from gpmlp.report.model.page import write_model_page

VOID = {"meta", "img", "br", "input", "link", "hr", "circle", "line"}
TYPES = ("bulk", "liquid", "surface", "defect", "amorphous", "high pressure")


def crystal(rng: np.random.Generator, cells: int, amplitude: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions, cell and species of a rattled zincblende crystal of Si and C."""
    a = 4.36
    fcc = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    basis = np.concatenate([fcc, fcc + 0.25])
    corners = np.stack(np.meshgrid(*[np.arange(cells)] * 3, indexing="ij"), -1).reshape(-1, 3)
    positions = a * (corners[:, None] + basis[None]).reshape(-1, 3)
    species = np.tile(np.repeat([14, 6], 4), len(corners))
    return positions + amplitude * rng.standard_normal(positions.shape), a * cells * np.eye(3), species


def synthetic(structures: int = 30, cells: int = 1, seed: int = 0) -> ReportData:
    """A model that is good inside what it saw, and knows mostly where it is not: 'high pressure' is out of distribution."""
    rng = np.random.default_rng(seed)
    kinds = [TYPES[k % len(TYPES)] for k in range(structures)]
    hard = {"bulk": 0.4, "liquid": 1.4, "surface": 1.0, "defect": 0.8, "amorphous": 1.2, "high pressure": 4.0}
    parts = [crystal(rng, cells, 0.05 + 0.1 * hard[kind]) for kind in kinds]
    n = np.array([len(p[0]) for p in parts])
    structure = np.repeat(np.arange(structures), n)
    scale = np.array([hard[kind] for kind in kinds])[structure]
    species = np.concatenate([p[2] for p in parts])
    novelty = 0.35 * scale * rng.lognormal(0, 0.3, len(structure))
    std = 0.03 * scale * rng.lognormal(0, 0.45, len(structure)) * np.where(species == 6, 1.4, 1.0)
    tilt = np.clip(novelty, 0, 1.5)[:, None]
    weights = dict(zip(CAUSES, (0.3 / scale[:, None], 0.2 + tilt, 0.35 + 0 * tilt, 0.1 + 0.5 * tilt**2), strict=True))
    total = sum(weights.values())
    std3 = std[:, None] * rng.lognormal(0, 0.1, (len(structure), 3))
    forces = 1.2 * np.sqrt(scale)[:, None] * rng.standard_normal((len(structure), 3))
    error = std3 * (0.75 * rng.standard_normal(std3.shape) + 0.55 * rng.standard_t(4, std3.shape))
    forces_std = {c: std3**2 * w / total for c, w in weights.items()}
    energy = -7.3 * n + 0.12 * n * rng.standard_normal(structures)
    energy_std = 0.002 * n * np.array([hard[k] for k in kinds])
    stress = 0.03 * rng.standard_normal((structures, 6))
    stress_std = 0.0015 * np.array([hard[k] for k in kinds])[:, None] * np.ones(6)
    return ReportData(
        title="Silicon carbide, test set",
        model_name="sic.gpmlp",
        data_name="test.xyz",
        names=tuple(f"test.xyz frame {k}" for k in range(structures)),
        n_atoms=n,
        energy_reference=energy,
        energy_predicted=energy + energy_std * rng.standard_normal(structures),
        energy_std=energy_std,
        energy_variance={c: energy_std**2 * share for c, share in zip(CAUSES, (0.2, 0.3, 0.4, 0.1), strict=True)},
        structure=structure,
        species=species,
        atom=np.concatenate([np.arange(k) for k in n]),
        force_reference=forces,
        force_predicted=forces + error,
        config_type=tuple(kinds),
        force_std=std3,
        force_variance=forces_std,
        local_energy_std=0.3 * std,
        novelty=novelty,
        positions=np.concatenate([p[0] for p in parts]),
        cells=np.stack([p[1] for p in parts]),
        periodic=np.ones((structures, 3), dtype=bool),
        cutoff=4.2,
        stress_reference=stress,
        stress_predicted=stress + stress_std * rng.standard_normal((structures, 6)),
        stress_std=stress_std,
        scores={
            "forces": {
                "n": 3 * int(n.sum()),
                "miscalibration_area": 0.021,
                "nll": -1.32,
                "crps": 0.034,
                "sharpness": 0.06,
                "spearman_of_atoms": 0.58,
                "coverage_50": 0.52,
                "coverage_68": 0.71,
                "coverage_90": 0.91,
                "coverage_95": 0.96,
            },
            "energies": {
                "n": structures,
                "miscalibration_area": 0.034,
                "nll": -2.1,
                "crps": 0.0014,
                "sharpness": 0.003,
                "spearman_of_structures": 0.47,
            },
        },
        rivals={
            "std": {"spearman": 0.58, "auroc_worst_5_percent": 0.91},
            "novelty": {"spearman": 0.49, "auroc_worst_5_percent": 0.86},
            "nearest-neighbour distance": {"spearman": 0.41, "auroc_worst_5_percent": 0.78},
        },
        model=made(rng),
        dimers=tuple(pair(name, shortest) for name, shortest in (("Si-Si", 2.1), ("Si-C", 1.6), ("C-C", 1.35))),
        citations=(
            "@article{Bartok2010,\n  title = {Gaussian approximation potentials},\n  url = {https://example.org/a},\n}",
        ),
    )


def made(rng: np.random.Generator) -> dict:
    """What a fit leaves behind."""
    values = 5200 - 900 * (1 - np.exp(-np.arange(40) / 8)) + 40 * rng.random(40)
    return {
        "recipe": {
            "descriptors": [
                {
                    "name": "soap",
                    "cutoff": 4.2,
                    "n_max": 8,
                    "l_max": 4,
                    "radial_scaling": {"scale": 2.1, "exponent": 4.0},
                }
            ],
            "kernel": {"name": "polynomial", "zeta": 4},
            "inducing": {"method": "greedy", "n": 900, "gradients": 12, "shares": "species"},
            "baseline": {"zbl": True},
        },
        "noise": {"energies": 0.0012, "forces": 0.041, "stresses": 0.0009},
        "signal": {"soap Si": 1.31, "soap C": 1.76},
        "rows": {"energies": 640, "forces": 98304, "stresses": 3840},
        "rank": 11420,
        "columns": 11700,
        "condition": 3.2e8,
        "warnings": ["The noise of stresses ended at its lower bound: 0.0009 eV/Å³ over 3840 rows."],
        "stages": [
            ("survey", 12.1, 640.0),
            ("centres", 48.0, 1210.0),
            ("evidence", 312.0, 2210.0),
            ("solve", 140.2, 3105.0),
        ],
        "evidence_trace": list(enumerate(values.tolist())),
        "provenance": {
            "files": {
                "training": {"name": "train.xyz", "sha256": "9f" * 32},
                "validation": {"name": "valid.xyz", "sha256": "0a" * 32},
            },
            "versions": {"gpmlp": "0.1.0", "torch": "2.9.0"},
            "created": "2026-01-12T10:03:00+00:00",
        },
        "calibration": {
            "method": "scaled per species, conformal",
            "structures": 64,
            "factors": {"forces": 1.12, "energies": 0.94},
        },
    }


def pair(name: str, shortest: float) -> dict:
    """A Morse curve whose error bar opens where there are no data."""
    r = np.linspace(0.8, 5, 90)
    energy = 3.2 * ((1 - np.exp(-1.7 * (r - shortest * 1.12))) ** 2 - 1)
    return {
        "pair": name,
        "r": r,
        "energy": energy,
        "std": 0.15 + 2.5 * np.clip(shortest - r, 0, None) ** 1.5,
        "shortest": shortest,
    }


class Balanced(HTMLParser):
    """Every tag is closed in order; ids are unique; what is loaded is remembered."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.loads, self.ids, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        assert len(values) == len(attrs), f"{tag} repeats an attribute"
        self.loads += [values[k] for k in ("src", "srcset", "href", "action", "data") if values.get(k)]
        self.ids += [values["id"]] if "id" in values else []
        if tag == "img":
            assert values.get("alt")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in VOID

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)


def parse(page: str) -> Balanced:
    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert not parser.open
    assert len(set(parser.ids)) == len(parser.ids)
    assert all(load.startswith(("data:", "#")) for load in parser.loads), "something is loaded from outside"
    return parser


def built(data: ReportData, folder) -> tuple[str, dict, Balanced]:
    path = write_model_page(data, folder)
    page = path.read_text("utf-8")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in report.json")

    return page, json.loads((folder / "report.json").read_text("utf-8"), parse_constant=refuse), parse(page)
