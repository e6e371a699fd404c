"""A predictor fitted to cached latents: linear regression, a layer at a time."""

from __future__ import annotations

import numpy as np

from recalkv_vllm.band_format import BLOCK_COLUMNS
from recalkv_vllm.serving.cold_tier.chunk_layout import Bytes, ChunkLayout, Latents
from recalkv_vllm.serving.cold_tier.predictor import (
    LARGEST_WEIGHT,
    SCALES,
    WEIGHT_SUM,
    Floats,
    LayerPredictor,
    half_ranges,
    seen_from_above,
    to_integers,
)

#: A standard deviation as an integer.
UNIT = 16
#: A weight of one as an integer, where the sum of weights allows.
WEIGHT_UNIT = 1 << 10
#: Added to the diagonal, as a part of it.
RIDGE = 1e-3
#: Classes of columns per octave of their mean distance.
CLASSES_PER_OCTAVE = 2
#: An added distance, below which distances are all alike.
NO_DISTANCE = 2.0**-5


def fit(layout: ChunkLayout, chunks: Bytes) -> list[LayerPredictor]:
    """Predictors of all layers, from ``chunks: [chunks, layout.size]``; thousands of tokens."""
    predictors: list[LayerPredictor] = []
    integers = form = None
    for pages, latents in zip(layout.layers, layout.split(chunks)[0], strict=True):
        tokens = latents.codes.shape[1]
        below = seen_from_above(integers, None if pages.lowest else form, tokens)
        predictor, integers = fit_layer(latents, below, half_ranges(pages.latents))
        predictors.append(predictor)
        form = pages.latents
    return predictors


def fit_layer(latents: Latents, below: Floats, half: Floats) -> tuple[LayerPredictor, Floats]:
    """A layer's predictor, and what the layer above gets."""
    scales = np.repeat(SCALES[latents.scales], BLOCK_COLUMNS, axis=0)
    elements = (latents.codes + (np.float32(0.5) - half)) * scales
    deviation = np.sqrt(np.square(elements).mean(axis=1, keepdims=True))
    to_integer = UNIT / np.maximum(deviation, np.float32(1e-6))
    integers = to_integers(latents, half, to_integer)
    features = np.concatenate([below, integers])
    moments = (features @ features.T).astype(np.float64)
    diagonal = np.diag_indices_from(moments)
    moments[diagonal] = moments[diagonal] * (1 + RIDGE) + 1
    # A column is its regression on those before it and something new, and L of the Cholesky
    # factorization makes columns from new parts: its inverse makes new parts from columns.
    lower = np.linalg.cholesky(moments)
    rows = np.linalg.inv(lower)[len(below) :]
    weights = -rows * lower.diagonal()[len(below) :, None]
    own = np.arange(len(weights))
    weights[own, len(below) + own] = 0
    sums = np.abs(weights).sum(axis=1, keepdims=True)
    # Rounding adds half to a weight at most.
    unit = np.minimum(WEIGHT_UNIT, (WEIGHT_SUM - weights.shape[1]) / np.maximum(sums, 1e-9))
    whole = np.rint(weights * unit).clip(-LARGEST_WEIGHT, LARGEST_WEIGHT).astype(np.float32)
    inside = np.ascontiguousarray(np.tril(whole[:, len(below) :], -1))
    predictor = LayerPredictor(
        below=np.ascontiguousarray(whole[:, : len(below)]),
        inside=inside,
        to_integer=to_integer,
        from_sum=(1 / (unit * to_integer)).astype(np.float32),
        classes=np.zeros(len(weights), np.uint8),
        scales=np.median(latents.scales, axis=1, keepdims=True).astype(np.uint8),
    )
    distances, _ = predictor.encode(latents, below, half)
    mean = np.minimum(distances, 2 * half - distances).mean(axis=1)
    octaves = np.log2((mean + NO_DISTANCE) / NO_DISTANCE)
    predictor.classes[:] = np.rint(CLASSES_PER_OCTAVE * octaves)
    return predictor, integers
