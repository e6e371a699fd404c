"""Attention over a paged cache of latents: reconstruct, rotate, score and accumulate on chip.

Roofline. Per cached token and KV head a program reads its K span (``w_k`` elements, shared by the
heads of a group) and its V span (``w_v``), and does ``2·w_k·d`` FLOP to reconstruct the key plus
``2·(d + w_v)`` per query row. At ``w_k = w_v = 64``, ``d = 128`` and bf16 that is 64 FLOP per byte,
far left of an H100's ridge (295): decode is bound by memory, if nothing else is moved per tile.

Data movement. One program owns (a block of queries, ``HEADS`` KV heads of one V group, all cached
tokens or a piece of them) and walks over tiles of ``TILE`` tokens:

* latents: block table → slots → asynchronous copies into shared memory, several tiles ahead. The
  columns are cut into power-of-two chunks; a chunk that K and V both read is loaded once.
* ``k_up``: loaded once and kept in shared memory; where it does not fit, an inner loop streams it
  and the K columns from L2, ``STREAM`` columns at a time (such spans are bound by arithmetic). With
  ``LATE_VALUES``, values are loaded after it and need no registers meanwhile.
* RoPE: ``LOCAL_ROPE`` turns the queries back by the tile's first position and keys by their offset
  in the tile, whose table stays in registers; otherwise cosines and sines are read per token.
  Either way the two members of a rotated pair are neighbors (the factor's rows are permuted
  once), so that a rotation stays within a thread's registers, neox and interleaved alike.
* scores ``[TILE, ROWS]``: keys go from accumulator to operand registers without shared memory.
  The score columns of other heads' rows are computed and dropped, which is cheaper than gathering.
* output ``[w_v, ROWS]``: transposed, so that the span is the M side.

No value on the device is read by the host; the grid depends on shapes alone.

The kernel is in pieces that the compiler inlines: ``partition.py`` finds a program's rows and
tiles, ``latents.py`` loads from the cache, ``keys.py`` reconstructs and rotates keys, and
``softmax.py`` turns scores into the output.
"""

import triton
import triton.language as tl

from recalkv_vllm.kernels.keys import (
    load_factors,
    load_rotation,
    reconstruct_keys,
    reconstruct_streaming,
    rotate_pairs,
    scale_keys,
    turn_queries_back,
)
from recalkv_vllm.kernels.latents import (
    Cache,
    Format,
    Start,
    load_key_chunks,
    load_value_chunks,
    locate_span,
    locate_tokens,
)
from recalkv_vllm.kernels.padding import first_padding_row, locate_padding, store_zeros
from recalkv_vllm.kernels.partition import (
    find_queries,
    load_piece,
    load_queries,
    locate_rows,
    piece_rows,
    query_range,
    select_head,
    split_program,
    visible_tiles,
)
from recalkv_vllm.kernels.softmax import (
    accumulate_values,
    log_sum_exp,
    mask_scores,
    store_output,
    weigh_tokens,
    zero_chunks,
)


