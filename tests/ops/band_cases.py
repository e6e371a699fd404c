"""The test matrix on caches of latents in bands, apart from ``cases.py`` for its length."""

from __future__ import annotations

from dataclasses import replace

from recalkv_vllm.band_format import BandFormat
from recalkv_vllm.span import Span
from tests.ops.cases import (
    DECODE_LENGTHS,
    EVERY_OPTION,
    MIXED,
    AttentionCase,
    joint,
    spanned,
    split_spans,
)


def banded(case: AttentionCase, *spans: tuple[tuple[int, int], ...]) -> AttentionCase:
    """The case on a cache of latents in bands.

    Args:
        spans: bands ``(columns, bits)`` of one stretch of the latent after the other.
    """
    latent_format = BandFormat(tuple(band for span in spans for band in span))
    assert latent_format.rank >= case.rank
    return replace(case, rank=latent_format.rank, latent_format=latent_format)


#: Bands of one span: few bits and many, with and without neighbors of as many bits.
COARSE = ((32, 3), (32, 2))
MIDDLE = ((32, 6), (32, 3), (32, 2))
FINE = ((32, 8), (64, 6), (32, 4), (64, 3), (32, 2))

BAND_CASES: tuple[AttentionCase, ...] = (
    # One codec each, at ranks whose codes fill 16 bytes and at ranks whose codes do not.
    *(
        banded(
            joint(f"bands-{bits}", (4, 2, 64), 1, 96, batch=DECODE_LENGTHS),
            ((96, bits),),
            ((96, bits),),
        )
        for bits in (2, 3, 4, 6, 8)
    ),
    banded(joint("bands-2-one-block", (2, 1, 32), 1, 32, batch=MIXED), ((32, 2),)),
    banded(joint("bands-6-one-block", (2, 1, 32), 1, 32, batch=MIXED), ((32, 6),)),
    # Spans: a group's codes start anywhere, in a cache of blocks of any size.
    banded(joint("bands-joint", (4, 2, 64), 1, 96, batch=MIXED, padding_rows=2), MIDDLE, MIDDLE),
    banded(joint("bands-joint-four", (8, 4, 64), 1, 64, batch=MIXED, block_size=48), *[COARSE] * 4),
    banded(joint("bands-joint-all-heads", (9, 3, 64), 3, 224, batch=MIXED), FINE),
    banded(
        spanned("bands-split", (4, 2, 64), 1, 64, 2, 32, batch=MIXED, cache="blocks"),
        COARSE,
        COARSE,
        ((32, 4),),
        ((32, 4),),
    ),
    banded(
        spanned("bands-one-v-group", (8, 4, 64), 2, 32, 1, 224, batch=MIXED, block_size=32),
        ((32, 6),),
        ((32, 6),),
        FINE,
    ),
    banded(
        AttentionCase(
            "bands-k-inside-v",
            rank=256,
            k_spans=(Span(0, 32), Span(128, 160)),
            v_spans=(Span(0, 128), Span(128, 256)),
            batch=(*MIXED, (1, 257)),
            block_size=128,
        ),
        *[((32, 6), (32, 4), (64, 2))] * 2,
    ),
    banded(
        AttentionCase(
            "bands-v-inside-k",
            rank=192,
            k_spans=split_spans(2, 96),
            v_spans=(Span(32, 96), Span(128, 192)),
            batch=MIXED,
        ),
        *[((32, 8), (32, 3), (32, 2))] * 2,
    ),
    banded(
        AttentionCase(
            "bands-unsorted-with-gaps",
            rank=256,
            k_spans=(Span(128, 192), Span(32, 96)),
            v_spans=(Span(192, 224), Span(96, 128)),
            batch=MIXED,
            block_size=48,
        ),
        ((32, 3),),
        ((32, 3), (32, 2)),
        ((32, 6),),
        ((32, 3), (32, 2)),
        ((32, 6), (32, 8)),
    ),
    banded(
        joint("bands-rank-1024", (4, 2, 64), 1, 512, batch=((1, 33), (5, 19))),
        *[((64, 8), (96, 6), (128, 4), (96, 3), (128, 2))] * 2,
    ),
    # What models and calls add.
    banded(joint("bands-long", (8, 2, 128), 1, 96, batch=((1, 700), (4, 300))), MIDDLE, MIDDLE),
    banded(joint("bands-prefill", (4, 2, 64), 1, 96, batch=((70, 70),)), MIDDLE, MIDDLE),
    banded(
        joint("bands-window", (4, 2, 64), 1, 96, batch=(*MIXED, (40, 120)), sliding_window=24),
        MIDDLE,
        MIDDLE,
    ),
    banded(
        joint(
            "bands-everything",
            (6, 2, 64),
            2,
            224,
            cache="blocks",
            **EVERY_OPTION,
        ),
        FINE,
    ),
)
