"""Predicted decode time of layouts on devices, and what bounds it: arithmetic, nothing is run.

``python -m recalkv_vllm.benchmarks.predicted`` prints, as fractions of the dense cache's time, how
long a layer's attention takes if memory, tensor cores, shared memory or the issue of instructions
were all that there is (:mod:`recalkv_vllm.cost`), for every kernel that can decode the layout.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

from recalkv_vllm.band_format import BLOCK_COLUMNS
from recalkv_vllm.cost import GPUS, dense_seconds
from recalkv_vllm.cost.decode import CONTEXT, SEQUENCES
from recalkv_vllm.cost.gpu import gpu_times

from .geometries import GEOMETRIES, SPANS, group_sizes
from .instruction_counts import Case, layer_cost

LATENT_DTYPES = ("bf16", "bands")


def rows(geometry: str, compressions: Sequence[float], device: str) -> Iterator[dict[str, Any]]:
    """One for each layout and kernel; times as fractions of the dense layer's."""
    for compression, size, spans, dtype in product(
        compressions, group_sizes(GEOMETRIES[geometry]), SPANS, LATENT_DTYPES
    ):
        case = Case(geometry, compression, size, spans, dtype)
        if dtype == "bands" and any(r.width % BLOCK_COLUMNS for r in case.latent.regions):
            continue
        layer, gpu = layer_cost(case), GPUS[device]
        dense = dense_seconds(layer, gpu) / (CONTEXT * SEQUENCES)
        for times in gpu_times(layer, gpu):
            parts = ("memory", "tensor", "shared", "issue", "slowest")
            yield {
                **asdict(case),
                "device": device,
                "kernel": times.kernel,
                **{part: getattr(times, part) / dense for part in parts},
            }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--geometry", choices=GEOMETRIES, default="llama-3.1-8b")
    parser.add_argument("--device", nargs="*", choices=GPUS, default=["h100"])
    parser.add_argument("--compression", nargs="*", type=float, default=[0.5])
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args(arguments)
    found = [
        row
        for device in options.device
        for row in rows(options.geometry, options.compression, device)
    ]
    if options.json:
        json.dump({"rows": found}, sys.stdout)
        return 0
    for row in found:
        print(
            f"{row['device']} {row['compression']} s={row['group_size']} {row['spans']:8} "
            f"{row['latent_dtype']:5} {row['kernel']:6} memory {row['memory']:.2f} "
            f"tensor {row['tensor']:.2f} shared {row['shared']:.2f} issue {row['issue']:.2f}: "
            f"{row['slowest']:.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
