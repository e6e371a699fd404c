"""The cost model's constants for the CUDA decode kernel for Hopper, fitted to machine code.

``python -m recalkv_vllm.benchmarks.hopper_counts`` compiles the lean kernels in bfloat16, no GPU
needed, and prints the warp instructions of a tile (:mod:`.hopper_report`) for spans of many widths
beside what :mod:`recalkv_vllm.cost.hopper` says of them; then constants of least relative squares.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import product

from recalkv_vllm.band_format import BLOCK_COLUMNS
from recalkv_vllm.cost import LayerCost
from recalkv_vllm.cost.hopper import (
    ARCH,
    CONSUMER_GROUPS,
    COUNTED,
    ROWS,
    TILE,
    Instructions,
    consumer_groups,
    hopper_spends,
)
from recalkv_vllm.ops.cuda.hopper import HOPPER_COLUMN_TILES, HOPPER_V_TILES
from recalkv_vllm.ops.cuda.hopper_bands import CHUNK
from recalkv_vllm.ops.cuda.plan import HEAD_DIMS

from .fit import least_relative_squares
from .hopper_report import (
    HopperInstantiation,
    Layout,
    compile_hopper,
    instructions_per_tile,
)

#: Of blocks of 32 columns, in turns; all of 8 bits take most.
BITS = ((8,), (6, 4), (4, 3, 2))


def kernels() -> list[HopperInstantiation]:
    """Those that are counted."""
    sizes = product(HEAD_DIMS, HOPPER_COLUMN_TILES, HOPPER_V_TILES, (False, True))
    return [HopperInstantiation("BFloat16", d, rows, v, True, bands) for d, rows, v, bands in sizes]


def layouts(kernel: HopperInstantiation) -> Iterator[Layout]:
    """Spans that a kernel might read, where they fit shared memory."""
    for layout in spans(kernel):
        if hopper_spends(layer_cost(layout), ARCH) is not None:
            yield layout


def spans(kernel: HopperInstantiation) -> Iterator[Layout]:
    """Of many widths."""
    widest = 16 * kernel.v_tiles
    for k_width, v_width in product((64, 128, 192), (widest // 2, widest)):
        for joint in (True, False):
            own = v_width - k_width if joint else v_width
            if own < 0:
                continue
            if not kernel.bands:
                yield Layout("", kernel, k_width, 2 * (k_width + own), joint, 0)
                continue
            for bits in BITS:
                blocks = (k_width + own) // BLOCK_COLUMNS
                every = tuple(bits[i % len(bits)] for i in range(blocks))
                keys = k_width // BLOCK_COLUMNS
                chunks = -(-sum(every) * BLOCK_COLUMNS // 8 // CHUNK)
                yield Layout(
                    "", kernel, k_width, chunks * CHUNK, joint, 0, every[:keys], every[keys:]
                )


def layer_cost(layout: Layout) -> LayerCost:
    """A layer of one KV head with such spans."""
    kernel = layout.kernel
    shared = layout.k_width if layout.one_piece else 0
    bits = layout.k_bits + layout.v_bits
    return LayerCost(
        num_heads=ROWS * kernel.column_tiles,
        num_kv_heads=1,
        head_dim=kernel.head_dim,
        k_group_size=1,
        v_group_size=1,
        k_width=layout.k_width,
        v_width=shared + layout.own_columns,
        shared=shared,
        token_bytes=layout.row_bytes + len(bits),
        code_bits=max(bits, default=None),
        bands=kernel.bands,
    )


def features(layout: Layout) -> tuple[float, ...]:
    """What each constant of :class:`Instructions` is multiplied by."""
    kernel = layout.kernel
    sizes = (kernel.head_dim, kernel.column_tiles, kernel.v_tiles)
    return (1, *sizes, layout.k_width, layout.own_columns)


def modelled(layout: Layout) -> float:
    """Warp instructions of a tile by the cost model.

    Raises:
        ValueError: it takes the layout for one that the kernel cannot read.
    """
    spent = hopper_spends(layer_cost(layout), ARCH)
    if spent is None:
        raise ValueError(f"{layout}: expected the kernel to read it")
    return spent.instructions * TILE * consumer_groups(layer_cost(layout)) / CONSUMER_GROUPS


def main() -> int:
    found: dict[bool, list[float]] = {coded: [] for coded in COUNTED}
    of: dict[bool, list[tuple[float, ...]]] = {coded: [] for coded in COUNTED}
    worst = dict.fromkeys(COUNTED, 0.0)
    for row in compile_hopper(kernels()):
        kernel = row.kernel
        for layout in layouts(kernel):
            consumer, *producers = instructions_per_tile(row.code, layout)
            counted, by_model = 4 * consumer + sum(producers), modelled(layout)
            found[kernel.bands].append(counted)
            of[kernel.bands].append(features(layout))
            worst[kernel.bands] = max(worst[kernel.bands], abs(by_model / counted - 1))
            print(
                f"d={kernel.head_dim:<3} rows={ROWS * kernel.column_tiles} "
                f"v_width<={16 * kernel.v_tiles:<3} "
                f"{layout.k_width:3} + {layout.own_columns:3} columns, "
                f"{layout.row_bytes:3} bytes: {counted} warp instructions per tile, "
                f"modelled {by_model:.0f}",
                flush=True,
            )
    for coded, counts in found.items():
        constants = Instructions(*least_relative_squares(counts, of[coded]))
        kind = "codes" if coded else "elements"
        print(f"{kind}: {constants}; {COUNTED[coded]} is off by {worst[coded]:.0%} at most")
    return 0


if __name__ == "__main__":
    sys.exit(main())
