"""Attention for a token at a time gives what transformers' own gives."""

import pytest
import torch

from recalkv_vllm.compression.base_model.model import BaseModel
from recalkv_vllm.compression.calibration.one_token_attention import (
    NAME,
    one_token_attention,
    use_one_token_attention,
)
from recalkv_vllm.compression.calibration.reserved_cache import reserved_cache
from tests.e2e.architectures import CONFIGS, save_random_model


@pytest.mark.parametrize("name", ["olmo2", "gemma2", "mistral-window"])
def test_logits_of_steps_of_one_token_and_of_several(tmp_path, name):
    base = BaseModel(save_random_model(CONFIGS[name], tmp_path / name))
    model, expected = (base.load(torch.float32, "cpu") for _ in range(2))
    use_one_token_attention(model)
    assert model.config._attn_implementation == NAME
    ids = torch.randint(1, 500, (3, 40), generator=torch.Generator().manual_seed(0))
    caches = [reserved_cache(each.config, 40) for each in (model, expected)]
    with torch.inference_mode():
        for step in (*ids.split(1, dim=1)[:20], ids[:, 20:35], *ids.split(1, dim=1)[35:]):
            found, wanted = (
                each(input_ids=step, past_key_values=cache, use_cache=True).logits
                for each, cache in zip((model, expected), caches, strict=True)
            )
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("heads", [(1, 1), (6, 6), (6, 2), (7, 1)])
def test_heads_of_a_group_keep_their_order(heads):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, heads[0], 1, 16, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 2, heads[1], 9, 16, generator=generator, dtype=torch.float64)
    found, _ = one_token_attention(torch.nn.Module(), query, key, value, None, scaling=0.3)
    keys, values = (part.repeat_interleave(heads[0] // heads[1], 1) for part in (key, value))
    weights = (0.3 * query @ keys.mT).softmax(-1)
    torch.testing.assert_close(found, (weights @ values).transpose(1, 2))


def test_other_attention_stays_as_it_is(tmp_path):
    model = BaseModel(save_random_model(CONFIGS["olmo2"], tmp_path / "m")).load(
        torch.float32, "cpu"
    )
    model.set_attn_implementation("eager")
    use_one_token_attention(model)
    assert model.config._attn_implementation == "eager"
