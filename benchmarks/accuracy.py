"""One table of accuracy: methods, compressions and latent formats on one model and one text.

``python -m recalkv_vllm.benchmarks.accuracy MODEL --calibrate TEXT --evaluate TEXT -o OUT`` runs
``recalkv compress`` and ``recalkv eval`` for every row, and writes ``OUT/result.json``,
``OUT/table.md`` and ``OUT/pareto.png``. Rows that ``OUT`` has already are not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console


@dataclass(frozen=True, slots=True)
class Row:
    """What to compress: options of ``recalkv compress``."""

    method: str
    compression: float
    latent_dtype: str = "bf16"
    k_group_size: int | None = None
    heal: bool = False

    @property
    def name(self) -> str:
        size = "" if self.k_group_size is None else f"-s{self.k_group_size}"
        healed = "-healed" if self.heal else ""
        return f"{self.method}{size}-{self.latent_dtype}-{self.compression}{healed}"

    def arguments(self) -> list[str]:
        options = ["--method", self.method, "--compression", str(self.compression)]
        # Accuracy alone, and not the device at hand: rows must mean the same everywhere.
        options += ["--latent-dtype", self.latent_dtype, "--target", "none"]
        if self.k_group_size is not None:
            options += ["--k-group-size", str(self.k_group_size)]
        return [*options, "--heal"] if self.heal else options


COMPRESSIONS = (0.5, 0.6, 0.7, 0.8)
ROWS = (
    *(Row("kfac", c) for c in COMPRESSIONS),
    *(Row("kfac", c, "bands") for c in (0.5, 0.75, 0.79, 0.86, 0.9125, 0.94)),
    *(Row("kfac", c, k_group_size=1) for c in (0.5, 0.7)),
    *(Row("kfac", c, "bands", k_group_size=1) for c in (0.75, 0.86)),
    *(Row("recalkv", c) for c in COMPRESSIONS),
    *(Row("palu", c) for c in COMPRESSIONS),
    # A cache of full rank that is only quantized, as others offer.
    *(Row("svd", 0.0, dtype) for dtype in ("int8", "int4", "int3")),
)


#: Lines that lie on one another stay visible.
STYLES = ("o-", "s-", "^-", "v-", "o-", "x--", "D-")


def run(*arguments: object) -> dict[str, Any]:
    """``recalkv ARGUMENTS --json``; its object. Its progress goes to stderr.

    Raises:
        subprocess.CalledProcessError: it failed; it has said why.
    """
    recalkv = Path(sys.executable).with_name("recalkv")
    command = [recalkv, *map(str, arguments), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def make(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """The checkpoint of a row, ``OUT/NAME``, made if it is not there; what is known about it."""
    out = options.out / row.name
    if out.exists():
        return run("inspect", out)
    text = ("--dataset", options.calibrate, "--num-samples", options.num_samples)
    return run(
        *("compress", options.model, "-o", out, *row.arguments()),
        *(*text, "--seq-len", options.calibrate_len),
    )


def measure(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """Compress and evaluate one row."""
    made = make(row, options)
    return {**asdict(row), **evaluate(options.out / row.name, options), **made}


def evaluate(model: Path, options: argparse.Namespace, *engine: str) -> dict[str, Any]:
    """Perplexity of a model on the evaluation text; ``engine``: options, if not the default."""
    text = ("--dataset", options.evaluate, "--max-tokens", options.max_tokens)
    return run("eval", model, *text, "--seq-len", options.evaluate_len, *engine)


def table(result: dict[str, Any]) -> str:
    """Markdown, rows of one method by compression."""
    lines = [
        "| method | KV heads per group | latents | removed | bytes per token "
        "| reconstruction, FLOP per token | perplexity | loss, nats |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        form = row["latent_quantization"]
        latents = form["dtype"] if form else "16 bits"
        size = row["kv_bytes_per_token"]["compressed"]
        lines.append(
            f"| {row['method']} | {row['k_group_size'] or 'auto'} | {latents} "
            f"| {row['compression']:.1%} | {size:,} | {row['reconstruct_flop_per_token']:,} "
            f"| {row['perplexity']:.3f} | {row['nll'] - result['dense']['nll']:+.4f} |"
        )
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Bytes per token against loss, a line per way to compress."""
    from matplotlib.figure import Figure

    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in result["rows"]:
        label = "full rank, quantized" if row["method"] == "svd" else row["method"]
        if row["k_group_size"] is not None:
            label += f", groups of {row['k_group_size']}"
        if row["latent_dtype"] == "bands":
            label += ", bands"
        loss = row["nll"] - result["dense"]["nll"]
        lines[label].append((row["kv_bytes_per_token"]["compressed"], loss))
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    for (label, points), style in zip(lines.items(), itertools.cycle(STYLES)):
        axes.plot(*zip(*sorted(points), strict=True), style, label=label)
    dense = result["rows"][0]["kv_bytes_per_token"]["dense"]
    axes.set_yscale("symlog", linthresh=0.01)  # what loses nothing may seem to gain a little
    axes.set_xscale("log")
    for ticks in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        ticks("{x:,.0f}")
    axes.tick_params(axis="x", which="both", rotation=45)
    axes.set(
        xlabel=f"KV-cache bytes per token (dense: {dense:,})",
        ylabel="loss against the dense model, nats per token",
    )
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    """Command line of the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("model", type=Path, help="base model")
    add("--calibrate", required=True, help="text to calibrate on")
    add("--evaluate", required=True, help="text to evaluate on; nothing is fitted to it")
    add("-o", "--out", type=Path, required=True, help="for checkpoints and results")
    add("--num-samples", type=int, default=64)
    add("--calibrate-len", type=int, default=512, help="tokens of a calibration sample")
    add("--evaluate-len", type=int, default=1024, help="tokens of an evaluation window")
    add("--max-tokens", type=int, default=12 * 1024, help="of the evaluation text")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "result.json"
    result = json.loads(path.read_text()) if path.exists() else {"rows": []}
    try:
        if "dense" not in result:
            result["dense"] = evaluate(options.model, options)
        known = {row["name"] for row in result["rows"]}
        for row in ROWS:
            if row.name not in known:
                print(f"accuracy: {row.name}", file=sys.stderr)
                result["rows"].append({"name": row.name, **measure(row, options)})
                path.write_text(json.dumps(result, indent=1))
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    order = [row.name for row in ROWS]
    result["rows"].sort(key=lambda row: order.index(row["name"]))
    (options.out / "table.md").write_text(table(result))
    plot(result, options.out / "pareto.png")
    Console().print(table(result), markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
