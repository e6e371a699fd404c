"""Device functions of the attention kernel: which sequence, which columns, which keys.

They work on one tile of cached tokens, with tokens on the M side of every matrix instruction, so
that a handful of query rows on the N side wastes little. They move no data of their own beyond the
loads named in ``attention.py``.
"""

import triton
import triton.language as tl


@triton.jit
def find_sequence(query_start_loc, block, num_seqs, QUERY_BLOCK: tl.constexpr):
    """Index of the sequence that query block ``block`` belongs to, by bisection.

    Sequence ``i`` owns the blocks from ``start[i] // QUERY_BLOCK + i`` on: never fewer than its
    queries need, and ``tokens // QUERY_BLOCK + num_seqs`` in all, whatever the query lengths.
    """
    low = 0
    high = num_seqs
    while low < high:
        middle = (low + high) // 2
        first = tl.load(query_start_loc + middle) // QUERY_BLOCK + middle
        if first <= block:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def zeros(SIZE: tl.constexpr, ROWS: tl.constexpr):
    """``[SIZE, ROWS]`` of float32; Triton 3.6 takes no number out of a tuple as a size directly."""
    return tl.zeros([SIZE, ROWS], tl.float32)


@triton.jit
def load_columns(token_rows, live, first, OFFSET: tl.constexpr, SIZE: tl.constexpr):
    """``[tile, SIZE]`` latents from column ``16 * first + OFFSET`` on; zero where not live.

    The mask keeps slots that were never written (possibly NaN) out of ``0 * NaN``. Columns come in
    units of 16 so that the compiler sees the alignment that asynchronous copies need.
    """
    columns = first * 16 + OFFSET + tl.arange(0, SIZE)
    return tl.load(token_rows[:, None] + columns[None, :], mask=live[:, None], other=0.0)


@triton.jit
def load_codes(rows, live, first, SIZE: tl.constexpr, BITS: tl.constexpr):
    """``[tile, SIZE]`` fields of ``BITS`` bits from ``first`` on, earlier ones in lower bits."""
    PER_BYTE: tl.constexpr = 8 // BITS
    source = rows[:, None] + (first // PER_BYTE + tl.arange(0, SIZE // PER_BYTE))[None, :]
    codes = tl.load(source, mask=live[:, None], other=0)
    if BITS <= 4:
        codes = tl.reshape(tl.join(codes & 15, codes >> 4), [rows.shape[0], SIZE // (4 // BITS)])
    if BITS <= 2:
        codes = tl.reshape(tl.join(codes & 3, codes >> 2), [rows.shape[0], SIZE // (2 // BITS)])
    if BITS == 1:
        codes = tl.reshape(tl.join(codes & 1, codes >> 1), [rows.shape[0], SIZE])
    return codes


@triton.jit
def load_units(rows, live, column, SIZE: tl.constexpr, CODEC: tl.constexpr, RANK: tl.constexpr):
    """``[tile, SIZE]`` codes from ``column`` on, as numbers of float32 for a scale of one."""
    if CODEC == "int8":
        units = load_codes(rows, live, column, SIZE, 8).to(tl.float32) - 127.5
    elif CODEC == "int4":
        units = load_codes(rows, live, column, SIZE, 4).to(tl.float32) - 7.5
    elif CODEC == "int3":
        low = load_codes(rows, live, column, SIZE, 2)
        high = load_codes(rows + RANK // 4, live, column, SIZE, 1)
        units = (low | (high << 2)).to(tl.float32) - 3.5
    else:
        # e4m3 in the bits of a half has 8 less in the exponent's bias.
        bits = load_codes(rows, live, column, SIZE, 8).to(tl.int16)
        halves = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        units = halves.to(tl.float16, bitcast=True).to(tl.float32) * 256
    return units


@triton.jit
def load_latents(
    rows,
    scale_rows,
    live,
    first,
    more,
    OFFSET: tl.constexpr,
    SIZE: tl.constexpr,
    CODEC: tl.constexpr,
    RANK: tl.constexpr,
    SCALE_SHIFT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """``[tile, SIZE]`` latents from column ``16 * first + more + OFFSET`` on; zero where not live.

    With a ``CODEC`` they are dequantised: column ``c`` has the scale ``c >> SCALE_SHIFT`` of its
    token. Scales are loaded once per 16 columns, which share one wherever a span starts.
    """
    if CODEC is None:
        latents = load_columns(rows + more, live, first, OFFSET, SIZE)
    else:
        units = load_units(rows, live, first * 16 + more + OFFSET, SIZE, CODEC, RANK)
        sixteens = first + (more + OFFSET) // 16 + tl.arange(0, SIZE // 16)
        source = scale_rows[:, None] + (sixteens >> (SCALE_SHIFT - 4))[None, :]
        scale = tl.load(source, mask=live[:, None], other=0.0).to(tl.float32)
        scale = tl.broadcast_to(scale[:, :, None], [rows.shape[0], SIZE // 16, 16])
        latents = (units * tl.reshape(scale, [rows.shape[0], SIZE])).to(DTYPE)
    return latents


@triton.jit
def load_factor(
    k_up, OFFSET: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, K_WIDTH: tl.constexpr
):
    """``[SIZE, DIM]``: columns ``OFFSET + [0, SIZE)`` of one head's factor, transposed."""
    columns = OFFSET + tl.arange(0, SIZE)
    rows = tl.arange(0, DIM)
    return tl.load(k_up + rows[None, :] * K_WIDTH + columns[:, None])


@triton.jit
def load_rotation(table, rows, live, stride, ROT_HALF: tl.constexpr, HALF: tl.constexpr):
    """Cosines and sines ``[tile, HALF]`` of table rows; pairs that RoPE leaves alone get 1 and 0.

    A row of ``table`` holds ``ROT_HALF`` cosines, then as many sines.
    """
    pair = tl.arange(0, HALF)
    source = table + rows[:, None] * stride + pair[None, :]
    mask = live[:, None] & (pair < ROT_HALF)[None, :]
    cos = tl.load(source, mask=mask, other=1.0)
    sin = tl.load(source + ROT_HALF, mask=mask, other=0.0)
    return cos, sin


@triton.jit
def rotate_pairs(x, cos, sin, TILE: tl.constexpr, DIM: tl.constexpr):
    """Turn neighbours ``(2i, 2i + 1)`` of ``x: [TILE, DIM]`` by the angles ``[TILE, DIM / 2]``."""
    a, b = tl.split(tl.reshape(x, [TILE, DIM // 2, 2]))
    return tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), [TILE, DIM])
