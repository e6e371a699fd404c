"""Whether an engine computes what another does, in a dtype that rounds.

In float32 greedy tokens are equal. In 16 bits the order of a sum, which differs between kernels and
between CPUs, changes the last bits of a logit, and tokens part where two candidates are that near.
Equal up to rounding means then:

- where tokens part, the standard's own log-probabilities of the two candidates differ by at most
  :func:`rounding_bound`;
- from there on both engines score one text, the standard's, and all of its log-probabilities, as
  those of the prompts, are within the same bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tests.e2e.conftest import run_engines

#: Makes a job of ``engine.py`` out of batches.
MakeJob = Callable[..., dict[str, Any]]


def rounding_bound(dtype: torch.dtype) -> float:
    """How far two log-probabilities may be apart by rounding alone, in nats.

    A logit between 8 and 16 is stored in steps of ``8 · eps``. Each of two candidates may be off by
    two of them: one from its own rounding, one from that of the layers before, whose errors are
    independent and grow like a root. (Between float16 and float32, the small models' prompts differ
    by a mean of 5 and at most 26 ``eps``.)
    """
    return 2 * 2 * 8 * torch.finfo(dtype).eps


def assert_equal_up_to_rounding(
    engines: Mapping[str, MakeJob],
    prompts: Sequence[list[int]],
    dtype: torch.dtype,
    max_tokens: int = 24,
) -> dict[str, Any]:
    """Compare engines with the first, the standard; in float32 their tokens must be its own.

    Args:
        engines: what makes their jobs, by name.
        prompts: token ids.
        dtype: that they compute in.
        max_tokens: to continue each prompt by.

    Returns:
        Results of greedy continuations, by the engine's name.

    Raises:
        AssertionError: an engine differs from the standard by more than rounding.
    """
    greedy = {
        "prompts": prompts,
        "sampling": {
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "logprobs": 5,
            "prompt_logprobs": 0,
        },
    }
    results = _run(engines, greedy)
    name, *others = engines
    standard = results[name]
    if dtype == torch.float32:
        for other in others:
            assert results[other]["tokens"] == standard["tokens"], other
        return results
    bound = rounding_bound(dtype)
    parted = set()
    for other in others:
        check_likelihoods(standard, results[other], bound)
        parted |= set(check_partings(standard, results[other], bound))
    if parted:
        texts = [prompts[i] + standard["tokens"][0][i] for i in sorted(parted)]
        scores = _run(engines, {"prompts": texts, "sampling": greedy["sampling"]})
        for other in others:
            check_likelihoods(scores[name], scores[other], bound)
    return results


def check_partings(standard: dict, other: dict, bound: float) -> list[int]:
    """Prompts whose continuations part, each where the standard itself is all but undecided."""
    parted = []
    for i, (ours, theirs) in enumerate(zip(other["tokens"][0], standard["tokens"][0], strict=True)):
        at = next(
            (at for at, pair in enumerate(zip(ours, theirs, strict=False)) if len(set(pair)) > 1),
            None,
        )
        if at is None:
            assert len(ours) == len(theirs)
            continue
        candidates = standard["outputs"][0][i]["logprobs"][at]
        chosen, instead = str(theirs[at]), str(ours[at])
        margin = candidates[chosen] - candidates.get(instead, -math.inf)
        assert margin <= bound, (
            f"prompt {i}, token {at}: {instead} instead of {chosen}, which is more likely by "
            f"{margin} nats; rounding explains {bound}"
        )
        parted.append(i)
    return parted


def check_likelihoods(standard: dict, other: dict, bound: float) -> None:
    """Log-probabilities of the prompts' tokens are within ``bound``."""
    for i, (ours, theirs) in enumerate(
        zip(other["outputs"][0], standard["outputs"][0], strict=True)
    ):
        pairs = list(zip(ours["prompt_logprobs"], theirs["prompt_logprobs"], strict=True))
        for at, (found, expected) in enumerate(pairs[1:], start=1):
            # With `prompt_logprobs: 0` only the prompt's own token is there.
            ((token, likelihood),) = expected.items()
            difference = abs(found[token] - likelihood)
            assert difference <= bound, (
                f"prompt {i}, token {at}: log-probabilities differ by {difference} nats; "
                f"rounding explains {bound}"
            )


def _run(engines: Mapping[str, MakeJob], batch: dict[str, Any]) -> dict[str, Any]:
    results = run_engines(*(make(batch) for make in engines.values()))
    return dict(zip(engines, results, strict=True))
