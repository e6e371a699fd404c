"""Compares what warming up compiles with what batches ask for: run without Triton's interpreter.

Nothing is compiled or launched. Triton is asked for every launch, and says by its own key, which
has types, alignments and divisibility besides compile-time arguments, what it would compile.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace

import torch
import triton

from recalkv_vllm.benchmarks.compile_report import TARGETS, Case, CompileOnlyDriver
from recalkv_vllm.benchmarks.geometries import GEOMETRIES
from recalkv_vllm.benchmarks.inputs import empty_cache, latent_layer
from recalkv_vllm.kernels import heuristics
from recalkv_vllm.ops import Batch, BatchLimits, Pieces
from recalkv_vllm.ops import triton as ops
from recalkv_vllm.ops.triton.launch import Launch

CASES = (
    Case("llama-3.1-8b", 0.5, 1, "split"),
    Case("llama-3.1-8b", 0.5, 4, "joint"),
    Case("llama-3.1-8b", 0.5, 1, "joint", "int4"),
    Case("llama-3.1-8b", 0.5, 1, "split", "bands"),
    Case("qwen2.5-7b", 0.6, 2, "shared-v"),
    Case("smollm2-135m", 0.7, 3, "split"),
)
#: The case that is looked at with sinks, too.
WITH_SINKS = CASES[0]
SEQ_LEN = 32768
#: Queries of a decode, and of other sequences.
DECODE_LENGTHS = (1, 3)
PREFILLS = ((1,), (2,), (4,), (3, 5), (7,), (16,), (31,), (100, 1, 1), (1000, 24), (2048,))


def batches(decode_length: int) -> Iterator[tuple[int, Batch]]:
    """``(tokens, batch)``: decodes, prefills and both, of many sizes and table widths."""
    for count, prefill, longest in itertools.product((0, 1, 7, 33), ((), *PREFILLS), (1, SEQ_LEN)):
        lengths = [decode_length] * count + list(prefill)
        if lengths:
            starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
            table = torch.zeros(len(lengths), longest // 16 + 1, dtype=torch.int32)
            hints = (count, count * decode_length, decode_length, longest)
            yield int(starts[-1]), Batch(table, starts[1:], starts, *hints)


def compiled_by(calls: Iterator[None]) -> set[str]:
    """Keys of what Triton would compile while ``calls`` run."""
    keys: set[str] = set()

    def note(*, key: str, fn, **_: object) -> bool:
        keys.add(f"{fn.name} {key}")
        return True  # do not compile

    triton.knobs.runtime.jit_cache_hook = note
    for _ in calls:
        pass
    triton.knobs.runtime.jit_cache_hook = None
    return keys


def serve(layer: ops.TritonLayer, cache: torch.Tensor, rank: int, heads: int, head_dim: int,
          decode_length: int) -> Iterator[None]:  # fmt: skip
    for tokens, batch in batches(decode_length):
        slots = torch.zeros(tokens + 1, dtype=torch.int64)[1:]  # 8 bytes off
        layer.update_cache(torch.zeros(tokens, rank, dtype=torch.bfloat16), cache, slots)
        yield
        q = torch.zeros(tokens, heads, head_dim, dtype=torch.bfloat16)
        layer.attend_heads(q, cache, batch)
        yield
        rest = batch.block_table[batch.num_decodes :]
        row = torch.zeros(3 * len(rest) + 2, dtype=torch.int32)[1:]  # of a table of slices
        pieces = Pieces(rest, row[: len(rest)], row[len(rest) : 2 * len(rest) + 1], tokens)
        layer.reconstruct(cache, pieces, *torch.zeros(2, tokens, 1, 1, dtype=torch.bfloat16))
        yield


def warm_up(layer: ops.TritonLayer, cache: torch.Tensor, limits: BatchLimits) -> Iterator[None]:
    assert layer.warm_up(cache, limits) > 0
    yield


def compare(case: Case, arch: int, decode_length: int, sinks: bool = False) -> dict[str, object]:
    geometry, latent, latent_format = GEOMETRIES[case.geometry], case.latent, case.latent_format
    constants = latent_layer(geometry, latent, 1024, torch.bfloat16, latent_format=latent_format)
    if sinks:
        of_heads = torch.zeros(geometry.num_heads, dtype=torch.bfloat16)
        constants = replace(constants, sinks=of_heads)
    layer = ops.bind(constants)
    cache = empty_cache(2, 16, latent.rank, constants)
    heads, head_dim = geometry.num_heads, geometry.head_dim
    warm = compiled_by(warm_up(layer, cache, BatchLimits(heads, 256, decode_length, SEQ_LEN, 8192)))
    asked = compiled_by(serve(layer, cache, latent.rank, heads, head_dim, decode_length))
    return {
        "case": f"{case} sm_{arch} {decode_length}",
        "compiled": len(asked),
        "cold": sorted(asked - warm),
        "in vain": sorted(warm - asked),
    }


def main() -> None:
    Launch.run = lambda self: self.compile()
    # As if these were too many tiles at once: what is taken instead has to be warm, too.
    Launch.spills = lambda self: max(0, self.stages - 2)
    for arch, target in TARGETS.items():
        triton.runtime.driver.set_active(CompileOnlyDriver(arch))
        heuristics.target_of = lambda device, target=target: target
        for case, decode_length in itertools.product(CASES, DECODE_LENGTHS):
            print(json.dumps(compare(case, arch, decode_length)), flush=True)
        print(json.dumps(compare(WITH_SINKS, arch, 1, sinks=True)), flush=True)


if __name__ == "__main__":
    main()
