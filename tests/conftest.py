"""Set before any test module, or what it imports, imports Triton."""

import os

import torch

if not torch.cuda.is_available():
    # Triton decides when its own library is imported whether kernels are interpreted.
    os.environ["TRITON_INTERPRET"] = "1"
