"""Set before any test module, or what it imports, imports torch or Triton."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: one thread each, and no engine that binds all of them to the same.
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

import torch

if not torch.cuda.is_available():
    # Triton decides when its own library is imported whether kernels are interpreted.
    os.environ["TRITON_INTERPRET"] = "1"
