"""Bad arguments: a Python exception that names argument, expected and found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from recalkv_vllm import ops
from recalkv_vllm.latent_format import LatentFormat
from tests.ops.cases import (
    AttentionInputs,
    attend,
    build,
    caching_layer,
    spanned,
    value_layer,
)

CASE = spanned("valid", (4, 2, 64), 1, 32, 2, 32, batch=((1, 37), (2, 20)))


@pytest.fixture
def inputs() -> AttentionInputs:
    return build(CASE, torch.float32)


def argument(inputs: AttentionInputs, name: str) -> Any:
    """An argument of the call, or a constant of the layer, by name."""
    parts = (inputs.layer, inputs.batch, inputs)
    return next(getattr(part, name) for part in parts if hasattr(part, name))


def attempt(inputs: AttentionInputs, **changes: Any) -> None:
    attend(inputs.change(**changes))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda x: x.double(), "q: expected dtype float32, found float64"),
        ("q", lambda x: x.bfloat16(), "q: expected dtype float32, found bfloat16"),
        ("q", lambda x: x[0], "q: expected shape|k_up: expected"),
        ("q", lambda x: x[:, :3], "q: expected a multiple of 2 heads, found 3"),
        ("q", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), "q: .*strides"),
        ("kv_cache", lambda x: x.half(), "kv_cache: expected dtype float32, found float16"),
        ("kv_cache", lambda x: x.int(), "kv_cache: expected dtype .*, found int32"),
        ("kv_cache", lambda x: x[..., :40], r"kv_cache: expected a rank .* multiple of 16.* 40"),
        ("kv_cache", lambda x: x[..., :112], "kv_cache: expected a rank of 128 or more.*112"),
        ("kv_cache", lambda x: x[:, :8], "kv_cache: expected a block_size .* 16, found 8"),
        ("kv_cache", lambda x: x[0], r"kv_cache: expected shape \[num_blocks, block_size, rank\]"),
        (
            "kv_cache",
            lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
            "kv_cache: expected a contiguous last dimension, found strides",
        ),
        ("block_table", lambda x: x.long(), "block_table: expected dtype int32, found int64"),
        ("block_table", lambda x: x[0], "block_table: expected shape"),
        ("block_table", lambda x: x.T.contiguous().T, "block_table: .* found strides"),
        ("seq_lens", lambda x: x[:1], r"seq_lens: expected shape \[2\], found \[1\]"),
        ("seq_lens", lambda x: x.long(), "seq_lens: expected dtype int32"),
        ("query_start_loc", lambda x: x[:2], r"query_start_loc: expected shape \[3\], found \[2\]"),
        ("query_start_loc", lambda x: x.float(), "query_start_loc: expected dtype int32"),
        ("k_up", lambda x: x[0], r"k_up: expected shape \[G_k, s·d, width\]"),
        ("k_up", lambda x: x.double(), "k_up: expected dtype .* found float64"),
        ("k_up", lambda x: x[:, :60], "k_up: expected a multiple of head_dim = 64 rows .* 60"),
        ("k_spans", lambda x: x[:1], "k_spans: expected 2 spans, as k_up, found 1"),
        ("k_spans", lambda x: [(0, 32), (40, 72)], r"k_spans\[1\]: .*multiples of 16.*40, 72"),
        ("k_spans", lambda x: [(0, 32), (32, 80)], r"k_spans\[1\]: expected a span 32 wide"),
        ("k_spans", lambda x: [(0, 32), (112, 144)], "kv_cache: expected a rank of 144 or more"),
        ("k_spans", lambda x: [(0, 32), (-32, 0)], r"k_spans\[1\]: expected start and end"),
        ("v_spans", lambda x: [], "v_spans: expected a number of spans that divides 2 KV heads"),
        ("v_spans", lambda x: [(0, 16)] * 3, "v_spans: .* divides 2 KV heads, found 3"),
        ("v_spans", lambda x: [(0, 16), (16, 48)], r"v_spans\[1\]: expected a span 16 wide"),
        ("v_up", lambda x: x[:, :32], r"v_up: expected shape \[2, 64, 32\], found \[2, 32, 32\]"),
        ("v_up", lambda x: x.half(), "v_up: expected dtype float32, found float16"),
        ("v_up", lambda x: x.to("meta"), "v_up: expected device cpu, found meta"),
        ("v_bias", lambda x: torch.zeros(2, 32), r"v_bias: expected shape \[2, 64\]"),
        ("cos_sin_cache", lambda x: x[0], "cos_sin_cache: expected shape"),
        ("cos_sin_cache", lambda x: x[:, :63], "cos_sin_cache: expected an even rot_dim"),
        ("cos_sin_cache", lambda x: x.repeat(1, 2), "cos_sin_cache: .* at most head_dim = 64"),
        ("cos_sin_cache", lambda x: x.double(), "cos_sin_cache: expected dtype"),
        ("k_bias", lambda x: torch.zeros(2, 32), r"k_bias: expected shape \[2, 64\]"),
        ("k_norm_weight", lambda x: torch.ones(32), r"k_norm_weight: expected shape \[64\]"),
        ("sinks", lambda x: torch.zeros(1, 4), r"sinks: expected shape \[h_q\], found \[1, 4\]"),
        ("sinks", lambda x: torch.zeros(4).double(), "sinks: expected dtype"),
        ("sinks", lambda x: torch.zeros(3), "sinks: expected a multiple of 2 heads, found 3"),
        ("sinks", lambda x: torch.zeros(6), "q: expected 6 heads, as sinks, found 4"),
        ("scale", lambda x: float("nan"), "scale: expected a finite number, found nan"),
        ("sliding_window", lambda x: 0, "sliding_window: expected a positive number"),
        ("soft_cap", lambda x: -1.0, "soft_cap: expected a positive number"),
    ],
)
def test_attention(inputs: AttentionInputs, name: str, change: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        attempt(inputs, **{name: change(argument(inputs, name))})


INT4 = LatentFormat("int4", 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.to(torch.int8), "kv_cache: expected dtype uint8, found int8"),
        (lambda x: x[..., :71], r"kv_cache: expected contiguous blocks, found strides"),
        (
            lambda x: x[..., :71].contiguous(),
            r"kv_cache: expected the slot bytes of a rank in .*int4.*, found 71",
        ),
        (lambda x: x[..., :54].contiguous(), "kv_cache: expected a rank of 128 or more.*96"),
        (
            lambda x: x.view(-1)[24:-1128].view(-1, 16, 72),
            "kv_cache: expected blocks at multiples of 16 bytes, found offset 24",
        ),
        (lambda x: x[0], r"kv_cache: expected shape \[num_blocks, block_size, slot_bytes\]"),
        (lambda x: x[:, :8], "kv_cache: expected a block_size .* 16, found 8"),
    ],
)
def test_quantized_cache(change: Any, message: str) -> None:
    inputs = build(replace(CASE, latent_format=INT4), torch.float32)
    assert inputs.kv_cache.shape[2] == 72
    attempt(inputs)
    with pytest.raises((TypeError, ValueError), match=message):
        attempt(inputs, kv_cache=change(inputs.kv_cache))


def test_quantized_cache_update() -> None:
    cache = torch.zeros(2, 16, INT4.slot_bytes(32), dtype=torch.uint8)
    slots = torch.tensor([0, 1])
    quantized, plain = ops.bind(caching_layer(INT4)), ops.bind(caching_layer())
    with pytest.raises(ValueError, match=r"z: expected shape \[tokens, 32\], found \[2, 16\]"):
        quantized.update_cache(torch.ones(2, 16), cache, slots)
    with pytest.raises(TypeError, match=r"z: expected dtype float32 or .*, found float64"):
        quantized.update_cache(torch.ones(2, 32).double(), cache, slots)
    with pytest.raises(TypeError, match=r"kv_cache: expected dtype uint8, found float32"):
        quantized.update_cache(torch.ones(2, 32), cache.float(), slots)
    with pytest.raises(TypeError, match=r"kv_cache: expected dtype float32 or .*, found uint8"):
        plain.update_cache(torch.ones(2, 32), cache, slots)
    assert not cache.any()


@pytest.mark.parametrize("name", ["q", "kv_cache", "block_table", "seq_lens", "query_start_loc"])
def test_device(inputs: AttentionInputs, name: str) -> None:
    elsewhere = argument(inputs, name).to("meta")
    with pytest.raises(ValueError, match=f"{name}: expected device cpu, found meta"):
        attempt(inputs, **{name: elsewhere})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: x[1:], ValueError, r"out: expected q's shape \(3, 4, 64\), found \(2, 4, 64\)"),
        (lambda x: x.double(), TypeError, "out: expected dtype float32, found float64"),
        (lambda x: x.to("meta"), ValueError, "out: expected device cpu, found meta"),
        (lambda x: x.mT.contiguous().mT, ValueError, "out: expected a contiguous last dimension"),
    ],
)
def test_where_heads_go(
    inputs: AttentionInputs, change: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ops.bind(inputs.layer).attend_heads(*inputs.call, out=change(torch.zeros_like(inputs.q)))


def test_heads_are_written_where_they_shall_be(inputs: AttentionInputs) -> None:
    bound = ops.bind(inputs.layer)
    wide = torch.full((3, 6, 64), torch.nan)
    assert torch.equal(
        bound.attend_heads(*inputs.call, out=wide[:, 1:5]), bound.attend_heads(*inputs.call)
    )
    assert wide[:, (0, 5)].isnan().all()


def test_head_size(inputs: AttentionInputs) -> None:
    up = torch.randn(2, 40, 32)
    with pytest.raises(ops.KernelUnavailableError, match="multiples of 16 up to 256, found 40"):
        attempt(inputs, cos_sin_cache=None, head_dim=40, k_up=up, v_up=up)


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_debug_mode_checks_values(
    inputs: AttentionInputs, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECALKV_DEBUG", "1")
    monkeypatch.setenv("RECALKV_KERNEL", kernel)
    attempt(inputs)
    table = inputs.batch.block_table.clone()
    table[1, 1] = inputs.kv_cache.shape[0]
    with pytest.raises(ValueError, match=r"block_table\[1, 1\]: expected a block of kv_cache"):
        attempt(inputs, block_table=table)
    with pytest.raises(ValueError, match=r"seq_lens\[1\]: expected 2 .*, found 1"):
        attempt(inputs, seq_lens=torch.tensor([37, 1], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"slot_mapping: expected slots below 32, found 32"):
        ops.bind(caching_layer()).update_cache(
            torch.ones(1, 16), torch.zeros(2, 16, 16), torch.tensor([32], dtype=torch.int64)
        )


@pytest.mark.parametrize(
    ("z", "slots", "message"),
    [
        (torch.ones(2, 16), [0, 1], r"z: expected shape \[tokens, 32\], found \[2, 16\]"),
        (torch.ones(2, 32).half(), [0, 1], "z: expected dtype float32, found float16"),
        (torch.ones(2, 32), [0, 1, 2], "slot_mapping: expected at most 2 slots, as z, found 3"),
        (torch.ones(2, 32), [0.0, 1.0], "slot_mapping: expected dtype int64 or int32"),
        (torch.ones(32, 2).T, [0, 1], "z: expected a contiguous last dimension"),
    ],
)
def test_cache_update(z: torch.Tensor, slots: list, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        ops.bind(caching_layer()).update_cache(z, torch.zeros(2, 16, 32), torch.tensor(slots))


@pytest.mark.parametrize(
    ("o_lat", "bias", "message"),
    [
        (torch.ones(2, 4, 32), None, r"o_lat: expected shape \[tokens, h_q, 16\]"),
        (torch.ones(2, 3, 16), None, "o_lat: expected a multiple of 2 heads, found 3"),
        (torch.ones(2, 4, 16), torch.ones(2, 4), r"v_bias: expected shape \[2, 32\]"),
    ],
)
def test_value_up(o_lat: torch.Tensor, bias: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.bind(value_layer(torch.ones(2, 32, 16), bias)).value_up(o_lat)
