"""Attention over a paged cache of latents: reconstruct, rotate, score and accumulate on chip.

Roofline. Per cached token and KV head a program reads its K span (``w_k`` numbers, shared by the
heads of a group) and its V span (``w_v``), and does ``2·w_k·d`` FLOP to rebuild the key plus
``2·(d + w_v)`` per query row. At ``w_k = w_v = 64``, ``d = 128`` and bf16 that is 64 FLOP per byte,
far left of an H100's ridge (295): decode is bound by memory, if nothing else is moved per tile.

Data movement. One program owns (a block of queries, ``HEADS`` KV heads of one V group, a split of
the cached tokens) and walks over tiles of ``TILE`` tokens:

* latents: block table → slots → asynchronous copies into shared memory, several tiles ahead. The
  columns are cut into power-of-two chunks; a chunk that K and V both read is loaded once.
* ``k_up``: loaded once and kept in shared memory; where it does not fit, an inner loop streams it
  and the K columns from L2, ``STREAM`` columns at a time (such spans are bound by arithmetic).
* RoPE: ``LOCAL_ROPE`` turns the queries back by the tile's first position and keys by their offset
  in the tile, whose table stays in registers; otherwise cosines and sines are read per token.
  Either way the two members of a rotated pair are neighbours (the factor's rows are permuted
  once), so that a rotation stays within a thread's registers, neox and interleaved alike.
* scores ``[TILE, ROWS]``: keys go from accumulator to operand registers without shared memory.
  The score columns of other heads' rows are computed and dropped, which is cheaper than gathering.
* output ``[w_v, ROWS]``: transposed, so that the span is the M side.

No value on the device is read by the host; the grid depends on shapes alone.
"""

import triton
import triton.language as tl

from recalkv_vllm.kernels.tiles import (
    find_sequence,
    load_factor,
    load_latents,
    load_rotation,
    rotate_pairs,
    zeros,
)


