"""One layer through every kernel that this machine can run, against the reference: a minute.

``python -m recalkv_vllm.benchmarks.smoke`` prints a line per kernel and latent format, and exits
with 1 if one fails. What it shows is that kernels compile, launch and agree; tests show the rest.
Where one does not agree, it says for which sequences, and whether value latents and log-sum-exps,
which come before heads, do.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from importlib import import_module

import torch

from recalkv_vllm.ops import Batch, reference
from recalkv_vllm.ops.contract import BoundLayer
from recalkv_vllm.ops.dispatch import MODULES

from .geometries import GEOMETRIES, Geometry, latent_of
from .inputs import latent_cache, latent_layer
from .latent_formats import format_of

KERNELS = ("cpu", "triton", "cuda")
FORMATS = ("auto", "int8", "fp8", "int4", "bands")
BLOCK_SIZE = 16
#: ``(queries, cached tokens)``: decode, verification, prefill, a prompt after a cached prefix.
BATCH = ((1, 777), (4, 61), (100, 100), (30, 300))
#: Largest error, relative to the largest value of the reference.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}


def smoke(
    device: str, dtype: torch.dtype, geometry: Geometry, formats: tuple[str, ...]
) -> Iterator[tuple[str, str | None]]:
    """``(what, fault)`` of every kernel; the fault is None if it agrees, and starts with "not here"
    if it cannot run on ``device``."""
    for latent_dtype in formats:
        torch.manual_seed(0)
        latent = latent_of(geometry, 0.5, 1, "split")
        layer = latent_layer(geometry, latent, 1024, dtype, device, format_of(latent, latent_dtype))
        queries, lengths = (list(column) for column in zip(*BATCH, strict=True))
        blocks = -(-max(lengths) // BLOCK_SIZE)
        table = torch.randperm(blocks * len(BATCH), dtype=torch.int32, device=device)
        starts = [sum(queries[:i]) for i in range(len(BATCH) + 1)]
        batch = Batch(
            block_table=table.view(len(BATCH), blocks),
            seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
            query_start_loc=torch.tensor(starts, dtype=torch.int32, device=device),
            num_decodes=2,
            num_decode_tokens=5,
            max_decode_query_len=4,
        )
        shape = (sum(queries), geometry.num_heads, geometry.head_dim)
        q = torch.randn(shape, device=device).to(dtype)
        slow = reference.bind(layer)
        cache = latent_cache(table.numel(), BLOCK_SIZE, latent.rank, q, layer, slow)
        expected = slow.attend_heads(q, cache, batch)
        for kernel in KERNELS:
            if kernel == "cuda" and latent_dtype not in ("auto", "bands"):
                continue  # Triton's
            module = import_module(MODULES[kernel])
            what = f"{kernel}, {latent_dtype}"
            if reason := module.unsupported_reason(torch.device(device), dtype, geometry.head_dim):
                yield what, f"not here: {reason}"
                continue
            try:
                bound = module.bind(layer)
                got = bound.attend_heads(q, cache, batch)
                fault = difference(got, expected, TOLERANCE[dtype])
                if fault is not None:
                    earlier = bound.attend(q, cache, batch)
                    fault = f"{fault}; {parts(earlier, slow, q, cache, batch)}"
            except Exception as caught:  # whatever a compiler or a launch raises
                fault = " ".join(f"{type(caught).__name__}: {caught}".split())[:500]
            yield what, fault


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error, relative to the largest finite value expected; NaN is one."""
    largest = expected[expected.isfinite()].abs().max()
    return ((got.float() - expected.float()).abs().max() / largest).item()


def difference(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> str | None:
    """How heads ``[tokens, h_q, d]`` differ, as a whole and by sequences of :data:`BATCH`."""
    error = relative_error(got, expected)
    if error <= tolerance:  # false for NaN
        return None
    lengths = [queries for queries, _ in BATCH]
    split = zip(got.split(lengths), expected.split(lengths), strict=True)
    by_sequence = ", ".join(f"{relative_error(*pair):.2g}" for pair in split)
    return f"relative error {error:.2g} (of the sequences: {by_sequence})"


def parts(
    got: tuple[torch.Tensor, torch.Tensor], slow: BoundLayer, *call: torch.Tensor | Batch
) -> str:
    """How far off value latents and log-sum-exps are, from which heads are made."""
    errors = map(relative_error, got, slow.attend(*call))
    return "{:.2g} of value latents, {:.2g} of log-sum-exps".format(*errors)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="llama-3.1-8b")
    options = parser.parse_args()
    os.environ.pop("RECALKV_KERNEL", None)
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    print(torch.cuda.get_device_name() if gpu else "no GPU: the CPU's kernels")
    agreeing, faults, absent = 0, 0, {}
    for what, fault in smoke(device, dtype, GEOMETRIES[options.geometry], FORMATS):
        print(f"{what}: {fault or 'agrees'}", flush=True)
        if fault is not None and fault.startswith("not here"):
            absent[what.partition(",")[0]] = fault
        else:
            agreeing, faults = agreeing + (fault is None), faults + (fault is not None)
    told = [f"{kernel} is {why}" for kernel, why in absent.items() if not (gpu and kernel == "cpu")]
    print("; ".join([f"{agreeing} agree, {faults} do not", *told]))
    return 1 if faults or not agreeing else 0


if __name__ == "__main__":
    sys.exit(main())
