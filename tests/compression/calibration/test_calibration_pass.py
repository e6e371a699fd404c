"""The pass over the calibration text: its gradient is the model's own."""

import pytest
import torch

from recalkv_vllm.compression.base_model.model import BaseModel
from recalkv_vllm.compression.calibration.calibration_pass import output_logits
from tests.e2e.architectures import CONFIGS, save_random_model


@pytest.mark.parametrize("name", ["gemma2", "granite", "qwen3"])
def test_gradient_is_that_of_the_models_own_logits(tmp_path, name):
    model = BaseModel(save_random_model(CONFIGS[name], tmp_path / name)).load(torch.float32, "cpu")
    ids = torch.randint(1, 512, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state
        expected = model(ids).logits[0]
    torch.testing.assert_close(output_logits(model, hidden[0]), expected)
