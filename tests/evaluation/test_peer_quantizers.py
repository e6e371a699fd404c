"""Peers' rounding and bytes against what their papers and vLLM say of them."""

from __future__ import annotations

import itertools

import pytest
import torch

from recalkv_vllm.benchmarks.peers.hadamard import hadamard, random_rotation
from recalkv_vllm.benchmarks.peers.kivi import Kivi
from recalkv_vllm.benchmarks.peers.kvtc import KvtcLike, allocate
from recalkv_vllm.benchmarks.peers.lloyd_max import (
    POINTS,
    gaussian_distortion,
    gaussian_levels,
    sphere_levels,
)
from recalkv_vllm.benchmarks.peers.oscar import Oscar
from recalkv_vllm.benchmarks.peers.peer import Peer
from recalkv_vllm.benchmarks.peers.quarot import QuaRot
from recalkv_vllm.benchmarks.peers.turboquant import TurboQuant
from recalkv_vllm.benchmarks.peers.uniform import affine
from recalkv_vllm.benchmarks.peers.vllm_formats import Fp8, Int4PerTokenHead, Int8PerTokenHead
from recalkv_vllm.benchmarks.peers.vllm_turboquant import PRESETS, VllmTurboQuant
from recalkv_vllm.checkpoint import AttentionGeometry
from recalkv_vllm.compression.errors import InputError

LONG = 10**9


def geometry(head_dim: int = 64, layers: int = 6, kv_heads: int = 2) -> AttentionGeometry:
    return AttentionGeometry(layers, 4 * kv_heads * head_dim, 4 * kv_heads, kv_heads, head_dim)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def bits(peer: Peer, context: int = LONG) -> float:
    """Stored bits per element of keys and values."""
    elements = peer.geometry.dense_width * peer.geometry.num_layers
    return 8 * peer.bytes_per_token(context) / elements


def relative_error(rounded: torch.Tensor, x: torch.Tensor) -> float:
    return ((rounded - x).square().sum() / x.square().sum()).item()


@pytest.mark.parametrize(
    ("count", "distortion"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)]
)
def test_lloyd_max_of_a_normal_density(count: int, distortion: float) -> None:
    """Max (1960), table I."""
    assert gaussian_distortion(count) == pytest.approx(distortion, rel=1e-3)
    levels = gaussian_levels(count)
    assert torch.allclose(levels, -levels.flip(0), atol=1e-3)


def test_lloyd_max_of_many_levels() -> None:
    """Panter and Dite (1951): the distortion of many levels."""
    for count, rel in ((6, 0.04), (8, 0.02)):
        expected = 3**0.5 * torch.pi / 2 * 4.0**-count
        assert gaussian_distortion(count) == pytest.approx(expected, rel=rel)


def test_lloyd_max_without_bits_is_the_mean() -> None:
    assert gaussian_levels(0).item() == pytest.approx(0, abs=1e-6)
    assert gaussian_distortion(0) == pytest.approx(1, rel=1e-6)


def test_a_coordinate_of_a_long_unit_vector_is_normal() -> None:
    expected = gaussian_levels(2) / 1024**0.5
    assert torch.allclose(sphere_levels(1024, 2), expected, rtol=5e-3)


@pytest.mark.parametrize("size", [1, 2, 16, 128])
def test_hadamard_is_orthogonal_and_spreads(size: int) -> None:
    matrix = hadamard(size)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size), atol=1e-6)
    assert torch.allclose(matrix.abs(), torch.full((size, size), size**-0.5))


def test_hadamard_of_no_power_of_two() -> None:
    with pytest.raises(InputError, match="power of two for a Hadamard matrix, found 96"):
        hadamard(96)


def test_random_rotation_is_orthogonal() -> None:
    matrix = random_rotation(48, torch.Generator().manual_seed(1))
    assert torch.allclose(matrix @ matrix.T, torch.eye(48), atol=1e-5)


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_affine_is_within_half_a_step(count: int) -> None:
    x = normal(5, 7, 32)
    step = (x.amax(-1) - x.amin(-1)) / (2**count - 1)
    error = (affine(x, count) - x).abs().amax(-1)
    # float16 scales and offsets move levels by up to 2^-11 of the greatest.
    assert (error <= step / 2 + x.abs().amax(-1) * 2**-10).all()
    assert affine(x, count).unique(dim=-1).shape[-1] <= 32


def test_affine_of_a_constant() -> None:
    for value in (0.0, -3.0, 1e-7):
        x = torch.full((2, 8), value)
        assert torch.allclose(affine(x, 2), x, atol=1e-7)


