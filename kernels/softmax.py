"""Online softmax over tiles of scores ``[TILE, ROWS]``, float32 and base 2, and its output."""

import triton
import triton.language as tl


@triton.jit
def zeros(SIZE: tl.constexpr, ROWS: tl.constexpr):
    """``[SIZE, ROWS]`` of float32; Triton 3.6 takes no size straight out of a tuple."""
    return tl.zeros([SIZE, ROWS], tl.float32)


@triton.jit
def zero_chunks(V_CHUNKS: tl.constexpr, ROWS: tl.constexpr):
    """Empty accumulators of the output, a tuple of ``[size, ROWS]``."""
    chunks = ()
    for c in tl.static_range(len(V_CHUNKS)):
        chunks = chunks + (zeros(V_CHUNKS[c][1], ROWS),)
    return chunks


@triton.jit
def mask_scores(scores, tokens, row_position, scale, soft_cap, WINDOW: tl.constexpr):
    """Scores in units of log2(e), capped; minus infinity where a row does not see a token."""
    scores *= scale
    if soft_cap is not None:
        # cap · tanh(x / cap); exp overflows to infinity, which gives 1 as it should.
        scores = soft_cap * (1 - 2 / (tl.exp(scores * (2 / soft_cap)) + 1))
    scores *= 1.4426950408889634  # log2(e): exp2 is one instruction
    distance = row_position[None, :] - tokens.position[:, None]
    visible = (distance >= 0) & tokens.live[:, None]
    if WINDOW > 0:
        visible &= distance < WINDOW
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def weigh_tokens(scores, row_max, row_sum):
    """One step of the softmax: ``(weights, decay, row_max, row_sum)``.

    ``weights: [TILE, ROWS]`` belong to this tile, ``decay: [ROWS]`` is what earlier tiles'
    weights shrink by under the new maximum.
    """
    new_max = tl.maximum(row_max, tl.max(scores, axis=0))
    # A row that has seen nothing yet has no maximum to subtract.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - shift[None, :])
    decay = tl.exp2(row_max - shift)
    return weights, decay, new_max, row_sum * decay + tl.sum(weights, axis=0)


@triton.jit
def accumulate_values(acc, values, weights, decay):
    """``acc · decay + valuesᵀ · weights``, chunk by chunk of the V span.

    The output is transposed, ``[size, ROWS]``, so that the span is the M side.
    """
    updated = ()
    for c in tl.static_range(len(values)):
        decayed = acc[c] * decay[None, :]
        updated = updated + (tl.dot(tl.trans(values[c]), weights, decayed, input_precision="ieee"),)
    return updated


@triton.jit
def log_sum_exp(row_max, row_sum):
    """Natural ``lse: [ROWS]`` of scores in units of log2(e); minus infinity where none was seen."""
    # Compared with zero, so that a NaN of the model's own stays a NaN.
    return tl.where(row_sum == 0, float("-inf"), row_max * 0.6931471805599453 + tl.log(row_sum))


@triton.jit
def store_output(out_row, live, acc, inverse_sum, V_CHUNKS: tl.constexpr):
    """Write ``acc · inverse_sum`` from the pointers ``out_row: [ROWS]`` on, for live rows."""
    for c in tl.static_range(len(V_CHUNKS)):
        columns = V_CHUNKS[c][0] + tl.arange(0, acc[c].shape[0])
        target = out_row[None, :] + columns[:, None]
        tl.store(target, acc[c] * inverse_sum[None, :], mask=live[None, :])
