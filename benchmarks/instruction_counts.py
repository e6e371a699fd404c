"""Instructions of compiled Triton kernels, and the constants of the cost model fitted to them.

``python -m recalkv_vllm.benchmarks.instruction_counts`` compiles decode kernels for sm_80, sm_90
and sm_100, no GPU needed, and prints the loop of each beside what :mod:`recalkv_vllm.cost.triton`
says of it; then constants of least relative squares, for each kind of kernel that there is. Some
200 kernels take five minutes of one core; Triton's cache keeps them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import triton

from recalkv_vllm.band_format import token_bytes
from recalkv_vllm.cost import LayerCost
from recalkv_vllm.cost.triton import (
    COUNTED,
    Instructions,
    instructions,
    launch_shape,
    tensor_flop,
)
from recalkv_vllm.kernels import heuristics
from recalkv_vllm.ops.triton.plan import most_code_bits

from .compile_report import TARGETS, Case, CompileOnlyDriver, launches, tiles_per_round
from .fit import least_relative_squares
from .geometries import GEOMETRIES
from .sass import loop_of

ARCHES = tuple(TARGETS)
NAMES = ("llama-3.1-8b", "smollm2-135m")
COMPRESSIONS = (0.5, 0.75)
SPANS = ("split", "joint", "nested")
LATENT_DTYPES = ("bf16", "bands")

#: Family of architectures, tokens of a tile, codes: what constants are for.
Kind = tuple[int, int, bool]


@dataclass(frozen=True, slots=True)
class Count:
    """One kernel's loop.

    Args:
        counted: instructions per cached token, all warps of a program together.
        flop: of matrix products, the same; 0 where machine code does not tell, as of inner loops.
        modelled: instructions by the cost model.
        modelled_flop: FLOP by the cost model.
        features: heads times head size, and columns that are multiplied.
    """

    case: Case
    arch: int
    kind: Kind
    counted: float
    flop: float
    modelled: float
    modelled_flop: float
    features: tuple[int, int]


def cases(
    geometries: Sequence[str], group_sizes: Sequence[int], compressions: Sequence[float]
) -> Iterator[Case]:
    """Layouts whose regions bands can fill, with all group sizes that divide the heads."""
    for name, size in itertools.product(geometries, group_sizes):
        if GEOMETRIES[name].num_kv_heads % size:
            continue
        for spans, compression, dtype in itertools.product(SPANS, compressions, LATENT_DTYPES):
            case = Case(name, compression, size, spans, dtype)
            if case.exists:
                yield case


def layer_cost(case: Case) -> LayerCost:
    """The layout as the cost model sees it."""
    geometry, latent, latent_format = GEOMETRIES[case.geometry], case.latent, case.latent_format
    keys, values = latent.k_spans[0], latent.v_spans[0]
    return LayerCost(
        num_heads=geometry.num_heads,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        k_group_size=case.group_size,
        v_group_size=geometry.num_kv_heads // len(latent.v_spans),
        k_width=latent.k_width,
        v_width=latent.v_width,
        shared=max(0, min(keys.end, values.end) - max(keys.start, values.start)),
        token_bytes=token_bytes(latent_format, latent.rank, 2),
        code_bits=most_code_bits(latent_format),
        bands=case.latent_dtype == "bands",
    )


def count(case: Case, arch: int) -> Count:
    """Compile a layout's first launch of attention and read its loop.

    Raises:
        ValueError: the launch is not the one that the cost model supposes.
    """
    target = TARGETS[arch]
    launch = next(iter(launches(case, target, "decode")))
    shape = launch_shape(layer_cost(case), arch)
    config = heuristics.attention_config(shape, target, 1)
    names = {"heads": "HEADS", "tile": "TILE", "v_block": "V_BLOCK", "rows": "ROWS"}
    for field, name in names.items():
        if getattr(config, field) != launch.arguments[name]:
            raise ValueError(f"{case}: {name} {launch.arguments[name]}, expected of {config}")
    loop = loop_of(launch.compile().asm["cubin"])
    per_token = launch.warps / (config.tile * tiles_per_round(loop, launch.arguments))
    # Inner loops over a streamed factor, one for each of its bands, are counted once.
    streams = launch.arguments["K_STREAMS"] if launch.arguments["STREAM"] else ()
    once = replace(shape, k_width=sum(step for _, step, *_ in streams) or shape.k_width)
    kind = (target.family, config.tile, case.latent_format is not None)
    return Count(
        case,
        arch,
        kind,
        loop.instructions * per_token,
        0.0 if streams else loop.warp_flop * per_token,
        instructions(COUNTED[kind], once, config),
        tensor_flop(once, config, arch),
        (config.heads * shape.dim, config.heads * once.k_width + config.v_block),
    )


def fitted(counts: Sequence[Count]) -> Instructions:
    """Constants of least relative squares."""
    features = [(1, *each.features) for each in counts]
    return Instructions(*least_relative_squares([each.counted for each in counts], features))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="*", type=int, choices=ARCHES, default=list(ARCHES))
    parser.add_argument("--geometry", nargs="*", choices=GEOMETRIES, default=list(NAMES))
    parser.add_argument("--group-size", nargs="*", type=int, default=[1, 2, 3, 4, 8])
    parser.add_argument("--compression", nargs="*", type=float, default=list(COMPRESSIONS))
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args(arguments)
    out = sys.stderr if options.json else sys.stdout
    kinds: dict[Kind, list[Count]] = defaultdict(list)
    for arch in options.arch:
        triton.runtime.driver.set_active(CompileOnlyDriver(arch))
        for case in cases(options.geometry, options.group_size, options.compression):
            found = count(case, arch)
            kinds[found.kind].append(found)
            print(
                f"sm_{arch:<3} {case.geometry:12} {case.compression} s={case.group_size} "
                f"{case.spans:6} {case.latent_dtype:5} {found.counted:6.1f} instructions "
                f"per token, modelled {found.modelled:6.1f}",
                file=out,
                flush=True,
            )
    fits = {kind: fitted(counts) for kind, counts in sorted(kinds.items())}
    for kind, constants in fits.items():
        worst = max(abs(each.modelled / each.counted - 1) for each in kinds[kind])
        print(f"{kind}: {constants}; {COUNTED[kind]} is off by {worst:.0%} at most", file=out)
    if options.json:
        rows = [asdict(each) for counts in kinds.values() for each in counts]
        json.dump({"triton": triton.__version__, "rows": rows}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
