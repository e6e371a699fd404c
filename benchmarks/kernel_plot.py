"""The picture of ``recalkv bench kernel --plot``: ratio against context, and the roofline.

``python -m recalkv_vllm.benchmarks.kernel_plot ROWS.jsonl FILE.png`` draws it from rows on disk.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from recalkv_vllm.compression.output.figure import new_figure, write_figure

from .kernel_rows import read_rows


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw a benchmark's result.

    Raises:
        InputError: matplotlib is not installed, or the file cannot be written.
    """
    lines: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in result["rows"]:
        name = (
            f"{row['geometry']} {row['compression']:.0%} s={row['group_size']} {row['spans']} "
            f"{row['latent_dtype']} x{row['batch']}"
        )
        lines[name].append(row)
    figure = new_figure(figsize=(12, 5))
    ratios, roofs = figure.subplots(1, 2)
    for name, rows in lines.items():
        ratios.plot([r["context"] for r in rows], [r["ratio"] for r in rows], "o-", label=name)
        roofs.plot([r["flop_per_byte"] for r in rows], [r["tflop_per_s"] for r in rows], "o")
    ratios.axhline(1, color="black", linewidth=0.8)
    ratios.set(xscale="log", xlabel="context, tokens", ylabel="time, ours / stock", ylim=(0, None))
    ratios.legend(fontsize="x-small")
    roof = result["roof"]
    ridge = roof["tflop_per_s"] * 1e3 / roof["gb_per_s"]
    points = [ridge / 16, ridge, ridge * 16]
    roofs.plot(points, [min(roof["tflop_per_s"], x * roof["gb_per_s"] / 1e3) for x in points], "k-")
    roofs.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s")
    write_figure(figure, path)


def main() -> int:
    """Draw rows on disk, without those that failed."""
    rows = [row for row in read_rows(Path(sys.argv[1])) if "error" not in row]
    if not rows:
        print(f"{sys.argv[1]}: no rows", file=sys.stderr)
        return 1
    roof = {name: rows[0][f"roof_{name}"] for name in ("gb_per_s", "tflop_per_s")}
    plot({"rows": rows, "roof": roof}, Path(sys.argv[2]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
