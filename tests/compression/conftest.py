import pytest
import torch

from recalkv_vllm.checkpoint import AttentionGeometry, read_hf_config
from recalkv_vllm.compression.base_model.model import BaseModel
from tests.tiny_models import make_model, own_cache, tiny, tiny_models, tokenizer

__all__ = ["make_model", "own_cache", "tiny", "tiny_models", "tokenizer"]


@pytest.fixture
def geometry(tiny) -> AttentionGeometry:
    return AttentionGeometry.from_hf_config(read_hf_config(tiny))


@pytest.fixture
def load(tiny):
    return lambda: BaseModel(tiny).load(torch.float32, "cpu")
