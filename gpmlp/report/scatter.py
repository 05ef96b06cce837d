"""A Scatter is a plot of very many points: a density image for all of them, and the few that a pointer can ask for."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from gpmlp.core.errors import chemical_symbol
from gpmlp.report.model.data import COMPONENTS, UNITS, Labelled, ReportData
from gpmlp.report.model.numbers import binned
from gpmlp.report.model.worst import ratio
from gpmlp.report.style import ERROR, INK, KIND_COLOURS, PALE, density, ramp, rgb

THINNED = 3000  # points that can be hovered over, in each plot
GRID = 150  # bins along each axis
COARSE = 100  # the same where colours are means
SPARSE = 2000  # fewer points than this need no density image
PARITY_UNITS = {"energies": ("eV/atom", 1e-3), "forces": ("eV/Å", 1e-3), "stresses": ("GPa", 1.0)}


@dataclass(frozen=True)
class Axis:
    """One axis: what it shows, its range, whether it is logarithmic."""

    label: str
    low: float
    high: float
    log: bool = False

    def place(self, values: np.ndarray) -> np.ndarray:
        """Values as fractions of the axis, clipped into it."""
        low, high = self.low, self.high
        if self.log:
            values, low, high = np.log10(np.maximum(values, 1e-300)), np.log10(low), np.log10(high)
        return np.clip((np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / (high - low), 0.0, 1.0)


@dataclass(frozen=True, eq=False)
class Line:
    """A polyline over the points; with `bare` only its dots."""

    x: list[float]
    y: list[float]
    colour: str
    label: str
    dashed: bool = False
    dots: bool = False
    bare: bool = False


@dataclass(frozen=True, eq=False)
class Scatter:
    """One plot.

    Attributes:
        name: of its files; title: above it.
        px, py: (k,) fractions of the axes; value: (k,) colour as a fraction, or None for plain points.
        columns: what the pointer shows, (label, unit, values).
        structure, row: (k,) index of the structure and of the atom (-1 for none); worst: (k,) the larger, the more worth keeping.
    """

    name: str
    title: str
    x: Axis
    y: Axis
    px: np.ndarray
    py: np.ndarray
    structure: np.ndarray
    row: np.ndarray
    worst: np.ndarray
    columns: tuple[tuple[str, str, np.ndarray], ...]
    component: np.ndarray | None = None
    components: tuple[str, ...] = ("",)
    colour: str = INK
    value: np.ndarray | None = None
    value_label: str = ""
    value_range: tuple[float, float] = (0.0, 1.0)
    lines: tuple[Line, ...] = field(default=())

    def grid(self) -> np.ndarray:
        """(bins, bins) number of points, or mean colour fraction where points have colours (NaN = none); rows from the bottom."""
        n = GRID if self.value is None else COARSE
        i, j = (np.minimum((place * n).astype(int), n - 1) for place in (self.py, self.px))
        known = np.ones(len(i), dtype=bool) if self.value is None else np.isfinite(self.value)
        flat = (i * n + j)[known]
        counts = np.bincount(flat, minlength=n * n).astype(float)
        sums = counts if self.value is None else np.bincount(flat, self.value[known], n * n) / np.maximum(counts, 1)
        return np.where(counts > 0, sums, np.nan).reshape(n, n)

    def pixels(self) -> np.ndarray:
        """(bins, bins, 4) uint8, grid() in colours from the top, transparent where there is nothing."""
        grid = self.grid()[::-1]
        if self.value is None:
            grid = np.log1p(grid) / np.log1p(max(np.nanmax(grid), 1.0))
        colours = np.array(
            [rgb(c) for c in ramp(density(self.colour) if self.value is None else ERROR, 64)], dtype=np.uint8
        )
        shown = np.zeros((*grid.shape, 4), dtype=np.uint8)
        known = np.isfinite(grid)
        shown[known, :3] = colours[np.clip(grid[known] * 63, 0, 63).astype(int)]
        shown[known, 3] = 255
        return shown

    def kept(self) -> np.ndarray:
        """Indices of at most THINNED points: the worst, and an even draw from the others."""
        n = len(self.px)
        if n <= THINNED:
            return np.arange(n)
        order = np.argsort(-np.nan_to_num(self.worst, nan=-1.0), kind="stable")
        worst, rest = order[: THINNED // 2], order[THINNED // 2 :]
        drawn = np.random.default_rng(0).choice(rest, THINNED - len(worst), replace=False)
        return np.concatenate([np.sort(drawn), worst[::-1]])


def png(pixels: np.ndarray) -> bytes:
    """(h, w, 4) uint8 as a PNG file."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    h, w = pixels.shape[:2]
    rows = np.concatenate([np.zeros((h, 1), np.uint8), pixels.reshape(h, -1)], axis=1).tobytes()
    head = struct.pack(">IIBBBBB", w, h, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 5)) + chunk(b"IEND", b"")