def test_kivi_keys_round_channel_by_channel() -> None:
    """A channel of outliers costs the others nothing (section 3.2)."""
    peer, x = Kivi(geometry(), bits=2), normal(2, 64, 64)
    outliers = x.clone()
    outliers[..., 5] *= 1000
    others = [c for c in range(64) if c != 5]
    same = peer.keys(0, outliers)[..., others]
    assert torch.equal(same, peer.keys(0, x)[..., others])
    assert not torch.equal(peer.values(0, outliers)[..., others], peer.values(0, x)[..., others])


def test_kivi_leaves_tokens_that_fill_no_group() -> None:
    peer, x = Kivi(geometry(), bits=2), normal(2, 75, 64)
    rounded = peer.keys(0, x)
    assert torch.equal(rounded[:, 64:], x[:, 64:])
    assert not torch.equal(rounded[:, :64], x[:, :64])


@pytest.mark.parametrize(("count", "stored"), [(2, 3), (4, 5)])
def test_kivi_stores_a_bit_more(count: int, stored: int) -> None:
    """TurboQuant (arXiv 2504.19874), table 1, lists KIVI with 3 and with 5 bits."""
    assert bits(Kivi(geometry(), bits=count)) == pytest.approx(stored, rel=1e-5)
    # 63.5 of 1,024 keys and 128 of 1,024 values are exact, on average.
    exact = (63.5 + 128) / 2048
    expected = exact * 16 + (1 - exact) * stored
    assert bits(Kivi(geometry(), bits=count), 1024) == pytest.approx(expected, rel=1e-6)


def test_quarot_is_not_hurt_by_an_outlier_channel() -> None:
    peer, x = QuaRot(geometry(), bits=4), normal(2, 50, 64)
    x[..., 9] *= 30
    plain = relative_error(affine(x, 4), x)
    others = [c for c in range(64) if c != 9]
    rotated = peer.keys(0, x)
    assert relative_error(rotated, x) < plain
    assert relative_error(rotated[..., others], x[..., others]) < 0.5 * relative_error(
        affine(x, 4)[..., others], x[..., others]
    )


def test_quarot_stores_scale_and_offset_for_a_head() -> None:
    """4.25 bits with heads of 128, the paper's group; 4.5 with heads of 64."""
    assert bits(QuaRot(geometry(128), bits=4)) == pytest.approx(4.25)
    assert bits(QuaRot(geometry(64), bits=4)) == pytest.approx(4.5)


def test_turboquant_reaches_the_distortion_of_its_codebook() -> None:
    """Theorem 1: the error depends on nothing but size and bits, whatever the vector."""
    peer = TurboQuant(geometry(), bits=2, outliers=0.5)
    x = normal(2, 4096, 64)
    x[..., 3:] = 0  # far from normal, and every outlier channel is in one part
    peer.observe(0, x, x, x, x)
    peer.fit()
    at = torch.linspace(-1, 1, POINTS, dtype=torch.float64)
    density = (1 - at.square()).clamp_min(0) ** ((32 - 3) / 2)
    levels = sphere_levels(32, 3)
    error = (at[:, None] - levels).square().amin(1)
    expected = 32 * (density * error).sum() / density.sum()
    # Three elements in 32: not quite a uniform vector after one fixed rotation.
    assert relative_error(peer.keys(0, x), x) == pytest.approx(expected.item(), rel=0.15)


def test_turboquant_gives_outlier_channels_the_bit_more() -> None:
    peer, x = TurboQuant(geometry(), bits=2, outliers=0.25), normal(2, 100, 64)
    loud = torch.arange(64) % 4 == 1
    x[..., loud] *= 20
    peer.observe(0, x, x, x, x)
    peer.fit()
    assert set(peer.order[0, 0, 0, :16].tolist()) == set(loud.nonzero().flatten().tolist())
    rounded = peer.values(0, x)
    loud_error, error = (relative_error(rounded[..., c], x[..., c]) for c in (loud, ~loud))
    assert loud_error < 0.5 * error


