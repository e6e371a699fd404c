"""Prompts that come as embeddings instead of tokens."""

import pytest

from tests.e2e.conftest import run_engines


@pytest.mark.slow
def test_prompts_as_embeddings(small, compressed, small_prompts):
    greedy = small_prompts.job(small)["batches"][0]
    (stock,) = run_engines(small_prompts.job(small))
    batch = {**greedy, "embeddings": str(small)}
    engine = {"enable_prompt_embeds": True, "attention_backend": "recalkv"}
    (ours,) = run_engines(small_prompts.job(compressed(small), batch, **engine))
    assert ours["tokens"] == stock["tokens"]