@triton.jit(
    do_not_specialize=["num_seqs", "num_splits", "first_token", "stride_lse_split"],
    do_not_specialize_on_alignment=["block_table", "seq_lens", "query_start_loc", "lse"],
)
def latent_attention(
    q,
    kv_cache,
    scales,
    block_table,
    seq_lens,
    query_start_loc,
    k_up,
    k_bias,
    k_norm_weight,
    first_columns,
    head_columns,
    rope_table,
    local_rotation,
    out,
    lse,
    num_seqs,
    num_splits,
    first_token,
    stride_q_token,
    stride_q_head,
    stride_block,
    stride_slot,
    stride_scale_block,
    stride_scale_slot,
    stride_table,
    stride_rope,
    stride_out_split,
    stride_lse_split,
    scale,
    soft_cap,
    norm_eps,
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
    K_CHUNKS: tl.constexpr,
    V_CHUNKS: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CODEC: tl.constexpr,
    RANK: tl.constexpr,
    SCALE_SHIFT: tl.constexpr,
    WINDOW: tl.constexpr,
    LOCAL_ROPE: tl.constexpr,
    SEARCH: tl.constexpr,
    STREAM: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write normalised ``o_lat`` and natural ``lse`` of one split, float32.

    ``HEADS`` KV heads per program, in K groups of ``GROUP``; ``DIM`` is ``HEAD_DIM`` padded.
    ``K_CHUNKS`` holds ``(offset, size, index of the V chunk with the same columns or -1)``,
    ``V_CHUNKS`` ``(offset, size)``. With a ``CODEC``, ``kv_cache`` and ``scales`` are the parts of
    a quantised cache of latents of ``RANK`` numbers.
    ``SEARCH`` maps programs to query blocks of any batch; without it sequence ``i`` is program
    ``i`` and has at most ``QUERY_BLOCK`` queries. ``out`` and ``lse`` start at row ``first_token``.
    """
    RESIDENT: tl.constexpr = STREAM == 0
    Q_HEADS: tl.constexpr = HEADS * QUERIES_PER_KV
    HEAD_BLOCKS: tl.constexpr = NUM_HEADS // Q_HEADS
    V_BLOCKS: tl.constexpr = V_WIDTH // V_BLOCK
    # Programs that read the same latents are neighbours, so that all but one hit L2.
    program = tl.program_id(0)
    v_block = program % V_BLOCKS
    first_head = program // V_BLOCKS % HEAD_BLOCKS * HEADS
    block = program // (V_BLOCKS * HEAD_BLOCKS)
    split = tl.program_id(1)
    if SEARCH:
        block += tl.load(query_start_loc) // QUERY_BLOCK
        seq = find_sequence(query_start_loc, block, num_seqs, QUERY_BLOCK)
        start = tl.load(query_start_loc + seq)
        first_query = (block - start // QUERY_BLOCK - seq) * QUERY_BLOCK
    else:
        seq = block
        start = tl.load(query_start_loc + seq)
        first_query = 0
    num_queries = tl.load(query_start_loc + seq + 1) - start
    if first_query >= num_queries:
        return
    length = tl.load(seq_lens + seq)

    row = tl.arange(0, ROWS)
    query = first_query + row // Q_HEADS
    row_live = (row < QUERY_BLOCK * Q_HEADS) & (query < num_queries)
    token = (start + query).to(tl.int64)
    head = first_head * QUERIES_PER_KV + row % Q_HEADS
    first_position = length - num_queries + first_query
    row_position = length - num_queries + query
    component = tl.arange(0, DIM)
    q_row = q + token * stride_q_token + head * stride_q_head
    q_live = row_live[None, :] & (component < HEAD_DIM)[:, None]
    columns = tl.load(head_columns + component)
    query_rows = tl.load(q_row[None, :] + columns[:, None], mask=q_live, other=0.0)

    # This split's share of the tiles that any row can see.
    end = tl.minimum(length, first_position + QUERY_BLOCK)
    last_tile = tl.cdiv(end, TILE)
    first_tile = 0
    if WINDOW > 0:
        first_tile = tl.maximum(first_position - (WINDOW - 1), 0) // TILE
    share = tl.cdiv(last_tile - first_tile, num_splits)
    tile_from = first_tile + split * share
    tile_to = tl.minimum(tile_from + share, last_tile)

    v_first = tl.load(first_columns + first_head * 2 + 1) + v_block * (V_BLOCK // 16)
    offset = tl.arange(0, TILE)
    if RESIDENT:
        factors = ()
        for j in tl.static_range(HEADS):
            factor = k_up + (first_head + j) * DIM * K_WIDTH
            for c in tl.static_range(len(K_CHUNKS)):
                factors = factors + (
                    load_factor(factor, K_CHUNKS[c][0], K_CHUNKS[c][1], DIM, K_WIDTH),
                )
    if LOCAL_ROPE:
        partner = tl.load(head_columns + (component ^ 1))
        partner_rows = tl.load(q_row[None, :] + partner[:, None], mask=q_live, other=0.0)
        cos, sin = load_rotation(local_rotation, offset, offset >= 0, DIM, DIM // 2, DIM // 2)

    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc = ()
    for c in tl.static_range(len(V_CHUNKS)):
        acc = acc + (zeros(V_CHUNKS[c][1], ROWS),)

    for tile in tl.range(tile_from, tile_to, num_stages=STAGES if RESIDENT else 1):
        base = tile * TILE
        position = base + offset
        live = position < end
        page = block_table + seq.to(tl.int64) * stride_table + position // BLOCK_SIZE
        page = tl.load(page, mask=live, other=0).to(tl.int64)
        token_rows = kv_cache + page * stride_block + (position % BLOCK_SIZE) * stride_slot
        scale_rows = scales
        if CODEC is not None:
            offset_in_page = (position % BLOCK_SIZE) * stride_scale_slot
            scale_rows = scales + page * stride_scale_block + offset_in_page
        values = ()
        for c in tl.static_range(len(V_CHUNKS)):
            values = values + (
                load_latents(
                    token_rows,
                    scale_rows,
                    live,
                    v_first,
                    0,
                    V_CHUNKS[c][0],
                    V_CHUNKS[c][1],
                    CODEC,
                    RANK,
                    SCALE_SHIFT,
                    q.dtype.element_ty,
                ),
            )

        turned = query_rows
        if LOCAL_ROPE:
            base_row = rope_table + base.to(tl.int64) * stride_rope + component // 2
            rotated = component < 2 * ROT_HALF
            base_cos = tl.load(base_row, mask=rotated, other=1.0).to(tl.float32)
            base_sin = tl.load(base_row + ROT_HALF, mask=rotated, other=0.0).to(tl.float32)
            base_sin = tl.where(component % 2 == 0, base_sin, -base_sin)
            turned = query_rows * base_cos[:, None] + partner_rows * base_sin[:, None]
            turned = turned.to(q.dtype.element_ty)
        elif rope_table is not None:
            cos, sin = load_rotation(
                rope_table, position.to(tl.int64), live, stride_rope, ROT_HALF, DIM // 2
            )

        # Adds zero, so that the compiler does not load bias and norm weight once, before the loop,
        # and hold them in registers that the kernel has none of to spare.
        each_tile = component + tl.minimum(base, 0)
        scores = tl.zeros([TILE, ROWS], tl.float32)
        for g in tl.static_range(HEADS // GROUP):
            k_first = tl.load(first_columns + (first_head + g * GROUP) * 2)
            latents = ()
            if RESIDENT:
                for c in tl.static_range(len(K_CHUNKS)):
                    if K_CHUNKS[c][2] >= 0:
                        latents = latents + (values[K_CHUNKS[c][2]],)
                    else:
                        latents = latents + (
                            load_latents(
                                token_rows,
                                scale_rows,
                                live,
                                k_first,
                                0,
                                K_CHUNKS[c][0],
                                K_CHUNKS[c][1],
                                CODEC,
                                RANK,
                                SCALE_SHIFT,
                                q.dtype.element_ty,
                            ),
                        )
            for j in tl.static_range(g * GROUP, g * GROUP + GROUP):
                keys = tl.zeros([TILE, DIM], tl.float32)
                if k_bias is not None:
                    bias = tl.load(k_bias + (first_head + j) * DIM + each_tile)
                    keys += bias.to(tl.float32)[None, :]
                if RESIDENT:
                    for c in tl.static_range(len(K_CHUNKS)):
                        up = factors[j * len(K_CHUNKS) + c]
                        keys = tl.dot(latents[c], up, keys, input_precision="ieee")
                else:
                    factor = k_up + (first_head + j) * DIM * K_WIDTH
                    for first in tl.range(0, K_WIDTH, STREAM, num_stages=STAGES):
                        z = load_latents(
                            token_rows,
                            scale_rows,
                            live,
                            k_first,
                            first,
                            0,
                            STREAM,
                            CODEC,
                            RANK,
                            SCALE_SHIFT,
                            q.dtype.element_ty,
                        )
                        up = load_factor(factor + first, 0, STREAM, DIM, K_WIDTH)
                        keys = tl.dot(z, up, keys, input_precision="ieee")
                if k_norm_weight is not None:
                    inverse = tl.rsqrt(tl.sum(keys * keys, axis=1) / HEAD_DIM + norm_eps)
                    weight = tl.load(k_norm_weight + each_tile).to(tl.float32)
                    keys *= inverse[:, None] * weight[None, :]
                if rope_table is not None:
                    keys = rotate_pairs(keys, cos, sin, TILE, DIM)
                of_head = tl.dot(keys.to(q.dtype.element_ty), turned, input_precision="ieee")
                mine = row % Q_HEADS // QUERIES_PER_KV == j
                scores = of_head if HEADS == 1 else tl.where(mine[None, :], of_head, scores)

        scores *= scale
        if soft_cap is not None:
            # cap · tanh(x / cap); exp overflows to infinity, which gives 1 as it should.
            scores = soft_cap * (1 - 2 / (tl.exp(scores * (2 / soft_cap)) + 1))
        scores *= 1.4426950408889634  # log2(e): exp2 is one instruction
        distance = row_position[None, :] - position[:, None]
        visible = (distance >= 0) & live[:, None]
        if WINDOW > 0:
            visible &= distance < WINDOW
        scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=0))
        # A row that has seen nothing yet has no maximum to subtract.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - shift[None, :])
        decay = tl.exp2(row_max - shift)
        row_sum = row_sum * decay + tl.sum(weights, axis=0)
        row_max = new_max
        weights = weights.to(q.dtype.element_ty)
        decayed = ()
        for c in tl.static_range(len(V_CHUNKS)):
            rescaled = acc[c] * decay[None, :]
            decayed = decayed + (
                tl.dot(tl.trans(values[c]), weights, rescaled, input_precision="ieee"),
            )
        acc = decayed

    # Compared with zero, so that a NaN of the model's own stays a NaN.
    unseen = row_sum == 0
    row_lse = tl.where(unseen, float("-inf"), row_max * 0.6931471805599453 + tl.log(row_sum))
    split = split.to(tl.int64)
    out_row = (token - first_token) * NUM_HEADS + head
    if v_block == 0:
        tl.store(lse + split * stride_lse_split + out_row, row_lse, mask=row_live)
    if num_splits > 1 and tile_from >= tile_to:
        return  # the merge skips a split whose log-sum-exp is minus infinity
    inverse_sum = tl.where(unseen, 0.0, 1 / row_sum)
    out_row = out + split * stride_out_split + out_row * V_WIDTH + v_block * V_BLOCK
    for c in tl.static_range(len(V_CHUNKS)):
        columns = V_CHUNKS[c][0] + tl.arange(0, V_CHUNKS[c][1])
        tl.store(
            out_row[None, :] + columns[:, None],
            acc[c] * inverse_sum[None, :],
            mask=row_live[None, :],
        )
