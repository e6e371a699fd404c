"""Reconstruct keys from latents, and rotate them: bias, scale and RoPE on the accumulator."""

import triton
import triton.language as tl

from recalkv_vllm.kernels.latents import load_latents


@triton.jit
def load_factor(
    k_up, OFFSET: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, K_WIDTH: tl.constexpr
):
    """``[SIZE, DIM]``: columns ``OFFSET + [0, SIZE)`` of one head's factor, transposed."""
    columns = OFFSET + tl.arange(0, SIZE)
    rows = tl.arange(0, DIM)
    return tl.load(k_up + rows[None, :] * K_WIDTH + columns[:, None])


@triton.jit
def load_factors(
    k_up,
    first_head,
    HEADS: tl.constexpr,
    K_CHUNKS: tl.constexpr,
    DIM: tl.constexpr,
    K_WIDTH: tl.constexpr,
):
    """Factors of ``HEADS`` heads from ``first_head`` on, each a tuple of ``[size, DIM]``.

    ``k_up: [heads, DIM, K_WIDTH]``; the tuples' members are the chunks of the K span.
    """
    factors = ()
    for j in tl.static_range(HEADS):
        chunks = ()
        for c in tl.static_range(len(K_CHUNKS)):
            factor = k_up + (first_head + j) * DIM * K_WIDTH
            chunks = chunks + (load_factor(factor, K_CHUNKS[c][0], K_CHUNKS[c][1], DIM, K_WIDTH),)
        factors = factors + (chunks,)
    return factors


@triton.jit
def reconstruct_keys(keys, latents, factors):
    """Add the chunks' products to ``keys: [TILE, DIM]``."""
    for c in tl.static_range(len(latents)):
        keys = tl.dot(latents[c], factors[c], keys, input_precision="ieee")
    return keys


@triton.jit
def stream_columns(
    sums,
    tokens,
    start,
    up,
    STREAMS: tl.constexpr,
    S: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Add the product of stretch ``S``: its first chunk, and the column that it ends at."""
    FROM: tl.constexpr = STREAMS[S][0]
    STEP: tl.constexpr = STREAMS[S][1]
    for more in tl.range(0, STREAMS[S][6] - FROM, STEP, num_stages=STAGES):
        latents = load_latents(tokens, start, more, STREAMS, S, FORMAT)
        factor = load_factor(up + more, FROM, STEP, DIM, WIDTH)
        sums = tl.dot(latents, factor, sums, input_precision="ieee")
    return sums


@triton.jit
def reconstruct_streaming(
    sums,
    tokens,
    start,
    up,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    STREAMS: tl.constexpr,
    STAGES: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """The same with some columns at a time of latents and factor, read from L2.

    The span is at ``start``, ``up`` is one head's factor of keys or values; ``STREAMS`` are
    stretches of columns that are stored alike.
    """
    for s in tl.static_range(len(STREAMS)):
        sums = stream_columns(sums, tokens, start, up, STREAMS, s, DIM, WIDTH, STAGES, FORMAT)
    return sums


@triton.jit
def scale_keys(keys, tokens, head, KEY_SCALES: tl.constexpr):
    """``keys: [TILE, DIM]`` times their tokens' cached scales: one per KV head, or a single one.

    Before they are rounded, so that they cannot overflow float16.
    """
    index = 0 if KEY_SCALES == 1 else head
    return keys * tl.load(tokens.key_scales + index, mask=tokens.live, other=0.0)[:, None]


@triton.jit
def load_rotation(table, rows, live, stride, ROT_HALF: tl.constexpr, HALF: tl.constexpr):
    """Cosines and sines ``[TILE, HALF]`` of table rows; pairs that RoPE leaves alone get 1 and 0.

    A row of ``table`` holds ``ROT_HALF`` cosines, then as many sines.
    """
    pair = tl.arange(0, HALF)
    source = table + rows[:, None] * stride + pair[None, :]
    mask = live[:, None] & (pair < ROT_HALF)[None, :]
    cos = tl.load(source, mask=mask, other=1.0)
    sin = tl.load(source + ROT_HALF, mask=mask, other=0.0)
    return cos, sin


@triton.jit
def rotate_pairs(x, cos, sin):
    """Turn neighbors ``(2i, 2i + 1)`` of ``x: [TILE, DIM]`` by the angles ``[TILE, DIM / 2]``."""
    a, b = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    return tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), x.shape)


@triton.jit
def turn_queries_back(queries, partners, table_row, ROT_HALF: tl.constexpr):
    """Rotate ``queries: [DIM, ROWS]`` by minus the angles in one row of the rotation table.

    The score of a query so turned and a key turned by ``j`` is that of the query and a key turned
    by the row's position plus ``j``. ``partners`` are the other members of the queries' pairs.
    """
    component = tl.arange(0, queries.shape[0])
    source = table_row + component // 2
    rotated = component < 2 * ROT_HALF
    cos = tl.load(source, mask=rotated, other=1.0).to(tl.float32)
    sin = tl.load(source + ROT_HALF, mask=rotated, other=0.0).to(tl.float32)
    sin = tl.where(component % 2 == 0, sin, -sin)
    return (queries * cos[:, None] + partners * sin[:, None]).to(queries.dtype)
