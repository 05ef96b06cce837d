"""Write docs/speed.md: every table of a run of tests/benchmarks/speed.py, from its JSON.

    python tests/benchmarks/speed.py --work FOLDER --json FOLDER/speed.json [with peers: see there]
    python tests/benchmarks/speed.py --work FOLDER --parts scaling --sizes 2 3 5 8 12 23 --json FOLDER/sizes.json
    python docs/make_speed_tables.py FOLDER/speed.json [--sizes FOLDER/sizes.json] [--output docs/speed.md]

Parts that are not in the JSON are left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

HEAD = """# Speed, measured

Written by `docs/make_speed_tables.py` from the output of `tests/benchmarks/speed.py`; [performance](performance.md) explains what is
counted, the targets and the conclusions. Microseconds per atom, least and median of calls, one thread pinned to one core unless stated
otherwise. Codes that are compared took turns: ratios are medians of neighbouring bursts, with quartiles.
Machine: {platform}, PyTorch {torch}.
"""


def number(x: float) -> str:
    """Three digits."""
    return f"{x:.3g}" if x < 1000 else f"{x:.0f}"


def small(x: float | None) -> str:
    """Two digits, with an exponent where there are many zeros."""
    return "" if x is None else f"{x:.1e}" if x < 1e-3 else f"{x:.2g}"


def ratio(found: Sequence[float] | None) -> str:
    """Median (quartiles) of ratios given as quartile, median, quartile."""
    if found is None:
        return ""
    low, middle, high = (f"{x:.0f}" if x >= 10 else f"{x:.2f}" for x in found)
    return "1" if low == middle == high == "1.00" else f"{middle} ({low}–{high})"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def turns(of: dict, beside: Sequence[str]) -> str:
    """Contestants that took turns, each with how many times those of `beside` it takes."""
    rows = [
        [name, number(one["least"]), number(one["median"]), *(ratio(one["ratios"].get(other)) for other in beside)]
        for name, one in of.items()
    ]
    return table(["", "least", "median", *(f"times {other}" for other in beside)], rows)


def peers(result: dict) -> str:
    return turns(result["of"], [name for name in result["of"] if name.startswith("zeta")])


def known(result: dict) -> str:
    return f"Weights of ace-jax are drawn: what it costs, not how good it is.\n\n{peers(result)}"


def molecules(result: dict) -> str:
    floors = []
    for name, found in result["floors"].items():
        for stage in found["stages"]:
            floors.append(
                [name, stage["stage"], number(stage["floor"]), number(stage["least"]), number(stage["median"])]
            )
    stages = table(["", "stage", "floor", "least", "median"], floors)
    ours = [name for name in result["of"] if name.startswith("zeta")]
    return f"{result['name']}, {result['atoms']} atoms.\n\n{turns(result['of'], ours)}\n\n{stages}"


def descriptors(result: dict) -> str:
    return "Neighbour search included.\n\n" + turns(result["of"], ["values", "and pulled back"])


def stages(result: dict) -> str:
    out = []
    for name, found in result.items():
        rates = found["machine"]
        rows = [
            [s["stage"], number(s["kflop"]) if "kflop" in s else "", number(s["kB"]) if "kB" in s else "",
             number(s["floor"]), number(s["least"]), number(s["median"]), f"{s['least'] / s['floor']:.1f}"]
            for s in found["stages"]
        ]  # fmt: skip
        out.append(f"{name}; products {rates['gemm']:.0f} Gflop/s, memory {rates['memory']:.0f} GB/s beside it:\n")
        out.append(table(["stage", "kflop", "kB", "floor", "least", "median", "floors"], rows) + "\n")
    return "\n".join(out).strip()


def scaling(result: dict) -> str:
    first = next(iter(result.values()))
    rows = []
    for name, found in result.items():
        rows.append([name, *map(number, found["least"]), f"{found['slope']:.3f}"])
        rows.append(["– peak memory of the process so far, MB", *(f"{mb:.0f}" for mb in found["peak MB"]), ""])
    return table(["atoms", *map(str, first["atoms"]), "slope of log time against log atoms"], rows)


def pair(times: Sequence[float]) -> str:
    return ", ".join(map(number, times))


def threads(result: dict) -> str:
    rows = [
        [c["case"], pair(c["us"]["1"]), pair(c["us"]["2"]), f"{c['least']:.2f}", ratio(c["ratio"])]
        for c in result["calls"]
    ]
    rows += [
        [f"{name}: two processes of one thread beside one", "", "", "", ratio(r)]
        for name, r in result.get("ceiling", {}).items()
    ]
    header = ["", "one thread: least, median", "two: least, median", "least / least", "faster, in turn"]
    return f"{result['cores']} cores.\n\n" + table(header, rows)


def md(result: dict) -> str:
    rows = [
        [f"zeta {of['zeta']}{', std' if of['std'] else ''}, {of['atoms']} atoms", str(of["steps"]),
         number(of["steps per s"]), number(of["us"]), str(of["searches"])]
        for of in result["of"]
    ]  # fmt: skip
    return "ASE's velocity Verlet.\n\n" + table(["", "steps", "steps per second", "µs per atom", "searches"], rows)


def variance(result: dict) -> str:
    errors = [
        [e["model"], e["of"], small(e["largest"]), small(e["99 %"]), small(e["median"])] for e in result["errors"]
    ]
    return "Relative differences from triangular solves in double precision.\n\n" + table(
        ["model", "environments", "largest", "99 %", "median"], errors
    )


def ways(result: dict) -> str:
    """One way to predict beside the usual one."""
    if not result["of"]:
        return "No model has it."
    usual, other = next(iter(result["of"].values()))["us"]
    rows = [
        [name, *map(pair, f["us"].values()), f"{f['least']:.2f}", ratio(f["ratio"])] for name, f in result["of"].items()
    ]
    header = ["", f"{usual}: least, median", f"{other}: least, median", "least / least", "in turn"]
    return f"Pairs known; {other} over {usual}.\n\n" + table(header, rows)


def start(result: dict) -> str:
    rows = [[name, *(f"{seconds:.3f}" for seconds in times)] for name, times in result["of"].items()]
    return f"Seconds; ζ {result['zeta']}, {result['atoms']} atoms.\n\n" + table(["", "least", "median"], rows)


def precision(result: dict) -> str:
    keys = [
        "force rms, meV/A", "force max, meV/A", "energy max, meV/atom", "local std, relative", "force std, relative"
    ]  # fmt: skip
    rows = [[f"zeta {of['zeta']}, {of['way']}", *(small(of.get(key)) for key in keys)] for of in result["of"]]
    return "Differences from double precision throughout.\n\n" + table(["", *keys], rows)


PARTS: dict[str, tuple[str, Callable[[dict], str]]] = {
    "peers": ("Beside others: silicon, energy and forces", peers),
    "known": ("Beside others: silicon, energy and forces, pairs known", known),
    "molecules": ("Three species of molecules", molecules),
    "descriptors": ("Descriptors alone: silicon", descriptors),
    "stages": ("Stages over floors: silicon", stages),
    "scaling": ("Sizes and memory: silicon", scaling),
    "threads": ("Two cores", threads),
    "ase": ("Two cores: ASE's calculator", threads),
    "md": ("Dynamics", md),
    "start": ("A new process", start),
    "low_rank": ("The exact mean beside that of low rank", ways),
    "sigma": ("Standard deviations of local energies", ways),
    "reduced": ("Standard deviations of local energies from fewer columns", ways),
    "variance": ("Standard deviations of local energies: errors of the fast path", variance),
    "float32": ("Single precision", ways),
    "precision": ("Single precision: errors", precision),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="of tests/benchmarks/speed.py")
    parser.add_argument("--sizes", type=Path, help="JSON of a run of the part scaling alone")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("speed.md"))
    options = parser.parse_args()
    record = json.loads(options.json.read_text())
    if options.sizes is not None:
        record["scaling"] = json.loads(options.sizes.read_text())["scaling"]
    some = next(iter(record.values()))
    out = [HEAD.format(platform=some["platform"], torch=some["torch"])]
    for part, (title, write) in PARTS.items():
        if part in record:
            out.append(f"## {title}\n`--parts {part}`, {record[part]['begun']}.\n\n{write(record[part]['result'])}\n")
    options.output.write_text("\n".join(out), encoding="utf-8")


if __name__ == "__main__":
    main()
