"""The comparison of engines finds faults, and nothing where there is none."""

import json
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.equality import (
    assert_equal_up_to_rounding,
    check_likelihoods,
    check_partings,
    rounding_bound,
)

BOUND = rounding_bound(torch.float16)


def result(tokens, logprobs, prompt=(-1.0, -2.0)):
    """Of one prompt of ``len(prompt) + 1`` tokens; ``logprobs`` per token that was chosen."""
    output = {"logprobs": logprobs, "prompt_logprobs": [None, *({"7": p} for p in prompt)]}
    return {"tokens": [[tokens]], "outputs": [[output]]}


def standard(margin):
    """Goes on with 1 and 2, where 3 is as likely as 2 but for ``margin``."""
    return result([1, 2, 9], [{"1": -0.1}, {"2": -1.0, "3": -1.0 - margin}, {"9": -1.0}])


def test_near_candidates_may_part():
    assert check_partings(standard(BOUND / 2), result([1, 3, 4], []), BOUND) == [0]


def test_equal_tokens_do_not():
    assert check_partings(standard(BOUND / 2), result([1, 2, 9], []), BOUND) == []


@pytest.mark.parametrize("tokens", [[1, 3, 9], [1, 5, 9]])
def test_a_token_that_the_standard_would_not_choose_is_found(tokens):
    """The second is none of its likeliest at all."""
    with pytest.raises(AssertionError, match=r"prompt 0, token 1: \d instead of 2"):
        check_partings(standard(2 * BOUND), result(tokens, []), BOUND)


def test_a_shorter_continuation_is_found():
    with pytest.raises(AssertionError):
        check_partings(standard(0), result([1, 2], []), BOUND)


def test_other_likelihoods_are_found():
    near, far = (result([], [], (-1.0, -2.0 + d)) for d in (BOUND / 2, 2 * BOUND))
    check_likelihoods(result([], []), near, BOUND)
    with pytest.raises(AssertionError, match="prompt 0, token 2"):
        check_likelihoods(result([], []), far, BOUND)


@pytest.fixture
def engines(small, compressed, small_prompts, tmp_path):
    """``engines(dtype, fault)``: stock, and compressed with ``fault`` in a layer's ``k_up``."""

    def make(dtype, fault):
        checkpoint = tmp_path / "model"
        shutil.copytree(compressed(small), checkpoint)
        factors = load_file(checkpoint / "recalkv.safetensors")
        factors["layers.1.k_up"][0] *= fault
        save_file(factors, checkpoint / "recalkv.safetensors", metadata={"format": "pt"})
        config = json.loads((checkpoint / "config.json").read_text())
        del config["recalkv"]["factors_sha256"]
        (checkpoint / "config.json").write_text(json.dumps(config))
        return {
            "stock": partial(small_prompts.job, small, dtype=dtype),
            "ours": partial(small_prompts.job, checkpoint, dtype=dtype),
        }

    return make


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_engines_of_one_model_are_equal(engines, small_prompts, dtype):
    results = assert_equal_up_to_rounding(
        engines(dtype, fault=1), small_prompts.ids, getattr(torch, dtype)
    )
    assert list(results) == ["stock", "ours"]


def test_one_wrong_factor_is_found(engines, small_prompts):
    """Half of a layer's keys are a twentieth longer than they should be."""
    with pytest.raises(AssertionError, match="rounding explains"):
        assert_equal_up_to_rounding(engines("float16", 1.05), small_prompts.ids, torch.float16)
