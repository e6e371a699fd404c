"""Encoded chunks: they come back to the last bit, whatever they hold, and are small."""

import numpy as np
import pytest
import torch

from recalkv_vllm.band_format import BandFormat
from recalkv_vllm.serving.cold_tier.chunk_layout import ChunkLayout, Latents, LayerPages
from recalkv_vllm.serving.cold_tier.codec import Codec
from recalkv_vllm.serving.cold_tier.entropy import compress, decompress
from recalkv_vllm.serving.cold_tier.fit import fit, fit_layer
from recalkv_vllm.serving.cold_tier.predictor import (
    CONSTANT,
    LARGEST,
    half_ranges,
    seen_from_above,
    to_integers,
)
from recalkv_vllm.serving.cold_tier.predictor_file import dump, parse
from tests.serving.cold_tier.chunks import BANDS, PADDING, correlated, layout


@pytest.fixture(scope="module")
def codec():
    return Codec(layout(), fit(layout(), correlated(64, seed=1)))


def test_pages_are_read_as_the_kernels_write_them():
    """Against the format's own view of a page, in torch."""
    of, chunks = layout(), correlated(3, seed=2)
    layers, rest = of.split(chunks)
    padding = 0
    for layer, latents in zip(of.layers, layers, strict=True):
        form = layer.latents
        size = layer.block_size * form.slot_bytes(form.rank)
        pages = np.stack([chunks[:, start : start + size] for start in layer.starts], axis=1)
        cache = torch.from_numpy(pages.reshape(-1, layer.block_size, form.slot_bytes(form.rank)))
        packed, scales = form.split_cache(cache)
        assert (form.unpack(packed).flatten(0, 1).numpy() == latents.codes.T).all()
        assert (scales.flatten(0, 1).numpy() == latents.scales.T).all()
        padding += form.code_bytes - sum(band.columns * band.bits // 8 for band in form.bands)
    assert padding > 0
    assert rest.shape == (3, PADDING + padding * of.tokens)


@pytest.mark.parametrize("count", [1, 5])
def test_latents_come_back(codec, count):
    chunks = correlated(count, seed=3)
    assert (codec.decode(codec.encode(chunks)) == chunks).all()


def test_chunks_come_back_alone_and_in_another_order(codec):
    chunks = correlated(4, seed=4)
    encoded = codec.encode(chunks)
    assert (codec.decode(encoded[::-1]) == chunks[::-1]).all()
    assert (codec.decode(encoded[2:3]) == chunks[2:3]).all()


@pytest.mark.parametrize("fill", ["random", 0x00, 0xFF])
def test_poisoned_memory_comes_back(codec, fill):
    """Scales that are not a number, codes that no quantizer makes, padding that is not zero."""
    shape = (3, codec.layout.size)
    if fill == "random":
        chunks = np.random.default_rng(5).integers(256, size=shape, dtype=np.uint8)
    else:
        chunks = np.full(shape, fill, np.uint8)
    assert (codec.decode(codec.encode(chunks)) == chunks).all()


def test_a_predictor_fitted_to_poison_is_exact_too():
    of = layout()
    poison = np.random.default_rng(6).integers(256, size=(16, of.size), dtype=np.uint8)
    codec = Codec(of, fit(of, poison))
    for chunks in poison[:3], correlated(3, seed=7):
        assert (codec.decode(codec.encode(chunks)) == chunks).all()


def test_pages_of_blocks_among_one_another():
    """A block's pages of all layers lie together where vLLM's layout has blocks outermost."""
    sizes = [8 * BandFormat(bands).slot_bytes(96) for bands in BANDS]
    starts = np.cumsum([0, *sizes])
    layers = [
        LayerPages((int(start), int(start + starts[-1])), 8, BandFormat(bands), lowest=i == 0)
        for i, (start, bands) in enumerate(zip(starts, BANDS, strict=False))
    ]
    of = ChunkLayout(2 * int(starts[-1]), tuple(layers))
    codec = Codec(of, fit(of, correlated(64, 1, of)))
    chunks = correlated(2, 8, of)
    encoded = codec.encode(chunks)
    assert (codec.decode(encoded) == chunks).all()
    assert max(map(len, encoded)) < of.size / 1.3


def test_what_is_predicted_is_smaller(codec):
    chunks = correlated(64, seed=9)
    own_bytes = codec.layout.size - codec.layout.rest_bytes
    encoded = [len(one) - codec.layout.rest_bytes for one in codec.encode(chunks)]
    assert np.mean(encoded) < own_bytes / 1.4


def test_sums_are_exact_in_any_order():
    """Also of columns that are one another's, whose weights are large: float64 agrees."""
    form = BandFormat(((64, 8),))
    generator = np.random.default_rng(10)
    half, tokens = half_ranges(form), 256
    codes = np.repeat(generator.integers(256, size=(1, tokens), dtype=np.uint8), 64, axis=0)
    codes[1::2] = 255 - codes[1::2]
    codes[-1] ^= 1
    scales = np.full((2, tokens), 100, np.uint8)
    predictor, _ = fit_layer(Latents(codes, scales), seen_from_above(None, None, tokens), half)
    weights = np.concatenate([predictor.below, predictor.inside], axis=1)
    assert (weights == np.rint(weights)).all()
    assert (np.abs(weights).sum(axis=1) * max(LARGEST, CONSTANT) < 1 << 24).all()
    integers = to_integers(Latents(codes, scales), half, predictor.to_integer)
    features = np.concatenate([seen_from_above(None, None, tokens), integers])
    assert (weights @ features == weights.astype(np.float64) @ features.astype(np.float64)).all()


def test_a_predictors_file_gives_the_same_predictor(codec):
    again = Codec(codec.layout, parse(dump(codec.predictors)))
    chunks = correlated(2, seed=11)
    assert again.encode(chunks) == codec.encode(chunks)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("count", [0, 1, 7, 1000])
def test_symbols_come_back(bits, count):
    symbols = np.random.default_rng(count).integers(1 << bits, size=count, dtype=np.uint8)
    assert (decompress(compress(symbols, bits), bits, count) == symbols).all()


def test_damaged_parts_are_errors(codec):
    (encoded,) = codec.encode(correlated(1, seed=12))
    for data in encoded[:-1], encoded[:20], b"", encoded + b"\0":
        with pytest.raises(ValueError, match="expected"):
            codec.decode([data])
