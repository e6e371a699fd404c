"""Calls of the ops with one argument spoiled, and by which name the error must go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from hypothesis import strategies as st

from recalkv_vllm import ops
from recalkv_vllm.band_format import CacheFormat
from tests.ops.cases import AttentionInputs, attend, caching_layer, value_layer

INT_MAX = 2**31 - 1
#: Of whole batches; a wrong size of one shows as another's.
BATCH_SIZES = ("block_table", "seq_lens", "query_start_loc")
#: Tensors of a call.
CALL = ("q", "kv_cache", *BATCH_SIZES)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OTHER_DTYPES = (torch.float64, torch.int8, torch.int16, torch.bool, torch.complex64)
#: What stands for a name that is spoiled.
Spoiled = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """A call that must raise, with one of ``names`` first, and leave ``written`` as it is."""

    names: tuple[str, ...]
    run: Callable[[], Any]
    written: tuple[torch.Tensor, ...] = ()


def spoiled_form(x: torch.Tensor) -> st.SearchStrategy[torch.Tensor]:
    """The tensor with a dtype, a number of dimensions or a device that no op takes."""
    return st.sampled_from(
        [*(x.to(dtype) for dtype in OTHER_DTYPES), x[None], x.flatten()[:1].sum(), x.to("meta")]
    )


def last_strided(x: torch.Tensor) -> torch.Tensor:
    """The same values, every second of a last dimension twice as long."""
    return torch.stack((x, x), dim=-1).flatten(-2)[..., ::2]


def spoiled_spans(spans: Any) -> st.SearchStrategy[Any]:
    """Spans off the grid, reversed, negative, empty, or of another width."""
    start, end = spans[-1]
    bad = [(start, end - 1), (end, start), (start - 2**20, end - 2**20), (start, start),
           (start + 8, end + 8)]  # fmt: skip
    if len(spans) > 1:
        bad.append((start, end + 16))
    return st.sampled_from([(*spans[:-1], span) for span in bad] + [()])


@st.composite
def illegal_attention(draw: st.DrawFn, inputs: AttentionInputs) -> Call:
    """An attention, legal but for one argument of the call or one constant."""
    constants = {f.name for f in fields(inputs.layer)} - {"is_neox", "latent_format"}
    name = draw(st.sampled_from([*CALL, *sorted(constants)]))
    if name in CALL:
        spoiled = draw(spoiled_call(name, inputs))
        bound, call = ops.bind(inputs.layer), inputs.change(**spoiled).call
        names = BATCH_SIZES if name in BATCH_SIZES else (name,)
        return Call(names, lambda: bound.attend(*call))
    spoiled = draw(spoiled_constant(name, inputs))
    # Head sizes and numbers of groups are read off the up factors.
    names = {
        "head_dim": ("k_up",),
        "k_up": ("k_up", "k_spans", "v_spans", "v_up"),
        "sinks": ("sinks", "q"),
    }.get(name, (name,))
    # What a span needs of the cache shows in the call.
    if name in ("k_spans", "v_spans"):
        names = (name, "kv_cache")

    return Call(names, lambda: attend(inputs.change(**spoiled)))


@st.composite
def spoiled_call(draw: st.DrawFn, name: str, inputs: AttentionInputs) -> Spoiled:
    """One argument of a call, spoiled."""
    x: torch.Tensor = getattr(inputs.batch if name in BATCH_SIZES else inputs, name)
    ways = [spoiled_form(x)]
    match name:
        case "q":
            kv_heads = inputs.layer.num_kv_heads
            ways.append(st.sampled_from([x[..., :-1], x[:, :0]]))
            if len(x):
                ways.append(st.just(last_strided(x)))
            if kv_heads > 1:
                ways.append(st.just(x[:, : x.shape[1] - 1]))
        case "kv_cache":
            ways.append(
                st.sampled_from([x[..., :-1], x[:, :-1], x[:, :0], last_strided(x),
                                 x.transpose(1, 2).contiguous().transpose(1, 2)])
            )  # fmt: skip
        case _:
            ways.append(st.sampled_from([x.long(), x[:-1], torch.cat((x, x))]))
            ways += [st.just(changed) for changed in draw(spoiled_values(name, inputs))]
            if x.shape[-1] > 1:
                ways.append(st.just(last_strided(x)))
    # As often by its values as by its form.
    return {name: draw(draw(st.sampled_from(ways)))}


@st.composite
def spoiled_values(draw: st.DrawFn, name: str, inputs: AttentionInputs) -> list[torch.Tensor]:
    """Index tensors of the right form that would reach foreign memory."""
    batch = inputs.batch
    x, tokens = getattr(batch, name), inputs.q.shape[0]
    blocks, block_size, _ = inputs.kv_cache.shape
    queries = batch.query_start_loc.diff()
    capacity = batch.block_table.shape[1] * block_size
    if (table := inputs.layer.cos_sin_cache) is not None:
        capacity = min(capacity, table.shape[0])
    changed = []

    def put(index: tuple[int, ...], *values: int) -> None:
        changed.append(x.clone())
        changed[-1][index] = draw(st.sampled_from(values))

    if name == "query_start_loc":
        put((-1,), tokens + 1, INT_MAX, -1, -INT_MAX)
        put((0,), -1, -INT_MAX, INT_MAX)
        return changed
    active = [i for i, count in enumerate(queries.tolist()) if count]
    if name == "seq_lens":
        for i in active:
            few = [int(queries[i]) - 1] if queries[i] > 1 else []
            put((i,), capacity + 1, INT_MAX, -1, -INT_MAX, *few)
    if name == "block_table":
        for i in active:
            if used := -(-int(batch.seq_lens[i]) // block_size):
                put((i, draw(st.integers(0, used - 1))), blocks, INT_MAX, -1, -INT_MAX)
    return changed


@st.composite
def spoiled_constant(draw: st.DrawFn, name: str, inputs: AttentionInputs) -> Spoiled:
    """One of a layer's constants, spoiled."""
    layer = inputs.layer
    heads, head_dim = layer.num_kv_heads, layer.head_dim
    nan, inf = float("nan"), float("inf")
    match name:
        case "k_up":
            x = layer.k_up
            way = spoiled_form(x) | st.sampled_from([x[:, :-1], x[:0], x[:, :0], x[..., :-1]])
        case "k_spans":
            way = spoiled_spans(layer.k_spans) | st.just((*layer.k_spans, layer.k_spans[0]))
        case "v_spans":
            way = spoiled_spans(layer.v_spans) | st.just((layer.v_spans[0],) * (heads + 1))
        case "head_dim":
            way = st.sampled_from([0, -16, head_dim - 1, 10**6])
        case "cos_sin_cache":
            x = torch.ones(64, head_dim) if layer.cos_sin_cache is None else layer.cos_sin_cache
            odd = [x[:, :-1], x[:, :0], torch.cat((x, torch.ones(len(x), head_dim)), dim=1)]
            way = spoiled_form(x) | st.sampled_from(odd)
        case "v_up":
            x = layer.v_up
            ways = [x[:, :-1], x[:0], x[..., :-1], torch.cat((x, x))]
            ways += [x.to(dtype) for dtype in DTYPES if dtype != x.dtype]
            way = spoiled_form(x) | st.sampled_from(ways)
        case "k_bias" | "v_bias":
            x = torch.zeros(heads, head_dim)
            way = spoiled_form(x) | st.sampled_from([x[:, :-1], x[:0], torch.cat((x, x))])
        case "k_norm_weight":
            x = torch.ones(head_dim)
            of_heads = torch.ones(heads, head_dim)
            odd = [x[:-1], torch.cat((x, x)), of_heads[:, :-1], torch.cat((of_heads, of_heads))]
            # One head's norm and one over the only head are both legal.
            forms = spoiled_form(x).filter(lambda bad: bad.shape != (heads, head_dim))
            way = forms | st.sampled_from(odd)
        case "sinks":
            x = torch.ones(inputs.q.shape[1])
            way = spoiled_form(x) | st.sampled_from([x[:0], torch.cat((x, x[:1]))])
        case "scale":
            way = st.sampled_from([nan, inf, -inf])
        case "k_norm_eps":
            way = st.sampled_from([nan, -1e-6, -inf])
        case "sliding_window":
            way = st.sampled_from([0, -1, -(2**40)])
        case "soft_cap":
            way = st.sampled_from([0.0, -3.0, nan, inf])
    return {name: draw(way)}


