"""The engine of ``recalkv eval`` that serves generates what ``transformers`` does."""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from recalkv_vllm.evaluation import transformers_engine, vllm_engine
from tests.tiny_models import make_model, tokenizer

__all__ = ["make_model", "tokenizer"]


def served(model: Path, prompts: Sequence[list[int]], limits: Sequence[int]) -> list[list[int]]:
    return list(vllm_engine.generate(model, prompts, limits))


@pytest.mark.slow
def test_engines_generate_the_same(make_model):
    model = make_model("llama", torch.float32, head_dim=32)
    count = vllm_engine.PROMPTS_AT_ONCE + 2
    prompts = [[(7 * i + 3 * j) % 500 + 1 for i in range(20 + j)] for j in range(count)]
    limits = [1 + j % 5 for j in range(count)]
    # vLLM 0.32 starts no engine where Numba was imported before, as tests of the cold tier do.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        answers = pool.submit(served, model, prompts, limits).result()
    assert [len(answer) for answer in answers] == limits
    assert answers == list(transformers_engine.generate(model, prompts, limits))
