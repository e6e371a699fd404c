"""Loads from the paged cache: where tokens lie, which columns, how codes become latents.

Tokens are on the first axis, the M side of every matrix instruction, so that a handful of query
rows on the N side wastes little.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Format(NamedTuple):
    """How latents are stored and computed with; fixed at compile time.

    Args:
        CODEC: latent dtype of a quantized cache, else None; ``bands`` if they are in bands.
        RANK: elements of a quantized token.
        SCALE_SHIFT: log2 of the columns that share a scale.
        CODE_UNIT: bytes; spans in bands start at multiples of it.
        DTYPE: of loaded latents.
    """

    CODEC: tl.constexpr
    RANK: tl.constexpr
    SCALE_SHIFT: tl.constexpr
    CODE_UNIT: tl.constexpr
    DTYPE: tl.constexpr


class Start(NamedTuple):
    """Where a span starts in a token.

    Args:
        column: in units of 16, so that the compiler sees the alignment that asynchronous copies
            need.
        codes: of latents in bands, the first code byte in units of ``CODE_UNIT``; else unused.
    """

    column: tl.tensor
    codes: tl.tensor


class Cache(NamedTuple):
    """A paged cache; ``scales`` is None and its strides unused if latents are not quantized, as are
    ``key_scales`` where keys have no norm."""

    block_table: tl.tensor
    stride_table: tl.tensor
    latents: tl.tensor
    scales: tl.tensor
    stride_block: tl.tensor
    stride_slot: tl.tensor
    stride_scale_block: tl.tensor
    stride_scale_slot: tl.tensor
    key_scales: tl.tensor
    stride_key_block: tl.tensor
    stride_key_slot: tl.tensor


class Tokens(NamedTuple):
    """A tile of cached tokens, each field ``[TILE]``.

    Args:
        position: in the sequence.
        live: whether the token exists and some query may see it.
        latents: pointer to its first latent (or code).
        scales: pointer to its first scale; meaningless if latents are not quantized.
        key_scales: pointer to the first factor on its keys; meaningless where keys have no norm.
    """

    position: tl.tensor
    live: tl.tensor
    latents: tl.tensor
    scales: tl.tensor
    key_scales: tl.tensor


@triton.jit
def locate_tokens(cache, seq, position, end, BLOCK_SIZE: tl.constexpr):
    """:class:`Tokens` of sequence ``seq`` at ``position: [TILE]``, live below ``end``."""
    live = position < end
    entry = cache.block_table + seq.to(tl.int64) * cache.stride_table + position // BLOCK_SIZE
    block = tl.load(entry, mask=live, other=0).to(tl.int64)
    return tokens_in(cache, block, position, live, BLOCK_SIZE)


@triton.jit
def tokens_in(cache, block, position, live, BLOCK_SIZE: tl.constexpr):
    """:class:`Tokens` in the slots ``position % BLOCK_SIZE`` of ``block: [TILE]``."""
    latents = cache.latents + block * cache.stride_block
    latents += position % BLOCK_SIZE * cache.stride_slot
    scales = latents  # something, because in Triton 3.6 a function cannot return None
    if cache.scales is not None:
        slot_offset = position % BLOCK_SIZE * cache.stride_scale_slot
        scales = cache.scales + block * cache.stride_scale_block + slot_offset
    key_scales = latents
    if cache.key_scales is not None:
        slot_offset = position % BLOCK_SIZE * cache.stride_key_slot
        key_scales = cache.key_scales + block * cache.stride_key_block + slot_offset
    return Tokens(position, live, latents, scales, key_scales)


@triton.jit
def locate_span(first_columns, first_codes, index):
    """:class:`Start` of the span at ``index`` of the tables; a head's K span, then its V span."""
    column = tl.load(first_columns + index)
    codes = column
    if first_codes is not None:
        codes = tl.load(first_codes + index)
    return Start(column, codes)


@triton.jit
def load_columns(rows, live, first, OFFSET: tl.constexpr, SIZE: tl.constexpr):
    """``[TILE, SIZE]`` latents from column ``16 * first + OFFSET`` on; zero where not live.

    The mask keeps slots that were never written (possibly NaN) out of ``0 * NaN``.
    """
    columns = first * 16 + OFFSET + tl.arange(0, SIZE)
    return tl.load(rows[:, None] + columns[None, :], mask=live[:, None], other=0.0)


