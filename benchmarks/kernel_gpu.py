"""The GPU side of the kernel benchmark: our attention against stock kernels on the same GPU.

A timed call is a CUDA graph of many layers' caches in turn, as serving replays it: no launch
overhead, and each cache comes from memory, not from the L2 of the call before. Factors are those of
one layer, so they may stay in L2.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable

import torch

from recalkv_vllm import ops
from recalkv_vllm.band_format import CacheFormat
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.ops import Batch, BatchLimits, reference
from recalkv_vllm.ops.dispatch import implementation

from .geometries import Geometry, Latent
from .inputs import latent_cache, latent_layer
from .runs import Runs
from .stock_gpu import MAKERS, Attend, Problem, UnavailableError

BLOCK_SIZE = 16
#: Caches that take turns have at least this many times the bytes of L2, ours as well as stock's.
TIMES_L2 = 4
#: Uncompressed caches take turns up to this much memory, and this share of the device's.
CACHE_BYTES = 4 << 30
CACHE_SHARE = 0.25
LARGEST_CACHE_BYTES = 24 << 30
LARGEST_CACHE_SHARE = 0.35


def largest_cache_bytes() -> int:
    """Largest uncompressed cache of one layer that is measured: beside it there must be room for
    the compressed one and for what kernels need."""
    total = torch.cuda.get_device_properties().total_memory
    return min(LARGEST_CACHE_BYTES, int(LARGEST_CACHE_SHARE * total))


def clean_up() -> None:
    """Give back the memory of a combination's graphs.

    Raises:
        RuntimeError: the device is lost, so that no other combination can be measured.
    """
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()


def cache_copies(layers: int, dense_bytes: int, latent_bytes: int, l2: int, total: int) -> int:
    """How many caches take turns.

    As many as the model has layers, or more where those of latents would fit L2; never more than
    uncompressed ones fit their share of memory.

    Args:
        layers: of the model.
        dense_bytes: one layer's uncompressed cache.
        latent_bytes: one layer's compressed cache.
        l2: bytes of the device's L2.
        total: bytes of its memory.
    """
    fitting = min(CACHE_BYTES, int(CACHE_SHARE * total)) // dense_bytes
    return max(1, min(fitting, max(layers, -(-TIMES_L2 * l2 // latent_bytes))))


def build(
    geometry: Geometry,
    latent: Latent,
    latent_format: CacheFormat | None,
    context: int,
    num_seqs: int,
    queries: int,
    dtype: torch.dtype,
    device: str = "cuda",
) -> Runs:
    """Random inputs of one configuration.

    Args:
        device: other than a GPU's, calls run one by one (Triton's interpreter, for tests).

    Raises:
        InputError: no stock kernel runs here.
    """
    blocks = -(-context // BLOCK_SIZE)
    batch = Batch(
        block_table=_shuffled(blocks * num_seqs, device).view(num_seqs, blocks),
        seq_lens=torch.full((num_seqs,), context, dtype=torch.int32, device=device),
        query_start_loc=torch.arange(num_seqs + 1, dtype=torch.int32, device=device) * queries,
        num_decodes=num_seqs,
        num_decode_tokens=num_seqs * queries,
        max_decode_query_len=queries,
        max_seq_len=context,
        work_lists={},
    )
    shape = (num_seqs * queries, geometry.num_heads, geometry.head_dim)
    q = torch.randn(shape, device=device).to(dtype)

    layer = latent_layer(geometry, latent, context, dtype, device, latent_format)
    ours, slow = ops.bind(layer), reference.bind(layer)
    ours.reserve(BatchLimits(geometry.num_heads, num_seqs, queries, context, num_seqs * queries))
    one = latent_cache(blocks * num_seqs, BLOCK_SIZE, latent.rank, q, layer, ours)
    layers = cache_copies(
        geometry.layers,
        geometry.cache_bytes(context, num_seqs, dtype),
        one.nbytes,
        *_memory(q.device),
    )
    caches = [one.clone() for _ in range(layers)]
    kv = (geometry.num_kv_heads, geometry.head_dim)
    dense = _random(layers, 2, blocks * num_seqs, BLOCK_SIZE, *kv, like=q)
    problem = Problem(geometry, q, dense, batch, context, queries)
    chosen = implementation(q.device, dtype, geometry.head_dim)
    return Runs(
        kernel=chosen.describe(q.device, dtype),
        calls=layers,
        ours=_replay(lambda i: ours.attend_heads(q, caches[i], batch), layers, q.device),
        stock={name: _replay(attend, layers, q.device) for name, attend in _stock(problem).items()},
        reference=_eager(lambda i: slow.attend_heads(q, caches[i], batch), layers, q.device),
    )


def _memory(device: torch.device) -> tuple[int, int]:
    """Bytes of L2 and of memory; an interpreted kernel has no L2."""
    if device.type != "cuda":
        return 0, CACHE_BYTES
    properties = torch.cuda.get_device_properties(device)
    return properties.L2_cache_size, properties.total_memory


def _shuffled(count: int, device: str) -> torch.Tensor:
    return torch.randperm(count, dtype=torch.int32, device=device)


def _random(*shape: int, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device).normal_()


def _stock(problem: Problem) -> dict[str, Attend]:
    """Stock kernels that run here; each has run once."""
    found, reasons = {}, []
    for name, make in MAKERS.items():
        try:
            attend = make(problem)
            attend(0)
        # Libraries refuse shapes and devices with whatever they like: that kernel is then left out.
        except (UnavailableError, RuntimeError, ValueError, NotImplementedError) as error:
            reasons.append(f"{name}: {str(error).splitlines()[0]}")
        else:
            found[name] = attend
    if not found:
        raise InputError(f"bench kernel: no stock kernel runs here ({'; '.join(reasons)})")
    for reason in reasons:
        print(f"recalkv: baseline left out: {reason}", file=sys.stderr)
    return found


def _eager(
    attend: Callable[[int], object], layers: int, device: torch.device
) -> Callable[[], object]:
    """A function that attends all layers and waits for the end."""

    def run() -> None:
        for layer in range(layers):
            attend(layer)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def _replay(
    attend: Callable[[int], object], layers: int, device: torch.device
) -> Callable[[], object]:
    """:func:`_eager` as a CUDA graph, on a GPU."""
    eager = _eager(attend, layers, device)
    if device.type != "cuda":
        return eager
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        eager()  # compiles and loads what capture must not
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(layers):
            attend(layer)

    def run() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return run
