"""Answers for an H100 what torch would ask a driver.

Python imports this before anything else, in all processes of vLLM, where this folder is on
``PYTHONPATH``. The libraries of ``driver.c`` answer the rest. Whatever would use the device fails.
"""

from types import SimpleNamespace

import torch

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    total_memory=80 << 30,
    multi_processor_count=132,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    is_integrated=0,
)

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_name = lambda device=None: H100.name
torch.cuda.get_device_capability = lambda device=None: (H100.major, H100.minor)
torch.cuda.get_device_properties = lambda device=None: H100
torch.cuda.is_current_stream_capturing = lambda: False
