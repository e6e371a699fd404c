"""From a checkpoint's directory to a page of HTML that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from recalkv_vllm.checkpoint import FACTORS_FILE, FactorReader
from recalkv_vllm.compression.output.reader import check_factors
from recalkv_vllm.compression.output.summary import summarize
from recalkv_vllm.evaluation.report import card_results
from recalkv_vllm.report.layer_map import layer_rows
from recalkv_vllm.report.results import Result
from recalkv_vllm.report.spectra import SHARES, layer_spectra

TEMPLATE = "report.html"
#: Relative errors on the page's axis: from here to 1, by powers of ten.
LEAST_ERROR = 1e-4


def render(directory: Path, results: Sequence[Result] = ()) -> str:
    """The page.

    Args:
        directory: of the checkpoint.
        results: to show beside it.

    Raises:
        CheckpointError: naming file, field or tensor, expected and found.
    """
    recalkv, geometry, itemsize = check_factors(directory)
    with FactorReader(directory / FACTORS_FILE, recalkv, geometry) as reader:
        spectra = layer_spectra(reader, recalkv, geometry)
    rows = layer_rows(recalkv, geometry, itemsize)
    parts = [part for row in rows for part in row.stored]
    environment = Environment(
        loader=PackageLoader("recalkv_vllm.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"words": _words, "along": _along, "share": _share}
    summary = summarize(recalkv, geometry, itemsize)
    return environment.get_template(TEMPLATE).render(
        name=directory.resolve().name,
        summary=summary,
        geometry=geometry,
        recalkv=recalkv,
        settings={k: v for k, v in recalkv.settings.items() if k not in ("relative_error",)},
        rows=rows,
        widest=max(row.stored_bytes for row in rows),
        bits=sorted({part.bits for part in parts}, reverse=True),
        mean_bits=sum(p.bits * p.columns for p in parts) / sum(p.columns for p in parts),
        spectra=spectra,
        most_directions=max(s.directions for both in spectra for s in both),
        shares=SHARES,
        decades=[10.0**n for n in range(round(math.log10(LEAST_ERROR)), 1)],
        loss=_losses(recalkv.settings),
        card=card_results(directory),
        results=results,
    )


def _losses(settings: dict[str, Any]) -> list[tuple[str, float, str]]:
    """What the checkpoint records of loss: name, nats per token, and what it means."""
    recorded = settings.get("healing")
    healing = recorded if isinstance(recorded, dict) else {}  # settings may hold anything
    known = [
        ("expected", settings.get("expected_loss"), "by the Kronecker metric, before any healing"),
        ("measured", settings.get("loss"), "on held-out calibration text, above the dense model"),
        ("before healing", healing.get("loss_before"), "divergence from the dense model"),
        ("after healing", healing.get("loss_after"), "divergence from the dense model"),
    ]
    return [(name, value, what) for name, value, what in known if isinstance(value, float)]


def _words(value: Any) -> str:
    """Any of JSON's values, for people."""
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_words(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _along(error: float) -> str:
    """Where a relative error lies on its axis, in percent."""
    decades = math.log10(min(max(error, LEAST_ERROR), 1.0) / LEAST_ERROR)
    return f"{100 * decades / -math.log10(LEAST_ERROR):.2f}"


def _share(part: float, whole: float) -> str:
    """A part of a whole, in percent."""
    return f"{100 * part / whole:.2f}"
