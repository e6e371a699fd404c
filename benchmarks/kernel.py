"""Attention over latents against the stock kernel of the same machine, measured alternately.

``recalkv bench kernel`` runs it. Ratios are ours / stock, of medians.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from types import ModuleType
from typing import Any

import torch

from recalkv_vllm.band_format import CacheFormat
from recalkv_vllm.compression.errors import InputError

from . import kernel_cpu, kernel_gpu
from .geometries import GEOMETRIES, Geometry, Latent, latent_of
from .kernel_plot import plot
from .latent_formats import format_of, misfit
from .roofline import Roof, alternate, attention_work, measure_roof

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all combinations that fit; the JSON object.

    Raises:
        InputError: an unknown geometry, nothing to measure, or no stock kernel.
    """
    dtype = DTYPES[options.dtype]
    device = _device(options.device)
    roof = measure_roof(device, dtype)
    rows = []
    for geometry, compression, group_size, spans, latent_dtype, context, batch in itertools.product(
        _geometries(options.geometry),
        options.compression,
        options.group_size,
        options.spans,
        options.latent_dtype,
        options.context,
        options.batch,
    ):
        what = (
            f"{geometry.name} {compression:.0%} s={group_size} {spans} {latent_dtype} "
            f"{context}x{batch}"
        )
        reason = _skip_reason(geometry, compression, group_size, context, batch, device, options)
        if reason is None:
            latent = latent_of(geometry, compression, group_size, spans)
            reason = misfit(latent, latent_dtype)
        if reason is not None:
            print(f"recalkv: {what}: skipped: {reason}", file=sys.stderr)
            continue
        print(f"recalkv: {what}", file=sys.stderr)
        latent_format = format_of(latent, latent_dtype)
        rows.append(
            {
                "geometry": geometry.name,
                "compression": compression,
                "group_size": group_size,
                "spans": spans,
                "latent_dtype": latent_dtype,
                "context": context,
                "batch": batch,
                **_measure(geometry, latent, latent_format, context, batch, device, roof, options),
            }
        )
    if not rows:
        raise InputError("bench kernel: nothing to measure; every combination was skipped")
    result = {
        "rows": rows,
        "roof": {"gb_per_s": roof.bytes_per_s / 1e9, "tflop_per_s": roof.flop_per_s / 1e12},
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{torch.get_num_threads()} threads",
        "dtype": options.dtype,
    }
    if options.plot is not None:
        plot(result, options.plot)
    return result


def _device(name: str) -> torch.device:
    gpu = torch.cuda.is_available()
    if name == "cuda" and not gpu:
        raise InputError("--device cuda: torch finds no CUDA device")
    return torch.device("cuda" if gpu and name != "cpu" else "cpu")


def _platform(device: torch.device) -> ModuleType:
    return kernel_gpu if device.type == "cuda" else kernel_cpu


def _geometries(names: list[str]) -> list[Geometry]:
    if names == ["all"]:
        return list(GEOMETRIES.values())
    for name in names:
        if name not in GEOMETRIES:
            raise InputError(
                f"--geometry: expected all or some of {', '.join(GEOMETRIES)}, found {name!r}"
            )
    return [GEOMETRIES[name] for name in names]


def _skip_reason(
    geometry: Geometry,
    compression: float,
    group_size: int,
    context: int,
    batch: int,
    device: torch.device,
    options: argparse.Namespace,
) -> str | None:
    if not 0 <= compression < 1:
        raise InputError(f"--compression: expected a number in [0, 1), found {compression}")
    for name, value in (("--group-size", group_size), ("--context", context), ("--batch", batch)):
        if value < 1:
            raise InputError(f"{name}: expected a positive number, found {value}")
    if not 1 <= options.queries <= context:
        raise InputError(f"--queries: expected 1 to the context, found {options.queries}")
    heads = geometry.num_kv_heads
    if heads % group_size:
        return f"{heads} KV heads do not divide into groups of {group_size}"
    size = geometry.cache_bytes(context, batch, DTYPES[options.dtype])
    if size > _platform(device).LARGEST_CACHE_BYTES:
        return f"one layer's uncompressed cache takes {size / 2**30:.0f} GiB"
    return None


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
    (value_up,) = alternate([runs.value_up], 0.1, runs.calls)
    if latent_format is None:
        latent_bytes = latent.rank * dtype.itemsize
    else:
        latent_bytes = latent_format.slot_bytes(latent.rank)
    work = attention_work(geometry, latent, context, batch, options.queries, latent_bytes)
    row = {
        "kernel": runs.kernel,
        "queries": options.queries,
        "rank": latent.rank,
        "ours_us": ours.median * 1e6,
        "ours_quartiles_us": [ours.low * 1e6, ours.high * 1e6],
        "stock": best,
        "stock_us": stock.median * 1e6,
        "stock_quartiles_us": [stock.low * 1e6, stock.high * 1e6],
        "all_stock_us": {name: timing.median * 1e6 for name, timing in stocks.items()},
        "ratio": ours.median / stock.median,
        "value_up_us": value_up.median * 1e6,
        "gb_per_s": work.bytes / ours.median / 1e9,
        "tflop_per_s": work.flop / ours.median / 1e12,
        "flop_per_byte": work.flop / work.bytes,
        "roof_fraction": roof.seconds(work) / ours.median,
    }
    if options.reference:
        (slow,) = alternate([runs.reference], 0, runs.calls, least=3)
        row["reference_us"] = slow.median * 1e6
    return row


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
    ("value_up_us", "{:.0f}"),
    ("gb_per_s", "{:.1f}"),
    ("tflop_per_s", "{:.3f}"),
    ("roof_fraction", "{:.2f}"),
    ("reference_us", "{:.0f}"),
)


def show(result: dict[str, Any]) -> None:
    """Print the result for people."""
    columns = [column for column in COLUMNS if column[0] in result["rows"][0]]
    table = [[name for name, _ in columns]]
    table += [[form.format(row[name]) for name, form in columns] for row in result["rows"]]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    roof = result["roof"]
    print(
        f"{result['rows'][0]['kernel']}, {result['dtype']}, {result['device']}; roofs: "
        f"{roof['gb_per_s']:.1f} GB/s, {roof['tflop_per_s']:.3f} TFLOP/s"
    )
