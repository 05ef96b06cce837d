"""Scatter plots and still figures: what a plot holds, how matplotlib draws it, and what the page's script needs of it."""

from __future__ import annotations

import base64
import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from gpmlp.core.errors import UserError, chemical_symbol
from gpmlp.report.style import (
    ERROR,
    GRID,
    INK,
    KIND_COLOURS,
    PALE,
    STYLE,
    colour_ramp,
    density_colours,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

THINNED = 3000  # points that can be hovered over, in each plot
BINS = 150  # of the density image, along each axis
COARSE_BINS = 100  # the same where colours are means
SPARSE = 2000  # fewer points than this need no density image
FONTS = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
WIDTH, HEIGHT = 4.9, 3.6  # inches


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
    """A plot of points: a density image of all of them, and the few that a pointer can ask for.

    Attributes:
        name: of its files; title: above it.
        px, py: (k,) fractions of the axes; value: (k,) colour as a fraction, or None for plain points.
        columns: what the pointer shows, (label, unit, values).
        structure, row: (k,) index of the structure and of the atom (-1 for none).
        worst: (k,) the larger, the sooner a point can be pointed at.
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

    def bin_points(self) -> np.ndarray:
        """(bins, bins) number of points, or mean colour fraction where points have colours (NaN = none); rows from below."""
        n = BINS if self.value is None else COARSE_BINS
        i, j = (np.minimum((place * n).astype(int), n - 1) for place in (self.py, self.px))
        finite = np.ones(len(i), dtype=bool) if self.value is None else np.isfinite(self.value)
        flat = (i * n + j)[finite]
        counts = np.bincount(flat, minlength=n * n).astype(float)
        sums = counts if self.value is None else np.bincount(flat, self.value[finite], n * n) / np.maximum(counts, 1)
        return np.where(counts > 0, sums, np.nan).reshape(n, n)

    def pixels(self) -> np.ndarray:
        """(bins, bins, 4) uint8, the bins in colours from the top, transparent where there is nothing."""
        grid = self.bin_points()[::-1]
        if self.value is None:
            grid = np.log1p(grid) / np.log1p(max(np.nanmax(grid), 1.0))
        ramp = colour_ramp(density_colours(self.colour) if self.value is None else ERROR, 64)
        colours = np.array([list(bytes.fromhex(c[1:])) for c in ramp], dtype=np.uint8)
        image = np.zeros((*grid.shape, 4), dtype=np.uint8)
        filled = np.isfinite(grid)
        image[filled, :3] = colours[np.clip(grid[filled] * 63, 0, 63).astype(int)]
        image[filled, 3] = 255
        return image

    def thinned_points(self) -> np.ndarray:
        """Indices of at most THINNED points: the worst, and an even draw from the others."""
        n = len(self.px)
        if n <= THINNED:
            return np.arange(n)
        order = np.argsort(-np.nan_to_num(self.worst, nan=-1.0), kind="stable")
        worst, rest = order[: THINNED // 2], order[THINNED // 2 :]
        drawn = np.random.default_rng(0).choice(rest, THINNED - len(worst), replace=False)
        return np.concatenate([np.sort(drawn), worst[::-1]])


@dataclass(frozen=True, eq=False)
class PointLabels:
    """What the points of plots belong to: structures with their names and groups, and the atoms in them."""

    names: Sequence[str]
    config_type: Sequence[str]
    species: np.ndarray
    atom: np.ndarray


# ---------------------------------------------------------------- still figures


@dataclass(frozen=True)
class Picture:
    """One figure as files, and what it shows in words; `width` is that at which its text has the size of the page's, px."""

    svg: bytes
    png: bytes
    alt: str
    width: float


def draw_picture(
    paint: Callable[..., None], alt: str, *args: Any, height: float = HEIGHT, width: float = WIDTH
) -> Picture:
    """The picture that paint(axes, *args) makes, without touching the state of matplotlib.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "The report draws figures with matplotlib, which is missing: pip install matplotlib."
        ) from error
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # names in scripts that the PNG has no font for; browsers find one for the SVG
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
        canvas = FigureCanvasAgg(figure)
        paint(figure.add_subplot(), *args)
        canvas.draw()
        figure.set_layout_engine("none")  # the places of things stay, and are not sought again
        pixels = np.array(canvas.buffer_rgba())
        return Picture(_svg(figure), encode_png(pixels), alt, 96 * width)


def _svg(figure: Figure) -> bytes:
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    file = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    return file.getvalue().replace(b"'DejaVu Sans'", FONTS.encode())


def encode_png(pixels: np.ndarray) -> bytes:
    """(h, w, 4) uint8 as a PNG file."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    h, w = pixels.shape[:2]
    rows = np.concatenate([np.zeros((h, 1), np.uint8), pixels.reshape(h, -1)], axis=1).tobytes()
    head = struct.pack(">IIBBBBB", w, h, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 5)) + chunk(b"IEND", b"")


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers to write on a logarithmic axis."""
    span = np.log10(high / low)
    steps = (1,) if span > 2.2 else (1, 3) if span > 1 else (1, 2, 3, 5, 7)
    powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.log10(high) + 1)
    every = powers[:: 1 + int(span // 8)]
    return [float(d) for d in (every[:, None] * steps).ravel() if low * 0.999 <= d <= high * 1.001]


def tick_label(value: float) -> str:
    """A number on an axis."""
    return f"{value:g}".replace("-", "−")


def _scale(axes: Axes, x: Axis, y: Axis) -> None:
    """Label axes that run from 0 to 1 with what they stand for."""
    from matplotlib.ticker import MaxNLocator

    for axis, drawn, set_limits in ((x, axes.xaxis, axes.set_xlim), (y, axes.yaxis, axes.set_ylim)):
        if axis.log:
            values = log_ticks(axis.low, axis.high)
        else:
            values = [v for v in MaxNLocator(6).tick_values(axis.low, axis.high) if axis.low <= v <= axis.high]
        drawn.set_ticks(axis.place(np.array(values)), [tick_label(round(v, 10)) for v in values])
        set_limits(0, 1)
        drawn.set_label_text(axis.label)


def paint_scatter(axes: Axes, plot: Scatter) -> None:
    """A Scatter as density (or points, when there are few) with its lines and legend."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    axes.grid(color=GRID, lw=0.7)
    coloured = plot.value is not None
    colours = ListedColormap(colour_ramp(ERROR, 64))
    if len(plot.px) > SPARSE:
        axes.imshow(plot.pixels(), extent=(0, 1, 0, 1), aspect="auto", interpolation="nearest", zorder=1.5)
    else:
        colour = {"c": plot.value, "cmap": colours, "vmin": 0, "vmax": 1} if coloured else {"color": plot.colour}
        axes.scatter(plot.px, plot.py, s=9, alpha=0.7, lw=0, rasterized=len(plot.px) > 500, **colour)
    for line in plot.lines:
        style = "none" if line.bare else "--" if line.dashed else "-"
        marker = "o" if line.dots else ""
        x, y = plot.x.place(np.array(line.x)), plot.y.place(np.array(line.y))
        axes.plot(x, y, ls=style, color=line.colour, lw=1.1, label=line.label, marker=marker, ms=3.5)
    _scale(axes, plot.x, plot.y)
    if axes.figure.bbox.width / axes.figure.dpi > 1.5 * WIDTH:
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.2, ncols=len(plot.lines) or 1)
    elif len(plot.lines) > 1:
        axes.legend(loc="upper left")
    if coloured:
        bar = axes.figure.colorbar(ScalarMappable(Normalize(0, 1), colours), ax=axes, pad=0.02, aspect=30)
        ticks = log_ticks(*plot.value_range)
        places = Axis("", *plot.value_range, True).place(np.array(ticks))
        bar.set_ticks(places.tolist(), labels=[tick_label(d) for d in ticks])
        bar.set_label(plot.value_label)
        bar.outline.set_visible(False)


