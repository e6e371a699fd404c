"""A predictor as a file, named after its contents."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import fields

import numpy as np

from recalkv_vllm.serving.cold_tier.predictor import LayerPredictor

DIGEST_BYTES = 8
#: Weights are integers that fit.
_AS_STORED = {"below": np.int16, "inside": np.int16}


def dump(predictors: Sequence[LayerPredictor]) -> bytes:
    """The contents of a file."""
    arrays = {
        f"{i}.{field.name}": getattr(one, field.name).astype(
            _AS_STORED.get(field.name, getattr(one, field.name).dtype)
        )
        for i, one in enumerate(predictors)
        for field in fields(one)
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def parse(contents: bytes) -> list[LayerPredictor]:
    """Inverse of :func:`dump`."""
    with np.load(io.BytesIO(contents)) as arrays:
        layers = 1 + max(int(name.split(".")[0]) for name in arrays.files)
        return [
            LayerPredictor(
                **{
                    field.name: arrays[f"{i}.{field.name}"].astype(
                        np.float32
                        if field.name in _AS_STORED
                        else arrays[f"{i}.{field.name}"].dtype
                    )
                    for field in fields(LayerPredictor)
                }
            )
            for i in range(layers)
        ]


def digest(contents: bytes) -> bytes:
    """What a file is named after, and chunks name their predictor by."""
    return hashlib.blake2b(contents, digest_size=DIGEST_BYTES).digest()