@triton.jit(
    do_not_specialize=[
        "num_seqs",
        "first_token",
        "end_token",
        "stride_table",
    ],
    do_not_specialize_on_alignment=["block_table", "seq_lens", "query_start_loc", "lse"],
)
def latent_attention(
    q,
    kv_cache,
    scales,
    key_scales,
    block_table,
    seq_lens,
    query_start_loc,
    pieces,
    k_up,
    k_bias,
    first_columns,
    first_codes,
    head_columns,
    rope_table,
    local_rotation,
    out,
    lse,
    num_seqs,
    first_token,
    end_token,
    stride_q_token,
    stride_q_head,
    stride_block,
    stride_slot,
    stride_scale_block,
    stride_scale_slot,
    stride_key_block,
    stride_key_slot,
    stride_table,
    stride_rope,
    scale,
    soft_cap,
    NUM_HEADS: tl.constexpr,
    QUERIES_PER_KV: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROT_HALF: tl.constexpr,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    V_BLOCK: tl.constexpr,
    V_BLOCKS: tl.constexpr,
    FIRST_V_BLOCK: tl.constexpr,
    K_CHUNKS: tl.constexpr,
    K_STREAMS: tl.constexpr,
    V_CHUNKS: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CODEC: tl.constexpr,
    RANK: tl.constexpr,
    SCALE_SHIFT: tl.constexpr,
    CODE_UNIT: tl.constexpr,
    KEY_SCALES: tl.constexpr,
    WINDOW: tl.constexpr,
    LOCAL_ROPE: tl.constexpr,
    SEARCH: tl.constexpr,
    STREAM: tl.constexpr,
    LATE_VALUES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write normalized ``o_lat`` and natural ``lse``, float32.

    ``HEADS`` KV heads per program, in K groups of ``GROUP``; ``DIM`` is ``HEAD_DIM`` padded.
    ``V_CHUNKS`` holds ``(offset, size, *planes)``, ``K_CHUNKS`` the same and the index of the V
    chunk with the same columns or -1, ``K_STREAMS`` ``(from, step, *planes, to)``; see
    ``columns.py``. The launch has ``V_BLOCKS`` blocks of value columns from ``FIRST_V_BLOCK`` on,
    all cut alike. With a ``CODEC``, ``kv_cache`` and ``scales`` are the parts of a quantized cache
    of latents of ``RANK`` elements; in bands, spans start at multiples of ``CODE_UNIT`` bytes.
    With a key norm, a token has ``KEY_SCALES`` factors on its keys in the cache.

    With ``pieces``, a work list, program ``(_, i)`` attends piece ``i``; ``out`` and ``lse`` are
    partial results ``[pieces, KV heads, QUERY_BLOCK · QUERIES_PER_KV, ...]``, and what no piece
    covers is left to the merge. Without it, ``SEARCH`` maps programs to query blocks of any batch;
    without that sequence ``i`` is program ``i`` and has at most ``QUERY_BLOCK`` queries. ``out``
    and ``lse`` then start at row ``first_token``; rows from the last sequence's end to
    ``end_token`` get zeros and minus infinity.
    """
    RESIDENT: tl.constexpr = STREAM == 0
    Q_HEADS: tl.constexpr = HEADS * QUERIES_PER_KV
    HEAD_BLOCKS: tl.constexpr = NUM_HEADS // Q_HEADS
    DTYPE: tl.constexpr = q.dtype.element_ty
    FORMAT: tl.constexpr = Format(CODEC, RANK, SCALE_SHIFT, CODE_UNIT, DTYPE)
    v_block, first_head, block = split_program(
        tl.program_id(0), FIRST_V_BLOCK, V_BLOCKS, HEAD_BLOCKS, HEADS
    )
    if pieces is None:
        seq, start, first_query = find_queries(
            query_start_loc, block, num_seqs, QUERY_BLOCK, SEARCH
        )
        num_queries = tl.load(query_start_loc + seq + 1) - start
        owned = tl.maximum(0, tl.minimum(num_queries - first_query, QUERY_BLOCK))
        if owned < QUERY_BLOCK:
            padding = first_padding_row(
                query_start_loc, num_seqs, block, start, first_query, num_queries, QUERY_BLOCK
            )
            if padding < end_token:
                live, token, head = locate_padding(
                    padding, owned, end_token, first_head, QUERY_BLOCK, Q_HEADS, QUERIES_PER_KV,
                    ROWS,
                )  # fmt: skip
                out_row = (token - first_token) * NUM_HEADS + head
                if v_block == 0:
                    nothing = tl.full([ROWS], float("-inf"), tl.float32)
                    tl.store(lse + out_row, nothing, mask=live)
                store_zeros(out + out_row * V_WIDTH + v_block * V_BLOCK, live, V_CHUNKS)
        if owned == 0:
            return
    else:
        seq, first_query, tile_from, tile_to = load_piece(pieces, tl.program_id(1), QUERIES_PER_KV)
        if tile_from >= tile_to:
            return
        start, num_queries = query_range(query_start_loc, seq)
    length = tl.load(seq_lens + seq)

    row = tl.arange(0, ROWS)
    rows = locate_rows(
        start, first_query, num_queries, first_head, row, QUERY_BLOCK, Q_HEADS, QUERIES_PER_KV
    )
    first_position = length - num_queries + first_query
    row_position = length - num_queries + rows.query
    component = tl.arange(0, DIM)
    queries = load_queries(
        q, rows, head_columns, component, stride_q_token, stride_q_head, HEAD_DIM, DIM
    )

    end = tl.minimum(length, first_position + QUERY_BLOCK)
    if pieces is None:
        tile_from, tile_to = visible_tiles(first_position, end, TILE, WINDOW)
        # Adds zero, or the compiler spends registers on a loop that it knows to begin at zero.
        tile_from += tl.minimum(start, 0)
    cache = Cache(
        block_table,
        stride_table,
        kv_cache,
        scales,
        stride_block,
        stride_slot,
        stride_scale_block,
        stride_scale_slot,
        key_scales,
        stride_key_block,
        stride_key_slot,
    )
    v_span = locate_span(first_columns, first_codes, first_head * 2 + 1)
    v_start = Start(v_span.column + v_block * (V_BLOCK // 16), v_span.codes)

    offset = tl.arange(0, TILE)
    if RESIDENT:
        factors = load_factors(k_up, first_head, HEADS, K_CHUNKS, DIM, K_WIDTH)
    if LOCAL_ROPE:
        partners = load_queries(
            q, rows, head_columns, component ^ 1, stride_q_token, stride_q_head, HEAD_DIM, DIM
        )
        cos, sin = load_rotation(local_rotation, offset, offset >= 0, DIM, DIM // 2, DIM // 2)

    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc = zero_chunks(V_CHUNKS, ROWS)
    stages: tl.constexpr = STAGES if RESIDENT else 1
    # What is hoisted out of the loop takes registers, too.
    for tile in tl.range(tile_from, tile_to, num_stages=stages, disable_licm=LATE_VALUES):
        base = tile * TILE
        tokens = locate_tokens(cache, seq, base + offset, end, BLOCK_SIZE)
        if not LATE_VALUES:
            values = load_value_chunks(tokens, v_start, V_CHUNKS, FORMAT)

        turned = queries
        if LOCAL_ROPE:
            base_row = rope_table + base.to(tl.int64) * stride_rope
            turned = turn_queries_back(queries, partners, base_row, ROT_HALF)
        elif rope_table is not None:
            position = tokens.position.to(tl.int64)
            cos, sin = load_rotation(
                rope_table, position, tokens.live, stride_rope, ROT_HALF, DIM // 2
            )

        # Adds zero, so that the compiler does not load the bias once, before the loop, and hold it
        # in registers that the kernel has none of to spare.
        each_tile = component + tl.minimum(base, 0)
        scores = tl.zeros([TILE, ROWS], tl.float32)
        for g in tl.static_range(HEADS // GROUP):
            k_start = locate_span(first_columns, first_codes, (first_head + g * GROUP) * 2)
            if RESIDENT:
                latents = load_key_chunks(tokens, k_start, values, K_CHUNKS, FORMAT)
            for j in tl.static_range(g * GROUP, g * GROUP + GROUP):
                keys = tl.zeros([TILE, DIM], tl.float32)
                if k_bias is not None:
                    bias = tl.load(k_bias + (first_head + j) * DIM + each_tile)
                    keys += bias.to(tl.float32)[None, :]
                if RESIDENT:
                    keys = reconstruct_keys(keys, latents, factors[j])
                else:
                    factor = k_up + (first_head + j) * DIM * K_WIDTH
                    keys = reconstruct_streaming(
                        keys, tokens, k_start, factor, DIM, K_WIDTH, K_STREAMS, STAGES, FORMAT
                    )
                if key_scales is not None:
                    keys = scale_keys(keys, tokens, first_head + j, KEY_SCALES)
                if rope_table is not None:
                    keys = rotate_pairs(keys, cos, sin)
                of_head = tl.dot(keys.to(DTYPE), turned, input_precision="ieee")
                if HEADS == 1:
                    scores = of_head
                else:
                    scores = select_head(of_head, scores, j, Q_HEADS, QUERIES_PER_KV)

        scores = mask_scores(scores, tokens, row_position, scale, soft_cap, WINDOW)
        weights, decay, row_max, row_sum = weigh_tokens(scores, row_max, row_sum)
        if LATE_VALUES:
            values = load_value_chunks(tokens, v_start, V_CHUNKS, FORMAT)
        acc = accumulate_values(acc, values, weights.to(DTYPE), decay)

    row_lse = log_sum_exp(row_max, row_sum)
    # Where rows go is found again, from numbers times one, or it is held over the loop, in
    # registers that are full. No batch is empty, which the compiler does not know.
    one = 1 + tl.minimum(num_seqs, 0)
    v_block, first_head, _ = split_program(
        tl.program_id(0) * one, FIRST_V_BLOCK, V_BLOCKS, HEAD_BLOCKS, HEADS
    )
    piece = tl.program_id(1) * one
    if pieces is not None:
        seq, first_query, _, _ = load_piece(pieces, piece, QUERIES_PER_KV)
    start, num_queries = query_range(query_start_loc, seq * one)
    rows = locate_rows(
        start, first_query, num_queries, first_head, row * one, QUERY_BLOCK, Q_HEADS, QUERIES_PER_KV
    )
    if pieces is None:
        out_row = (rows.token - first_token) * NUM_HEADS + rows.head
    else:
        out_row = piece_rows(piece, first_query, rows, NUM_HEADS, QUERY_BLOCK, QUERIES_PER_KV)
    if v_block == 0:
        tl.store(lse + out_row, row_lse, mask=rows.live)
    # As in log_sum_exp: nothing seen gives zero, a NaN stays a NaN.
    inverse_sum = tl.where(row_sum == 0, 0.0, 1 / row_sum)
    out_row = out + out_row * V_WIDTH + v_block * V_BLOCK
    store_output(out_row, rows.live, acc, inverse_sum, V_CHUNKS)
