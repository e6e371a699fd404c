"""The engine of ``recalkv eval`` that serves generates what ``transformers`` does."""

import pytest
import torch

from recalkv_vllm.evaluation import transformers_engine
from tests.tiny_models import make_model, tokenizer

__all__ = ["make_model", "tokenizer"]


@pytest.mark.slow
def test_engines_generate_the_same(make_model):
    from recalkv_vllm.evaluation import vllm_engine

    model = make_model("llama", torch.float32, head_dim=32)
    count = vllm_engine.PROMPTS_AT_ONCE + 2
    prompts = [[(7 * i + 3 * j) % 500 + 1 for i in range(20 + j)] for j in range(count)]
    limits = [1 + j % 5 for j in range(count)]
    answers = list(vllm_engine.generate(model, prompts, limits))
    assert [len(answer) for answer in answers] == limits
    assert answers == list(transformers_engine.generate(model, prompts, limits))
