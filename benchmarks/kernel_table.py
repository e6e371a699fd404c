"""The table that ``recalkv bench kernel`` prints."""

from __future__ import annotations

from typing import Any

COLUMNS = (
    ("geometry", "{}"),
    ("compression", "{:.0%}"),
    ("group_size", "{}"),
    ("spans", "{}"),
    ("latent_dtype", "{}"),
    ("context", "{}"),
    ("batch", "{}"),
    ("ours_us", "{:.0f}"),
    ("stock_us", "{:.0f}"),
    ("stock", "{}"),
    ("ratio", "{:.2f}"),
    ("gb_per_s", "{:.1f}"),
    ("tflop_per_s", "{:.3f}"),
    ("roof_fraction", "{:.2f}"),
    ("reference_us", "{:.0f}"),
)


def show(result: dict[str, Any]) -> None:
    """Print the result for people."""
    rows = result["rows"]
    columns = [column for column in COLUMNS if column[0] in rows[0]]
    table = [[name for name, _ in columns]]
    table += [[form.format(row[name]) for name, form in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    roof = result["roof"]
    print(
        f"{rows[0]['kernel']}, {result['dtype']}, {result['device']}; roofs: "
        f"{roof['gb_per_s']:.1f} GB/s, {roof['tflop_per_s']:.3f} TFLOP/s"
    )
    for row in result["failed"]:
        print(f"failed: {row['what']}: {row['error']}")
