"""How long attention takes to decode: counted, for a layer's layout on a device.

The offline tool asks it what a layout would take, and the server which of two kernels is the faster
one. What kernels spend is in :mod:`.triton` and :mod:`.hopper`, which tests hold against compiled
ones.
"""

from recalkv_vllm.cost.decode import decode_seconds, dense_seconds, relative_decode_time
from recalkv_vllm.cost.devices import CPUS, GPUS, Cpu, Device, Gpu, device_named
from recalkv_vllm.cost.layer import LayerCost

__all__ = [
    "CPUS",
    "GPUS",
    "Cpu",
    "Device",
    "Gpu",
    "LayerCost",
    "decode_seconds",
    "dense_seconds",
    "device_named",
    "relative_decode_time",
]
