"""The student is the compressed model, and learns as it should."""

import pytest
import torch
import torch.nn.functional as F

from recalkv_vllm.compression.base_model.attention import attention_modules
from recalkv_vllm.compression.healing.distillation import divergence, hidden_states
from recalkv_vllm.compression.healing.projections import TrainedFactors
from tests.compression.healing.conftest import FORMATS, IDS


def logits(model):
    with torch.no_grad():
        return model(IDS[:1]).logits


def test_student_is_the_model_of_the_factors(student, load, factors):
    """Within the block; outside of it the model is dense again."""
    made, dense, expected = student(), load(), load()
    for attention, layer in zip(attention_modules(expected), factors, strict=True):
        natural = sorted(range(4), key=layer.layout.head_order.__getitem__)
        for name, product in zip(("k_proj", "v_proj"), layer.products(), strict=True):
            heads = product.unflatten(0, (4, -1))[natural].flatten(0, 1)
            getattr(attention, name).weight.data.copy_(heads)
    with made.compressed():
        torch.testing.assert_close(logits(made.model), logits(expected))
        assert not torch.allclose(logits(made.model), logits(dense), atol=1e-2)
    torch.testing.assert_close(logits(made.model), logits(dense), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["int4", "bands"])
@pytest.mark.parametrize("index", [0, 1])
def test_gradients_pass_the_rounding_of_latents(student, name, index):
    rounded = student(*FORMATS[name]).layers[index].factors
    plain = student().layers[index].factors
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(2))
    weight = torch.randn(5, len(rounded.down()), generator=torch.Generator().manual_seed(3))
    for layer in (rounded, plain):
        (layer.latents(x) * weight).sum().backward()
    expected = FORMATS[name][index].round_trip(plain.latents(x))
    torch.testing.assert_close(rounded.latents(x), expected)
    torch.testing.assert_close(rounded.down.unit.grad, plain.down.unit.grad)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_keys_and_values_share_latents(student, checkpointing, monkeypatch):
    """They are computed once a layer and pass; gradients those of latents that are not shared."""
    computed, latents = [], TrainedFactors.latents

    def counted(self, x):
        computed.append(self)
        return latents(self, x)

    def gradients():
        made = student(*FORMATS["bands"])
        if checkpointing:
            made.model.train()
            made.model.gradient_checkpointing_enable({"use_reentrant": False})
        with made.compressed():
            hidden_states(made.model, IDS[0], gradient=True).square().sum().backward()
        return [parameter.grad for parameter in made.parameters()]

    monkeypatch.setattr(TrainedFactors, "latents", counted)
    found = gradients()
    assert len(computed) == (4 if checkpointing else 2)
    monkeypatch.setattr(TrainedFactors, "shared_latents", latents)
    for shared, own in zip(found, gradients(), strict=True):
        torch.testing.assert_close(shared, own)


def test_divergence_and_its_gradient(load, monkeypatch):
    monkeypatch.setattr("recalkv_vllm.compression.healing.distillation.LOGIT_CHUNK", 5)
    model = load().double()
    teacher, hidden = torch.randn(2, 12, 96, dtype=torch.float64)
    hidden.requires_grad_(True)
    student = hidden.detach().requires_grad_(True)
    found, gradient = divergence(model, teacher, student), student.grad
    target, predicted = (F.softmax(model.lm_head(x), dim=-1) for x in (teacher, hidden))
    expected = (target * (target / predicted).log()).sum()
    expected.backward()
    assert found == pytest.approx(float(expected.detach()), rel=1e-4)
    torch.testing.assert_close(gradient, hidden.grad, rtol=1e-3, atol=1e-5)
    assert divergence(model, teacher, teacher) == pytest.approx(0, abs=1e-6)
