"""The C++ object that holds a layer's constants: what it refuses, and who may use it when."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from recalkv_vllm.ops.cpu.attention import CpuLayer
from recalkv_vllm.ops.cpu.plan import instruction_set
from tests.ops.cases import build, spanned

HEADS, HEAD_DIM, K_WIDTH = 2, 64, 32


def make(**changes: object) -> torch.ScriptObject:
    """A layer in float32, but for ``changes``, by the names of the parts' arguments."""
    given: dict[str, object] = {
        "isa": instruction_set(torch.float32),
        "factors": torch.zeros(HEADS, HEAD_DIM, K_WIDTH),
        "bias": None,
        "scales": 0,
        "pair_factors": torch.zeros(HEADS, HEAD_DIM, K_WIDTH, 1),
        "expansions": [],
        "k_starts": [0, 32],
        "v_up": torch.zeros(HEADS, HEAD_DIM, 48),
        "v_bias": None,
        "panel": None,
        "tiles": torch.zeros(2, 2, HEAD_DIM // 2, 64),
        "max_position": 100,
        "latent_dtype": "",
        "group_size": 0,
        "bands": None,
    }
    assert changes.keys() <= given.keys()
    given |= changes
    classes = torch.classes.recalkv_cpu
    return classes.AttentionLayer(
        isa=given["isa"],
        keys=classes.Keys(
            factors=given["factors"],
            bias=given["bias"],
            scales=given["scales"],
            pair_factors=given["pair_factors"],
        ),
        spans=classes.Spans(k_starts=given["k_starts"], v_starts=[64], v_width=48),
        values=classes.Values(factors=given["v_up"], bias=given["v_bias"], panel=given["panel"]),
        rotation=classes.Rotation(
            tiles=given["tiles"], max_position=given["max_position"], is_neox=True
        ),
        expansions=given["expansions"],
        logits=classes.Logits(scale=1.0, soft_cap=0.0, window=0, sinks=None),
        latent_dtype=given["latent_dtype"],
        group_size=given["group_size"],
        bands=given["bands"],
    )


def expanded(**changes: object) -> dict[str, object]:
    """Arguments of a layer whose last 12 pairs are expanded, but for ``changes`` of how."""
    given: dict[str, object] = {
        "tile_pairs": 5,
        "stretch_pairs": 7,
        "basis": torch.zeros(8, 64),
        "tile_coefficients": torch.zeros(2, 8, 2, 16),
        "stretch_coefficients": torch.zeros(1, 4, 2, 16),
        "stretch_basis": torch.zeros(8, 4, 8),
    }
    assert changes.keys() <= given.keys()
    return {"expansions": [torch.classes.recalkv_cpu.PairExpansion(**given | changes)]}


def bands(rows: list[list[float]]) -> dict[str, object]:
    """Arguments of a layer of latents in bands."""
    return {"latent_dtype": "bands", "group_size": 32, "bands": torch.tensor(rows)}


def test_parts_that_fit() -> None:
    assert make().v_width() == 48
    assert make(**expanded()).v_width() == 48


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"isa": "mmx"}, "isa: expected one that this processor supports, found mmx"),
        ({"factors": torch.zeros(2, 64)}, "factors: expected 3 dimensions"),
        ({"factors": torch.zeros(2, 60, 32)}, "factors: .* multiples of 16"),
        ({"factors": torch.zeros(2, 64, 32).half()}, "factors: expected contiguous Float"),
        ({"factors": torch.zeros(2, 32, 64).mT}, "factors: expected contiguous Float"),
        ({"bias": torch.zeros(2, 32)}, r"bias: .* \[2, 64\].*\[2, 32\]"),
        ({"scales": 3}, r"scales: expected 0, 1 or 2 \(KV heads\), found 3"),
        ({"v_up": torch.zeros(2, 64, 32)}, r"v_up: .* \[2, 64, 48\]"),
        ({"v_bias": torch.zeros(64)}, r"v_bias: .* \[2, 64\]"),
        ({"panel": torch.zeros(2, 64, 48)}, r"panel: .* \[2, 48, 64, 1\]"),
        ({"k_starts": [0, 32, 64]}, "k_starts, v_starts: .* divide 2 KV heads, found 3 and 1"),
        ({"tiles": torch.zeros(2, 2, 48, 64)}, "tiles: expected at most 32 pairs, found 48"),
        ({"tiles": torch.zeros(2, 2, 32, 32)}, "tiles: expected contiguous Float"),
        ({"max_position": 129}, "max_position: expected at most 128"),
        ({"pair_factors": torch.zeros(2, 64, 32)}, r"pair_factors: .* \[2, 64, 32, 1\]"),
        (expanded() | {"pair_factors": None}, "expansions: expected pair_factors and a rotation"),
        (expanded(tile_pairs=26), "expansions: expected up to 32 pairs, found 26 and 7"),
        (expanded(basis=torch.zeros(64)), "basis: expected 2 dimensions"),
        (expanded(basis=torch.zeros(6, 64)), "basis: expected a multiple of 4 functions, found 6"),
        (expanded(basis=torch.zeros(4, 64)), r"tile_coefficients: .* \[2, 4, 2, 16\]"),
        (
            expanded(stretch_coefficients=torch.zeros(2, 4, 2, 16)),
            r"stretch_coefficients: .* \[1, 4, 2, 16\]",
        ),
        (expanded(stretch_basis=torch.zeros(4, 8)), r"stretch_basis: .* \[8, 4, 8\]"),
        ({"expansions": 3 * expanded()["expansions"]}, "expansions: expected at most 2, found 3"),
        ({"latent_dtype": "int5"}, "latent_dtype: expected int8"),
        ({"latent_dtype": "bands"}, "bands: expected some with latent_dtype bands"),
        ({"bands": torch.tensor([[32, 4]])}, "bands: expected none"),
        (bands([[32, 4]]) | {"group_size": 64}, "group_size: expected 32 with bands"),
        (bands([]), r"bands: expected contiguous Long .* \[bands, 2\]"),
        (bands([[32, 4, 3]]), r"bands: .* \[bands, 2\], found Long on cpu, of shape \[1, 3\]"),
        (bands([[32.0, 4]]), "bands: expected contiguous Long .* found Float"),
        (bands([[32, 4], [48, 4]]), "bands: expected multiples of 32 columns, found 48"),
        (bands([[32, 4], [32, 5]]), "bands: expected 2, 3, 4, 6 or 8 bits, found 5"),
    ],
)
def test_parts_that_do_not_fit(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_it_keeps_what_it_points_to_and_serves_any_thread() -> None:
    case = spanned("shared", (4, 2, 64), 1, 32, 2, 32, batch=((1, 300), (3, 90)), key_bias=True)
    inputs = build(case, torch.bfloat16)
    expected = CpuLayer(inputs.layer).attend(*inputs.call)
    layer, call = CpuLayer(inputs.layer), inputs.call
    del inputs
    gc.collect()
    [torch.full((1 << 12,), torch.nan) for _ in range(50)]
    with ThreadPoolExecutor(4) as pool:
        results = [pool.submit(layer.attend, *call) for _ in range(40)]
        for result in results:
            for found, wanted in zip(result.result(), expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
