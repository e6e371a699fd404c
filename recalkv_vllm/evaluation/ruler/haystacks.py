"""Text that needles are hidden in, and words and values to make them of."""

from __future__ import annotations

import re
import uuid
from functools import lru_cache
from itertools import cycle, islice
from random import Random

from recalkv_vllm.compression.calibration.builtin_text import builtin_documents

NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)


def noise_sentences(units: int, rng: Random) -> list[str]:
    """``units`` sentences that say nothing, in turn."""
    return list(islice(cycle(NOISE), units))


def text_sentences(units: int, rng: Random) -> list[str]:
    """``units`` words of the builtin text from a drawn sentence on, as sentences."""
    text = _sentences()
    start = rng.randrange(len(text))
    sentences, count = [], 0
    for i in range(units):
        words = text[(start + i) % len(text)].split()[: units - count]
        sentences.append(" ".join(words))
        count += len(words)
        if count == units:
            break
    return sentences


def draw_words(count: int, rng: Random) -> list[str]:
    """Different words in random order; compounds of two once there are no others."""
    words = list(_words())
    rng.shuffle(words)
    known = dict.fromkeys(words[:count])
    while len(known) < count:
        known.setdefault(draw_compound(rng))
    return list(known)


def draw_compound(rng: Random) -> str:
    """Two different words joined by a hyphen."""
    return "-".join(rng.sample(_words(), 2))


def draw_number(rng: Random) -> str:
    """A number of seven digits."""
    return str(rng.randrange(1_000_000, 10_000_000))


def draw_uuid(rng: Random) -> str:
    """A random UUID (version 4)."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


@lru_cache(maxsize=1)
def _sentences() -> tuple[str, ...]:
    text = " ".join(" ".join(builtin_documents()).split())
    return tuple(re.split(r"(?<=[.?!]) ", text))


@lru_cache(maxsize=1)
def _words() -> tuple[str, ...]:
    found = re.findall(r"(?<![\w.-])[a-z]{4,8}(?![\w.(-])", " ".join(builtin_documents()))
    return tuple(sorted(set(found)))
