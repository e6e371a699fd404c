"""Memory that a program wants pinned for a GPU is ordinary memory; loaded before any program."""

import torch

_zeros = torch.zeros


def zeros(*size, pin_memory=False, **options):
    return _zeros(*size, **options)


torch.zeros = zeros
torch.Tensor.pin_memory = lambda self, *_: self