def parity(view: Labelled) -> Scatter:
    """Predicted against reference."""
    unit, scale = PARITY_UNITS[view.kind]
    x, y = scale * view.reference, scale * view.predicted
    low, high = min(x.min(), y.min()), max(x.max(), y.max())
    pad = 0.04 * (high - low) or 0.5 * max(abs(high), 1.0)
    low, high = float(low - pad), float(high + pad)
    noun = {"energies": "energy", "forces": "force component", "stresses": "stress component"}[view.kind]
    axes = (Axis(f"reference {noun}, {unit}", low, high), Axis(f"predicted, {unit}", low, high))
    return Scatter(
        f"parity_{view.kind}",
        view.kind.capitalize(),
        *axes,
        axes[0].place(x),
        axes[1].place(y),
        view.structure,
        _atoms(view),
        np.abs(view.error),
        _columns(view),
        view.component,
        COMPONENTS[view.kind],
        KIND_COLOURS[view.kind],
        lines=(Line([low, high], [low, high], PALE, "predicted = reference"),),
    )


def error_against_std(view: Labelled) -> Scatter:
    """|error| against predicted std on logarithmic axes, with RMSE against std in bins."""
    known = np.isfinite(view.scaled)
    bins = binned(view)
    known &= np.abs(view.error) >= min(bins["floor"], np.abs(view.error[known]).max())
    std, error = view.std[known], np.abs(view.error[known])
    x_low, x_high = np.quantile(std, 0.0005) / 1.3, std.max() * 1.3
    y_low = min(bins["floor"], x_low)
    y_high = max(float(error.max()) * 1.3, y_low * 10)
    unit = UNITS[view.kind]
    x, y = (
        Axis(f"predicted σ, {unit}", float(x_low), float(x_high), True),
        Axis(f"|error|, {unit}", float(y_low), y_high, True),
    )
    low, high = max(x.low, y.low), min(x.high, y.high)
    lines = (
        Line([low, high], [low, high], PALE, "RMSE = σ: perfect", dashed=True),
        Line(bins["std"], bins["rmse"], INK, "RMSE in bins of σ", dots=True),
    )
    return Scatter(
        f"error_std_{view.kind}",
        view.kind.capitalize(),
        x,
        y,
        x.place(std),
        y.place(error),
        view.structure[known],
        _atoms(view)[known],
        np.abs(view.scaled[known]),
        tuple((label, unit, values[known]) for label, unit, values in _columns(view)),
        view.component[known],
        COMPONENTS[view.kind],
        KIND_COLOURS[view.kind],
        lines=lines,
    )


def novelty_map(data: ReportData) -> Scatter | None:
    """Force std against novelty of every atom, coloured by its force error."""
    std = 1e3 * data.atom_std
    if data.novelty is None:
        return None
    rows = np.flatnonzero((std > 0) & np.isfinite(std) & (data.novelty >= 0))
    if not len(rows):
        return None
    std, novelty, error = std[rows], data.novelty[rows], 1e3 * data.atom_error[rows]
    seen = novelty[np.isfinite(novelty) & (novelty > 0)]
    low, high = (np.quantile(seen, 0.001), seen.max()) if len(seen) else (0.3, 3.0)
    high = max(high, 1.5) * (1.6 if np.isinf(novelty).any() else 1.15)
    label = "novelty (> 1: outside the trust region" + ("; right edge: ∞)" if np.isinf(novelty).any() else ")")
    x = Axis(label, float(min(low / 1.2, 0.6)), float(high), True)
    y = Axis("force σ, meV/Å", float(np.quantile(std, 0.0005) / 1.2), float(std.max() * 1.25), True)
    ends, value = (0.0, 1.0), None
    known = np.isfinite(error) & (error > 0)
    if known.any():
        bottom, top = np.quantile(error[known], (0.02, 0.998))
        ends = (float(bottom), float(max(top, 1.01 * bottom)))
        value = np.where(known, Axis("", *ends, True).place(error), np.nan)
    columns = [
        ("novelty", "", novelty),
        ("σ", "meV/Å", std),
        ("error", "meV/Å", error),
        ("error / σ", "", ratio(data)[rows]),
    ]
    if data.local_energy_std is not None:
        columns.append(("local energy σ", "meV", 1e3 * data.local_energy_std[rows]))
    return Scatter(
        "novelty_std",
        "Every atom",
        x,
        y,
        x.place(novelty),
        y.place(std),
        np.asarray(data.structure)[rows],
        rows,
        np.nan_to_num(error) + std,
        tuple(columns),
        value=value,
        value_label="force error, meV/Å",
        value_range=ends,
        lines=(Line([1.0, 1.0], [y.low, y.high], PALE, "edge of the trust region", dashed=True),),
    )