@st.composite
def illegal_cache_update(
    draw: st.DrawFn,
    z: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    latent_format: CacheFormat | None,
) -> Call:
    """A cache update, legal but for one argument."""
    name = draw(st.sampled_from(("z", "kv_cache", "slot_mapping")))
    arguments = {"z": z, "kv_cache": cache, "slot_mapping": slots}
    ways = [spoiled_form(arguments[name])]
    if name == "z":
        ways.append(st.sampled_from([z[:, :-16], torch.cat((z, z), dim=1), last_strided(z)]))
        if latent_format is None:
            ways.append(st.sampled_from([z.to(dtype) for dtype in DTYPES if dtype != z.dtype]))
    elif name == "kv_cache":
        ways.append(st.sampled_from([cache[..., :-1], cache[:, :-1], cache[:, :0]]))
    else:
        longer = torch.cat((slots, slots.new_full((len(z) + 1,), -1)))
        ways.append(st.sampled_from([slots.to(torch.uint8), slots.float(), longer]))
        if len(slots):
            outside = slots.clone()
            where = draw(st.integers(0, len(slots) - 1))
            outside[where] = cache.shape[0] * cache.shape[1] + draw(st.sampled_from((0, 1, 2**30)))
            ways.append(st.just(outside))
        if len(slots) > 1:
            ways.append(st.just(last_strided(slots)))
    spoiled = {name: draw(draw(st.sampled_from(ways)))}
    # The latent's width is told from the cache, and the cache's dtype from the latent.
    names = ("z", "kv_cache") if name == "kv_cache" else (name,)

    def run() -> None:
        ops.bind(caching_layer(latent_format)).update_cache(**arguments | spoiled)

    return Call(names, run, written=(cache,))


