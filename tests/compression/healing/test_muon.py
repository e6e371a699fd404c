"""Steps of one size, in all directions of a matrix."""

import pytest
import torch

from recalkv_vllm.compression.healing.muon import MOMENTUM, Muon, orthogonalized

#: Where the polynomial leaves singular values, and a margin for rounding to bfloat16.
NEAR_ONE = (0.6, 1.3)


def matrices(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(24, 96), (96, 24), (48, 48), (2, 48, 16), (3, 16, 80)], ids=str)
def test_orthogonalized(shape):
    """Whatever the size of the matrix; singular vectors stay."""
    left, values, right = torch.linalg.svd(matrices(*shape), full_matrices=False)
    matrix = 1e-5 * left @ torch.diag_embed(values.clamp(0.1 * values.max())) @ right
    found = orthogonalized(matrix.float()).double()
    inner = left.mT @ found @ right.mT
    diagonal = inner.diagonal(dim1=-2, dim2=-1)
    assert NEAR_ONE[0] < diagonal.min() <= diagonal.max() < NEAR_ONE[1]
    assert (inner - torch.diag_embed(diagonal)).abs().max() < 0.05


def test_no_gradient_is_no_step():
    assert torch.equal(orthogonalized(torch.zeros(2, 8, 16)), torch.zeros(2, 8, 16).bfloat16())


def test_steps():
    parameter = torch.nn.Parameter(torch.zeros(48, 96))
    optimizer = Muon([parameter])
    gradients = matrices(2, 48, 96).float()
    momentum, expected = torch.zeros(48, 96), torch.zeros(48, 96)
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step(0.01)
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
        ahead = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
        left, _, right = torch.linalg.svd(ahead, full_matrices=False)
        expected -= 0.01 * 96**0.5 * left @ right
    found = parameter.detach()
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0)
    assert cosine > 0.95
    assert 0.7 < float(found.norm() / expected.norm()) < 1.2