def _atoms(view: Labelled) -> np.ndarray:
    return view.row if view.kind == "forces" else np.full(len(view), -1)


def _columns(view: Labelled) -> tuple[tuple[str, str, np.ndarray], ...]:
    unit = UNITS[view.kind]
    coarse, scale = PARITY_UNITS[view.kind]
    columns = [("reference", coarse, scale * view.reference), ("predicted", coarse, scale * view.predicted)]
    columns.append(("error", unit, view.error))
    if np.isfinite(view.std).any():
        columns += [("σ", unit, view.std), ("error / σ", "", view.scaled)]
    return tuple(columns)


class Places(Protocol):
    """What points belong to: structures with their names, and the atoms in them."""

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def config_type(self) -> Sequence[str]: ...

    @property
    def species(self) -> np.ndarray: ...

    @property
    def atom(self) -> np.ndarray: ...


def payload(data: Places, plots: Sequence[Scatter], whole: str = "whole structure") -> dict:
    """What interactive.js draws; only structures and atoms that can be pointed at are in it.

    Args:
        whole: what a point without an atom is.
    """
    kept = [plot.kept() for plot in plots]
    structures = _distinct(plot.structure[k] for plot, k in zip(plots, kept, strict=True))
    rows = _distinct(plot.row[k] for plot, k in zip(plots, kept, strict=True))
    rows = rows[rows >= 0]
    types, type_of = np.unique(np.array([data.config_type[i] for i in structures], dtype=str), return_inverse=True)
    return {
        "structures": {
            "name": [data.names[i] for i in structures],
            "type": type_of.tolist(),
            "types": types.tolist(),
            "whole": whole,
        },
        "atoms": {
            "element": [chemical_symbol(int(z)) for z in np.asarray(data.species)[rows]],
            "index": np.asarray(data.atom)[rows].tolist(),
        },
        "errorColours": list(ramp(ERROR, 64)),
        "plots": {plot.name: _plot(plot, k, structures, rows) for plot, k in zip(plots, kept, strict=True)},
    }


def _distinct(parts: Iterable[np.ndarray]) -> np.ndarray:
    parts = list(parts)
    return np.unique(np.concatenate(parts)).astype(int) if parts else np.zeros(0, dtype=int)


def _packed(values: np.ndarray, kind: str) -> str:
    """Base64 of a little-endian array."""
    return base64.b64encode(np.ascontiguousarray(values).astype(kind).tobytes()).decode()


def _plot(plot: Scatter, kept: np.ndarray, structures: np.ndarray, rows: np.ndarray) -> dict:
    owner = plot.row[kept]
    points = {
        "n": len(kept),
        "x": _packed(np.round(plot.px[kept] * 65535), "<u2"),
        "y": _packed(np.round(plot.py[kept] * 65535), "<u2"),
        "structure": _packed(np.searchsorted(structures, plot.structure[kept]), "<i4"),
        "row": _packed(np.where(owner < 0, -1, np.searchsorted(rows, owner)), "<i4"),
    }
    if plot.component is not None and len(plot.components) > 1:
        points["component"] = _packed(plot.component[kept], "u1")
    if plot.value is not None:
        value = plot.value[kept]
        points["value"] = _packed(np.where(np.isfinite(value), np.round(63 * np.nan_to_num(value)), 255), "u1")
    axes = {
        name: {"label": axis.label, "low": axis.low, "high": axis.high, "log": axis.log}
        for name, axis in (("x", plot.x), ("y", plot.y))
    }
    dense = len(plot.px) > SPARSE
    return axes | {
        "image": "data:image/png;base64," + base64.b64encode(png(plot.pixels())).decode() if dense else "",
        "points": points,
        "colour": plot.colour,
        "components": list(plot.components),
        "columns": [
            {"label": label, "unit": unit, "values": _packed(v[kept], "<f4")} for label, unit, v in plot.columns
        ],
        "lines": [
            {
                "x": li.x,
                "y": li.y,
                "colour": li.colour,
                "label": li.label,
                "dashed": li.dashed,
                "dots": li.dots,
                "bare": li.bare,
            }
            for li in plot.lines
        ],
        "valueLabel": plot.value_label if plot.value is not None else "",
        "valueRange": list(plot.value_range),
    }