@triton.jit
def load_codes(rows, live, first, SIZE: tl.constexpr, BITS: tl.constexpr):
    """``[TILE, SIZE]`` fields of ``BITS`` bits from ``first`` on, earlier ones in lower bits."""
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
    """``[TILE, SIZE]`` of float32: latents from ``column`` on as they would be at a scale of 1."""
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
def load_band_units(rows, live, column, CHUNKS: tl.constexpr, C: tl.constexpr):
    """The same of latents in bands: those of chunk ``C``, ``column`` columns further on."""
    SIZE: tl.constexpr = CHUNKS[C][1]
    LOW: tl.constexpr = CHUNKS[C][2]
    HIGH: tl.constexpr = CHUNKS[C][4]
    codes = load_codes(rows + CHUNKS[C][3], live, column, SIZE, LOW)
    if HIGH > 0:
        codes = codes | (load_codes(rows + CHUNKS[C][5], live, column, SIZE, HIGH) << LOW)
    return codes.to(tl.float32) - ((1 << (LOW + HIGH - 1)) - 0.5)


@triton.jit
def load_scales(source, live, CODEC: tl.constexpr):
    """Scales as float32; those of latents in bands are the upper bytes of halves."""
    if CODEC == "bands":
        bits = tl.load(source, mask=live, other=0).to(tl.int16) << 7
        scale = bits.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        scale = tl.load(source, mask=live, other=0.0).to(tl.float32)
    return scale


@triton.jit
def load_latents(tokens, start, more, CHUNKS: tl.constexpr, C: tl.constexpr, FORMAT: tl.constexpr):
    """``[TILE, size]`` latents of chunk ``C``, ``more`` columns further on; zero where not live.

    Chunks are ``(offset, size, *planes)`` in the span at ``start``, see ``columns.py``. Quantized
    latents are dequantized: column ``c`` has the scale ``c >> SCALE_SHIFT`` of its token. Scales
    are loaded once per 16 columns, which share one wherever a span starts.
    """
    OFFSET: tl.constexpr = CHUNKS[C][0]
    SIZE: tl.constexpr = CHUNKS[C][1]
    first = start.column
    if FORMAT.CODEC is None:
        latents = load_columns(tokens.latents + more, tokens.live, first, OFFSET, SIZE)
    else:
        rows, live = tokens.latents, tokens.live
        if FORMAT.CODEC == "bands":
            codes = rows + start.codes * FORMAT.CODE_UNIT
            units = load_band_units(codes, live, more, CHUNKS, C)
        else:
            column = first * 16 + more + OFFSET
            units = load_units(rows, live, column, SIZE, FORMAT.CODEC, FORMAT.RANK)
        sixteens = first + (more + OFFSET) // 16 + tl.arange(0, SIZE // 16)
        source = tokens.scales[:, None] + (sixteens >> (FORMAT.SCALE_SHIFT - 4))[None, :]
        scale = load_scales(source, live[:, None], FORMAT.CODEC)
        scale = tl.broadcast_to(scale[:, :, None], [rows.shape[0], SIZE // 16, 16])
        latents = (units * tl.reshape(scale, [rows.shape[0], SIZE])).to(FORMAT.DTYPE)
    return latents


@triton.jit
def load_value_chunks(tokens, start, V_CHUNKS: tl.constexpr, FORMAT: tl.constexpr):
    """The V span's chunks, a tuple of ``[TILE, size]``; the span is at ``start``."""
    chunks = ()
    for c in tl.static_range(len(V_CHUNKS)):
        chunks = chunks + (load_latents(tokens, start, 0, V_CHUNKS, c, FORMAT),)
    return chunks


@triton.jit
def load_key_chunks(tokens, start, values, K_CHUNKS: tl.constexpr, FORMAT: tl.constexpr):
    """The K span's chunks, a tuple of ``[TILE, size]``; the span is at ``start``.

    ``K_CHUNKS`` end in the index of the chunk in ``values`` that has the same columns, or -1.
    """
    chunks = ()
    for c in tl.static_range(len(K_CHUNKS)):
        if K_CHUNKS[c][6] >= 0:
            chunks = chunks + (values[K_CHUNKS[c][6]],)
        else:
            chunks = chunks + (load_latents(tokens, start, 0, K_CHUNKS, c, FORMAT),)
    return chunks
