"""Latents of a low-rank peer in codes of its paper."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recalkv_vllm.benchmarks.peers.latents import GroupCodes, code_latents
from recalkv_vllm.cli import main
from recalkv_vllm.evaluation.transformers_engine import load_served, score
from recalkv_vllm.span import Span


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("peers") / "half"
    arguments = ["compress", tiny, "-o", out, "--compression", 0.5, "--method", "svd"]
    assert main([*map(str, arguments)]) == 0
    return out


def test_a_group_has_its_own_steps() -> None:
    codes = GroupCodes((Span(0, 16), Span(16, 48)), bits=4)
    z = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(0))
    z[..., 20] *= 1000
    rounded = codes.round_trip(z)
    step = (z[..., :16].amax(-1) - z[..., :16].amin(-1)) / 15
    error = (rounded - z)[..., :16].abs().amax(-1)
    assert (error <= step / 2 + z[..., :16].abs().amax(-1) * 2**-10).all()
    # Half a byte an element; a float16 scale and offset a group.
    assert codes.token_bytes == 48 / 2 + 2 * 4


def test_codes_cost_more_the_fewer_bits_they_have(checkpoint) -> None:
    windows = [[(7 * i + 3 * j) % 500 + 1 for i in range(40)] for j in range(3)]
    exact = torch.tensor(score(load_served(checkpoint), windows))
    sizes, errors = [], []
    for bits in (12, 8, 3):
        network = load_served(checkpoint)
        sizes.append(code_latents(network, checkpoint, bits))
        errors.append(float((torch.tensor(score(network, windows)) - exact).abs().mean()))
    assert errors[0] < 1e-2
    assert errors[0] < errors[1] < errors[2]
    elements = 2 * 4 * 16 * 2 / 2  # keys and values, heads, elements, layers; half of them
    assert sizes[1] - sizes[2] == pytest.approx(elements * 5 / 8)
