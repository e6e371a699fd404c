"""Which words are in a long list most often: the common and the frequent words."""

from __future__ import annotations

import math
import string
from random import Random

from recalkv_vllm.evaluation.ruler.haystacks import draw_words
from recalkv_vllm.evaluation.ruler.prompt import Cell, Question, Task

COMMON_WORDS = 10
#: Below this length, the paper's counts leave no room.
FULL_LENGTH = 4096
#: How often a common word is in the list, and any other. Twice ten more do not fit 1,024 tokens.
COUNTS, SHORT_COUNTS = (30, 3), (8, 1)
#: The same of the worked example, and how many other words it has.
EXAMPLE_COUNTS, EXAMPLE_OTHERS = (10, 3), 30
SHORT_EXAMPLE_COUNTS, SHORT_EXAMPLE_OTHERS = (3, 1), 10

COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{text}\nQuestion: What are the 10 most common "
    "words in the above list?"
)
COMMON_PREFIX = "Answer: The top 10 words that appear most often in the list are:"

CODED_LETTERS, CODED_WORDS, ZIPF_EXPONENT = 6, 2000, 2.0
#: So many words that the fourth most frequent (noise is first) is ahead of the fifth.
LEAST_CODED = 100
NOISE = "..."
FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. {text}\nQuestion: Do not provide any explanation. Please "
    "ignore the dots '....'. What are the three most frequently appeared words in the above coded "
    "text?"
)
FREQUENT_PREFIX = (
    "Answer: According to the coded text above, the three most frequently appeared words are:"
)


def _list_words(words: list[str], counts: tuple[int, int], rng: Random) -> str:
    """A shuffled numbered list in which the first ten words are the common ones."""
    entries = words[:COMMON_WORDS] * counts[0] + words[COMMON_WORDS:] * counts[1]
    rng.shuffle(entries)
    return " ".join(f"{i}. {word}" for i, word in enumerate(entries, start=1))


def write_common(units: int, cell: Cell) -> Question:
    """Ten common words among ``units`` others, after a worked example."""
    rng = cell.random()
    short = cell.length < FULL_LENGTH
    others = SHORT_EXAMPLE_OTHERS if short else EXAMPLE_OTHERS
    words = draw_words(2 * COMMON_WORDS + others + units, rng)
    example, asked = words[: COMMON_WORDS + others], words[COMMON_WORDS + others :]
    shown = _list_words(example, SHORT_EXAMPLE_COUNTS if short else EXAMPLE_COUNTS, rng)
    text = _list_words(asked, SHORT_COUNTS if short else COUNTS, rng)
    answer = " ".join(f"{i}. {word}" for i, word in enumerate(example[:COMMON_WORDS], start=1))
    return Question(
        f"{COMMON.format(text=shown)} {COMMON_PREFIX} {answer}\n\n{COMMON.format(text=text)}",
        COMMON_PREFIX,
        tuple(asked[:COMMON_WORDS]),
    )


def write_frequent(units: int, cell: Cell) -> Question:
    """About ``units`` coded words, their counts by Zipf's law; the most frequent one is noise."""
    rng = cell.random()
    coded: dict[str, None] = {}
    while len(coded) < CODED_WORDS:
        coded.setdefault("".join(rng.choices(string.ascii_lowercase, k=CODED_LETTERS)))
    ranked = [NOISE, *coded]
    total = math.fsum(rank**-ZIPF_EXPONENT for rank in range(1, len(ranked) + 1))
    text = [
        word
        for rank, word in enumerate(ranked, start=1)
        for _ in range(int(units * rank**-ZIPF_EXPONENT / total))
    ]
    rng.shuffle(text)
    return Question(FREQUENT.format(text=" ".join(text)), FREQUENT_PREFIX, tuple(ranked[1:4]))


COUNTING_TASKS = {
    "cwe": Task(write_common, answer_tokens=120),
    "fwe": Task(write_frequent, answer_tokens=50, least_units=LEAST_CODED),
}