@st.composite
def illegal_value_up(draw: st.DrawFn) -> Call:
    """A value product, legal but for one argument or one constant."""
    o_lat, v_up, v_bias = torch.randn(5, 6, 32), torch.randn(3, 48, 32), torch.randn(3, 48)
    layer = value_layer(v_up, v_bias)
    ways = {
        "o_lat": spoiled_form(o_lat)
        | st.sampled_from([o_lat[..., :-1], o_lat[:, :-1], o_lat[:, :0], o_lat[..., :0]]),
        "v_up": spoiled_form(v_up)
        | st.sampled_from([v_up[:0], v_up[:, :0], v_up[:, :-1], v_up[:, :40], v_up[..., :-1],
                           v_up[..., :24], v_up[..., :0]]),
        "v_bias": spoiled_form(v_bias) | st.sampled_from([v_bias[:-1], v_bias[:, :-1]]),
        "out_dtype": st.sampled_from(OTHER_DTYPES),
    }  # fmt: skip
    name = draw(st.sampled_from(tuple(ways)))
    arguments = {"o_lat": o_lat, "v_up": v_up, "v_bias": v_bias, name: draw(ways[name])}
    if name == "v_up" and draw(st.booleans()):
        # With latents of the same, wrong, width.
        width = arguments["v_up"].shape[-1] if arguments["v_up"].dim() else 0
        arguments["o_lat"] = torch.randn(5, 6, width)
    names = ("v_up", "o_lat", "v_bias") if name == "v_up" else (name,)

    def run() -> None:
        spoiled = replace(layer, v_up=arguments["v_up"], v_bias=arguments["v_bias"])
        ops.bind(spoiled).value_up(arguments["o_lat"], arguments.get("out_dtype"))

    return Call(names, run)
