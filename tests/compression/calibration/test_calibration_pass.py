"""The pass over the calibration text: its gradient is the model's own, of the tokens that count."""

import pytest
import torch

from recalkv_vllm.compression.base_model.attention import attention_modules
from recalkv_vllm.compression.base_model.model import BaseModel
from recalkv_vllm.compression.calibration.calibration_pass import (
    output_logits,
    run_pass,
    sum_shapes,
)
from recalkv_vllm.compression.calibration.observers import FisherDiagonal, Observer
from recalkv_vllm.compression.calibration.samples import leave_out, token_ids
from recalkv_vllm.compression.calibration.sum_store import SumStore, read_complete
from tests.e2e.architectures import CONFIGS, save_random_model


@pytest.mark.parametrize("name", ["gemma2", "granite", "qwen3"])
def test_gradient_is_that_of_the_models_own_logits(tmp_path, name):
    model = BaseModel(save_random_model(CONFIGS[name], tmp_path / name)).load(torch.float32, "cpu")
    ids = torch.randint(1, 512, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state
        expected = model(ids).logits[0]
    torch.testing.assert_close(output_logits(model, hidden[0]), expected)


@pytest.mark.parametrize("counted", [[], [7], [4, 5, 19], range(1, 20)], ids=len)
def test_only_tokens_that_count_have_gradients(tiny, tmp_path, counted):
    base = BaseModel(tiny)
    ids = torch.randint(1, 500, (20,), generator=torch.Generator().manual_seed(0))
    sample = leave_out(ids)
    sample[list(counted)] = ids[list(counted)]
    observers: list[Observer] = [FisherDiagonal()]
    with SumStore(tmp_path / "sums", sum_shapes(observers, base.geometry)) as store:
        run_pass(base.load(torch.float32, "cpu"), sample[None], observers, store)
    found = read_complete(tmp_path / "sums")[0]["fisher"]

    model = base.load(torch.float64, "cpu")
    logits = model(ids[None]).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    losses[[token - 1 for token in counted]].sum().backward()
    for layer, attention in enumerate(attention_modules(model)):
        for column, projection in enumerate((attention.k_proj, attention.v_proj)):
            expected = projection.weight.grad.square()
            part = torch.from_numpy(found[layer, column].copy()).double()
            torch.testing.assert_close(part, expected, rtol=1e-3, atol=1e-3 * expected.max().item())


def test_ids_of_tokens_that_are_left_out():
    ids = torch.tensor([[0, 1, 7], [5, 0, 2]])
    assert (leave_out(ids) < 0).all()
    assert torch.equal(token_ids(leave_out(ids)), ids)
    assert torch.equal(token_ids(ids), ids)