def paint_reliability(axes: Axes, curves: dict[str, dict]) -> None:
    """Observed against expected coverage."""
    axes.grid(color=GRID, lw=0.7)
    axes.plot([0, 1], [0, 1], color=PALE, lw=1, ls="--", label="calibrated")
    for kind, curve in curves.items():
        label = f"{kind} ({curve['n']:,})"
        axes.plot(curve["expected"], curve["observed"], color=KIND_COLOURS[kind], lw=1.8, label=label)
    axes.text(0.97, 0.05, "below: overconfident", ha="right", color=PALE, fontsize=8)
    axes.text(0.03, 0.60, "above: too cautious", color=PALE, fontsize=8)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="expected coverage", ylabel="observed coverage")
    axes.legend(loc="upper left")


# ---------------------------------------------------------------- for interactive.js


def plot_payload(labels: PointLabels, plots: Sequence[Scatter], whole: str = "whole structure") -> dict[str, Any]:
    """What interactive.js draws; only structures and atoms that can be pointed at are in it.

    Args:
        whole: what a point without an atom is.
    """
    thinned = [plot.thinned_points() for plot in plots]
    structures = _distinct(plot.structure[k] for plot, k in zip(plots, thinned, strict=True))
    rows = _distinct(plot.row[k] for plot, k in zip(plots, thinned, strict=True))
    rows = rows[rows >= 0]
    types, type_of = np.unique(np.array([labels.config_type[i] for i in structures], dtype=str), return_inverse=True)
    return {
        "structures": {
            "name": [labels.names[i] for i in structures],
            "type": type_of.tolist(),
            "types": types.tolist(),
            "whole": whole,
        },
        "atoms": {
            "element": [chemical_symbol(int(z)) for z in np.asarray(labels.species)[rows]],
            "index": np.asarray(labels.atom)[rows].tolist(),
        },
        "errorColours": list(colour_ramp(ERROR, 64)),
        "plots": {plot.name: _packed_plot(plot, k, structures, rows) for plot, k in zip(plots, thinned, strict=True)},
    }


