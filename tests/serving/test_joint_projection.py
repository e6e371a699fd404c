"""Queries and latents by one product: the projections' own results, whatever is loaded when."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

from recalkv_vllm.serving.model.joint_projection import JointProjection, can_be_joined

HIDDEN = 64
WIDTHS = (96, 48)


class Projection(nn.Module):
    """One of vLLM's, as far as it is looked at; its own constructor wants a whole engine."""

    def __init__(self, width, dtype, biased):
        super().__init__()
        self.input_size, self.params_dtype = HIDDEN, dtype
        self.quant_method = UnquantizedLinearMethod()
        self.bias = nn.Parameter(torch.randn(width, dtype=dtype)) if biased else None
        self.load(width)

    def load(self, width):
        self.loaded = torch.randn(width, HIDDEN, dtype=self.params_dtype)
        self.weight = nn.Parameter(self.loaded, requires_grad=False)
        dispatch_cpu_unquantized_gemm(self, remove_weight=True)

    def expected(self, x):
        made = x.double() @ self.loaded.double().T
        return made if self.bias is None else made + self.bias.double()


def both(dtype, biased):
    torch.manual_seed(0)
    return [Projection(WIDTHS[0], dtype, biased), Projection(WIDTHS[1], dtype, False)]


def check(joint, projections, x):
    error = 2**-6 if x.dtype == torch.bfloat16 else 1e-4
    for made, each in zip(joint(x), projections, strict=True):
        alone = each.quant_method.apply(each, x, each.bias)
        for found in (made, alone):
            torch.testing.assert_close(found.double(), each.expected(x), rtol=error, atol=error)


@torch.inference_mode()
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7])
def test_both_at_once_and_each_alone(dtype, biased, tokens):
    projections = both(dtype, biased)
    joint = JointProjection(projections)
    joint.pack()
    check(joint, projections, torch.randn(tokens, HIDDEN, dtype=dtype))


@torch.inference_mode()
@pytest.mark.parametrize("reloaded", [(), (0,), (1,), (0, 1)])
def test_a_reload_may_bring_one_alone(reloaded):
    projections = both(torch.bfloat16, biased=True)
    joint = JointProjection(projections)
    joint.pack()
    x = torch.randn(3, HIDDEN, dtype=torch.bfloat16)
    before = joint(x)
    for i in reloaded:
        projections[i].load(WIDTHS[i])
    joint.pack()
    check(joint, projections, x)
    for i, (old, new) in enumerate(zip(before, joint(x), strict=True)):
        assert old.equal(new) == (i not in reloaded)


def test_quantized_projections_stay_apart():
    projections = both(torch.bfloat16, biased=False)
    assert can_be_joined(projections)
    projections[0].quant_method = SimpleNamespace()
    assert not can_be_joined(projections)
