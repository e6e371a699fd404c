"""Attention over latents against the stock kernel of the same machine, measured alternately.

``recalkv bench kernel`` runs it. ``ratio`` is ours / stock, of medians. Ours counts the value
up-projection, whose result is what stock's attention gives.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
from types import ModuleType
from typing import Any

import torch

from recalkv_vllm.band_format import CacheFormat, token_bytes
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.progress import track

from . import kernel_cpu, kernel_gpu
from .geometries import Geometry, Latent, latent_of
from .kernel_options import DTYPES, geometries, skip_reason
from .kernel_plot import plot
from .kernel_rows import RowFile
from .latent_formats import format_of, misfit
from .roofline import Roof, alternate, attention_work, measure_roof

log = logging.getLogger(__name__)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all combinations that fit; the JSON object.

    Raises:
        InputError: an unknown geometry, nothing to measure, or no stock kernel.
    """
    dtype = DTYPES[options.dtype]
    device = _device(options.device)
    roof = measure_roof(device, dtype)
    device_name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{torch.get_num_threads()} threads"
    )
    rows, kept = [], RowFile(options.rows)
    largest = _platform(device).largest_cache_bytes()
    combinations = list(
        itertools.product(
            geometries(options.geometry),
            options.compression,
            options.group_size,
            options.spans,
            options.latent_dtype,
            options.context,
            options.batch,
        )
    )
    tracked = track(combinations, "measuring", total=len(combinations), bar=False)
    for geometry, compression, group_size, spans, latent_dtype, context, batch in tracked:
        what = (
            f"{geometry.name} {compression:.0%} s={group_size} {spans} {latent_dtype} "
            f"{context}x{batch}"
        )
        reason = skip_reason(geometry, compression, group_size, context, batch, options, largest)
        if reason is None:
            latent = latent_of(geometry, compression, group_size, spans)
            reason = misfit(latent, latent_dtype)
        if reason is not None:
            log.warning("%s: skipped: %s", what, reason)
            continue
        settings = {
            "geometry": geometry.name,
            "compression": compression,
            "group_size": group_size,
            "spans": spans,
            "latent_dtype": latent_dtype,
            "context": context,
            "batch": batch,
            "queries": options.queries,
            "dtype": options.dtype,
            "device": device_name,
            "forced": os.environ.get("RECALKV_KERNEL"),
        }
        row = kept.find(settings)
        if row is None:
            log.info(what)
            try:
                measured = _measure(
                    geometry,
                    latent,
                    format_of(latent, latent_dtype),
                    context,
                    batch,
                    device,
                    roof,
                    options,
                )
            except InputError:
                raise
            # Memory that does not suffice, a kernel that does not compile: the rest goes on.
            except Exception as error:
                measured = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
                log.warning("%s: failed: %s", what, measured["error"])
            row = {"what": what, **settings, **_roof_of(roof), **measured}
            kept.add(row)
            _platform(device).clean_up()  # raises if the device is lost
        rows.append(row)
    failed = [row for row in rows if "error" in row]
    rows = [row for row in rows if "error" not in row]
    if not rows:
        raise InputError(
            "bench kernel: nothing was measured; every combination was skipped or failed"
        )
    result = {
        "rows": rows,
        "failed": failed,
        "roof": {"gb_per_s": roof.bytes_per_s / 1e9, "tflop_per_s": roof.flop_per_s / 1e12},
        "device": device_name,
        "dtype": options.dtype,
    }
    if options.plot is not None:
        plot(result, options.plot)
    return result


def _roof_of(roof: Roof) -> dict[str, float]:
    return {"roof_gb_per_s": roof.bytes_per_s / 1e9, "roof_tflop_per_s": roof.flop_per_s / 1e12}


def _device(name: str) -> torch.device:
    gpu = torch.cuda.is_available()
    if name == "cuda" and not gpu:
        raise InputError("--device cuda: torch finds no CUDA device")
    return torch.device("cuda" if gpu and name != "cpu" else "cpu")


def _platform(device: torch.device) -> ModuleType:
    return kernel_gpu if device.type == "cuda" else kernel_cpu


def _measure(
    geometry: Geometry,
    latent: Latent,
    latent_format: CacheFormat | None,
    context: int,
    batch: int,
    device: torch.device,
    roof: Roof,
    options: argparse.Namespace,
) -> dict[str, Any]:
    dtype = DTYPES[options.dtype]
    runs = _platform(device).build(
        geometry, latent, latent_format, context, batch, options.queries, dtype
    )
    ours, *baselines = alternate([runs.ours, *runs.stock.values()], options.seconds, runs.calls)
    stocks = dict(zip(runs.stock, baselines, strict=True))
    best = min(stocks, key=lambda name: stocks[name].median)
    stock = stocks[best]
    key_scales = geometry.num_kv_heads if geometry.key_norm else 0
    nbytes = token_bytes(latent_format, latent.rank, dtype.itemsize, key_scales)
    work = attention_work(geometry, latent, context, batch, options.queries, nbytes)
    row = {
        "kernel": runs.kernel,
        "rank": latent.rank,
        "ours_us": ours.median * 1e6,
        "ours_quartiles_us": [ours.low * 1e6, ours.high * 1e6],
        "stock": best,
        "stock_us": stock.median * 1e6,
        "stock_quartiles_us": [stock.low * 1e6, stock.high * 1e6],
        "all_stock_us": {name: timing.median * 1e6 for name, timing in stocks.items()},
        "ratio": ours.median / stock.median,
        "gb_per_s": work.bytes / ours.median / 1e9,
        "tflop_per_s": work.flop / ours.median / 1e12,
        "flop_per_byte": work.flop / work.bytes,
        "roof_fraction": roof.seconds(work) / ours.median,
    }
    if options.reference:
        (slow,) = alternate([runs.reference], 0, runs.calls, least=3)
        row["reference_us"] = slow.median * 1e6
    return row
