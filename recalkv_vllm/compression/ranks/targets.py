"""How much reconstruction a machine does for free: FLOP per cached byte that decoding may cost.

Decoding reads ``2 · rank`` bytes per cached token and layer (bf16) and spends ``2 · w_k · s · d``
FLOP per K group on reconstructing keys. Below the ratio of a machine's matrix rate to its memory
rate reconstruction hides behind the reading.
"""

from __future__ import annotations

import math

import torch

from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.ranks.cpu_rates import cpu_rates

#: H100: 990 TFLOP/s (dense bf16) over 3.35 TB/s is 295 FLOP per byte at peak; 200 supposes that
#: kernels reach two thirds of the matrix rate. A100: 312 TFLOP/s over 1.56 (40 GB) or 2.04 TB/s
#: (80 GB) is 200 or 153 at peak; at two thirds of that, reconstruction at 200 takes up to twice as
#: long as reading latents, so a half-size cache is still no slower than the dense one. CPU: the
#: AVX-512 kernel takes about the time of the dense one for half the cache at 64. A processor with
#: AMX multiplies four times as fast and more beside the same memory; its kernel was not timed yet.
TARGETS = {"h100": 200.0, "a100": 200.0, "cpu-amx": 256.0, "cpu": 64.0, "none": math.inf}

#: FLOP of matrix products per byte from memory from which on AMX is there to be used: 60 to 100 on
#: idle machines; without, 10 to 20. Less is what a machine without permission for AMX has.
AMX_FLOP_PER_BYTE = 40.0


def chosen_target(target: str) -> str:
    """What ``--target`` stands for: of ``auto``, the device at hand.

    ``h100`` for any GPU that is no A100, and for a processor that our kernels do not run on: nobody
    will serve there. With AMX, a CPU goes by its measured rates.

    Raises:
        OutputError: the rates cannot be kept in the cache directory.
    """
    if target != "auto":
        return target
    if torch.cuda.is_available():
        return "a100" if torch.cuda.get_device_capability()[0] == 8 else "h100"
    capabilities = torch.cpu.get_capabilities()
    if not capabilities.get("avx2"):
        return "h100"
    fast = capabilities.get("amx_bf16") and cpu_rates().flop_per_byte >= AMX_FLOP_PER_BYTE
    return "cpu-amx" if fast else "cpu"


def flop_per_byte(target: str) -> float:
    """The budget of a target named in :data:`TARGETS`, or given as a number.

    Raises:
        InputError: neither a known name nor a positive number.
    """
    if target in TARGETS:
        return TARGETS[target]
    try:
        budget = float(target)
    except ValueError:
        budget = math.nan
    if not budget > 0:
        raise InputError(
            f"target {target!r}: expected auto, {', '.join(TARGETS)}, or a positive number of "
            "FLOP per cached byte"
        )
    return budget
