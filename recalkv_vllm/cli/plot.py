"""The plot that ``recalkv inspect --plot`` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recalkv_vllm.compression.output.figure import new_figure, write_figure


def plot_layers(summary: dict[str, Any], path: Path) -> None:
    """Plot cached elements per token and relative errors by layer.

    Args:
        summary: as :func:`recalkv_vllm.compression.output.summary.summarize` gives it.
        path: of the plot; its suffix chooses the format.

    Raises:
        InputError: matplotlib is not installed, or the file cannot be written.
    """
    layers = summary["layers"]
    index = [layer["layer"] for layer in layers]
    figure = new_figure(figsize=(9, 6))
    ranks, errors = figure.subplots(2, 1, sharex=True)
    # Spans may overlap: keys and values together read the whole rank.
    keys, values = ([_covered(layer[name]) for layer in layers] for name in ("k_spans", "v_spans"))
    ranks.step(index, [layer["rank"] for layer in layers], "k-", where="mid", label="rank")
    ranks.plot(index, keys, "o", label="read by keys")
    ranks.plot(index, values, "s", label="read by values")
    ranks.set_ylabel("elements per token")
    ranks.set_ylim(bottom=0)
    # Below the axes, where it covers no curve.
    ranks.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=3)
    if summary["error_of"] is not None:
        errors.plot(index, [layer["k_error"] for layer in layers], "o-", label="keys")
        errors.plot(index, [layer["v_error"] for layer in layers], "s-", label="values")
        errors.legend()
    errors.set_ylabel(f"relative error of {summary['error_of']}")
    errors.set_xlabel("layer")
    figure.suptitle(f"{summary['method']}, {summary['compression']:.1%} of the KV cache removed")
    write_figure(figure, path)


def _covered(spans: list[list[int]]) -> int:
    """Columns in at least one span."""
    return len({n for start, end in spans for n in range(start, end)})