def test_turboquant_bytes() -> None:
    """Two float16 norms a head, for its two instances; codebooks once."""
    assert bits(TurboQuant(geometry(), 2, 0.5)) == pytest.approx(2.5 + 32 / 64)
    assert bits(TurboQuant(geometry(128), 2, 0.25)) == pytest.approx(2.25 + 32 / 128)
    peer = TurboQuant(geometry(), 2, 0.5)
    once = (4 + 8) * 4
    assert peer.bytes_per_token(1) - peer.bytes_per_token(LONG) == pytest.approx(once, rel=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_vllm_turboquant_has_the_layout_of_vllm(preset: str) -> None:
    config = pytest.importorskip("vllm.model_executor.layers.quantization.turboquant.config")
    for size in (64, 128):
        theirs = config.TurboQuantConfig.from_cache_dtype(preset, size)
        peer = VllmTurboQuant(geometry(size), preset)
        assert sum(peer.head_bytes(3)) == theirs.slot_size_aligned
        assert peer.norm_correction == theirs.norm_correction
        # The first and the last two of six layers are dense.
        for layer in (0, 1, 4, 5):
            assert sum(peer.head_bytes(layer)) == 4 * size


def test_vllm_turboquant_has_the_levels_of_vllm() -> None:
    centroids = pytest.importorskip("vllm.model_executor.layers.quantization.turboquant.centroids")
    for count in (3, 4):
        levels = gaussian_levels(count).float() / 64**0.5
        assert torch.allclose(levels, centroids.get_centroids(64, count), atol=0.01 / 8)


def test_vllm_turboquant_keeps_norms_and_dense_layers() -> None:
    peer, x = VllmTurboQuant(geometry(), "turboquant_3bit_nc"), normal(2, 30, 64)
    assert torch.equal(peer.keys(1, x), x)
    assert torch.equal(peer.values(4, x), x)
    rounded = peer.keys(2, x)
    assert torch.allclose(rounded.norm(dim=-1), x.norm(dim=-1), rtol=1e-3)
    assert 0.01 < relative_error(rounded, x) < 0.06


def test_fp8_is_within_a_sixteenth() -> None:
    x = normal(2, 30, 64) * torch.logspace(-1, 2, 64)
    rounded = Fp8(geometry()).keys(0, x)
    assert ((rounded - x).abs() <= x.abs() / 16 + 2**-10).all()
    assert Fp8(geometry()).values(0, torch.tensor([[[1e4]]])).item() == 448
    assert bits(Fp8(geometry())) == 8


@pytest.mark.parametrize("size", [64, 96])
def test_formats_per_token_and_head(size: int) -> None:
    x = normal(2, 30, size)
    for peer, least, most, stored in (
        (Int8PerTokenHead(geometry(size)), 1e-6, 1e-4, 8),
        (Int4PerTokenHead(geometry(size)), 1e-3, 2e-2, 4),
    ):
        assert least < relative_error(peer.keys(0, x), x) < most
        # A token's scale is its own.
        x_louder = x.clone()
        x_louder[:, 0] *= 100
        assert torch.equal(peer.keys(0, x_louder)[:, 1:], peer.keys(0, x)[:, 1:])
        assert bits(peer) == stored + 32 / size


def test_oscar_gives_every_channel_the_same_weight() -> None:
    """Section 3: in the rotated basis, the queries' second moment has an even diagonal."""
    peer = Oscar(geometry())
    mix = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    mix *= torch.logspace(0, -2, 64)
    queries, values = normal(8, 300, 64) @ mix, normal(2, 300, 64)
    for layer in range(6):
        peer.observe(layer, queries, values, values, queries)
    peer.fit()
    rotation = peer.rotations[0, 0]
    assert torch.allclose(rotation @ rotation.T, torch.eye(64), atol=1e-5)
    moment = torch.einsum("htd,hte->de", queries, queries)
    weights = (rotation.T @ moment @ rotation).diagonal()
    assert torch.allclose(weights, weights.mean().expand(64), rtol=1e-3)


def test_oscar_bits_as_published() -> None:
    """Table 1: 2.28 bits an element at 128K tokens, heads of 128."""
    assert bits(Oscar(geometry(128)), 128 * 1024) == pytest.approx(2.28, abs=0.005)


def test_kvtc_allocation_is_the_best() -> None:
    variances, total = torch.tensor([4.0, 1.0, 0.3, 0.01]), 7

    def error(choice) -> float:
        pairs = zip(variances.tolist(), choice, strict=True)
        return sum(variance * gaussian_distortion(b) for variance, b in pairs)

    choices = [c for c in itertools.product(range(8), repeat=4) if sum(c) == total]
    found = allocate(variances, total)
    assert found.sum() == total
    assert error(found.tolist()) == pytest.approx(min(map(error, choices)), rel=1e-9)
    assert allocate(variances, 1000).tolist() == [8] * 4


def test_kvtc_bytes() -> None:
    assert bits(KvtcLike(geometry(), bits=2)) == pytest.approx(2, rel=1e-5)
    exact = (4 + 112 + 7.5) / 1024
    expected = exact * 16 + (1 - exact) * 2
    assert bits(KvtcLike(geometry(), bits=2), 1024) == pytest.approx(expected)