def _distinct(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate([np.zeros(0, dtype=int), *parts])).astype(int)


def _packed(values: np.ndarray, kind: str) -> str:
    """Base64 of a little-endian array."""
    return base64.b64encode(np.ascontiguousarray(values).astype(kind).tobytes()).decode()


def _packed_plot(plot: Scatter, thinned: np.ndarray, structures: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
    owner = plot.row[thinned]
    points: dict[str, Any] = {
        "n": len(thinned),
        "x": _packed(np.round(plot.px[thinned] * 65535), "<u2"),
        "y": _packed(np.round(plot.py[thinned] * 65535), "<u2"),
        "structure": _packed(np.searchsorted(structures, plot.structure[thinned]), "<i4"),
        "row": _packed(np.where(owner < 0, -1, np.searchsorted(rows, owner)), "<i4"),
    }
    if plot.component is not None and len(plot.components) > 1:
        points["component"] = _packed(plot.component[thinned], "u1")
    if plot.value is not None:
        value = plot.value[thinned]
        points["value"] = _packed(np.where(np.isfinite(value), np.round(63 * np.nan_to_num(value)), 255), "u1")
    dense = len(plot.px) > SPARSE
    return {
        "x": asdict(plot.x),
        "y": asdict(plot.y),
        "image": "data:image/png;base64," + base64.b64encode(encode_png(plot.pixels())).decode() if dense else "",
        "points": points,
        "colour": plot.colour,
        "components": list(plot.components),
        "columns": [
            {"label": name, "unit": unit, "values": _packed(v[thinned], "<f4")} for name, unit, v in plot.columns
        ],
        "lines": [asdict(line) for line in plot.lines],
        "valueLabel": plot.value_label if plot.value is not None else "",
        "valueRange": list(plot.value_range),
    }
