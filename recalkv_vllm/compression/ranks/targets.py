"""What a checkpoint is made for: a device, and how long decoding may take there."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.ranks.cpu_rates import cpu_rates
from recalkv_vllm.cost import CPUS, GPUS, Device, device_named

#: The name of no device: accuracy alone counts.
NONE = "none"
NAMES = (*GPUS, *CPUS)

#: Limits of decode time as a fraction of the dense cache's, by the fraction of bytes removed: on
#: straight lines between these points, and constant outside.
Limits = tuple[tuple[float, float], ...]
#: On a GPU time of elements follows bytes: 0.67 at 50 %, 0.45 at 75 %, one line.
GPU_ELEMENT_LIMITS: Limits = ((0.125, 1.0), (0.5, 0.67), (0.75, 0.45), (1.0, 0.23))
#: Codes take as long as their columns take to unpack, however few their bytes are; no longer than
#: the dense cache.
GPU_CODE_LIMITS: Limits = ((0.0, 1.0),)
#: On a CPU arithmetic is the limit, and fewer bytes in codes save no time. What SmolLM2 takes with
#: the least loss where keys read up to 64 columns, or with AMX 256.
CODE_LIMITS: dict[str, Limits] = {
    "cpu": ((0.5, 1.15), (0.75, 1.03), (0.86, 1.2)),
    "cpu-amx": ((0.75, 0.85), (0.86, 0.95)),
}
#: Fewer elements do save time there: 64 FLOP of reconstruction for a byte (with AMX 256), and what
#: scores and values take.
ELEMENT_LIMITS: Limits = ((0.0, 2.1), (1.0, 0.1))

#: FLOP of matrix products per byte from memory from which on AMX is there to be used: 60 to 100 on
#: idle machines; without, 10 to 20. Less is what a machine without permission for AMX has.
AMX_FLOP_PER_BYTE = 40.0

#: GPUs by the first digits of the compute capability, and what is taken for all others.
FAMILIES = {(8, 0): "a100", (8, 9): "l40s", (9, 0): "h100", (10, 0): "b200", (10, 3): "b200"}
FALLBACK = "h100"


@dataclass(frozen=True, slots=True)
class Target:
    """A device to serve on, and how long decoding may take there.

    Args:
        name: of a device, or :data:`NONE`.
        limit: most time of attention in decoding, as a fraction of the dense cache's; None: what
            is usual for the device and for what is removed.
    """

    name: str = NONE
    limit: float | None = None

    @property
    def device(self) -> Device | None:
        """None: any, and time does not count."""
        return None if self.name == NONE else device_named(self.name)

    def limit_at(self, removed: float, coded: bool) -> float:
        """The limit where ``removed`` of the cache's bytes are; infinite without a device.

        Args:
            removed: fraction.
            coded: latents are codes, not elements.
        """
        if self.name == NONE:
            return math.inf
        if self.limit is not None:
            return self.limit
        if self.name in GPUS:
            points = GPU_CODE_LIMITS if coded else GPU_ELEMENT_LIMITS
        else:
            points = CODE_LIMITS[self.name] if coded else ELEMENT_LIMITS
        at, limits = zip(*points, strict=True)
        return float(np.interp(removed, at, limits))

    def __str__(self) -> str:
        return self.name if self.limit is None else f"{self.name}:{self.limit:g}"


#: Accuracy alone counts.
ANYWHERE = Target()


def parse_target(text: str) -> Target:
    """What ``--target`` stands for: ``NAME`` or ``NAME:LIMIT``; of ``auto``, the device at hand.

    Raises:
        InputError: neither.
        OutputError: the rates of this machine cannot be kept in the cache directory.
    """
    name, colon, number = text.partition(":")
    limit = None
    if colon:
        try:
            limit = float(number)
        except ValueError:
            limit = math.nan
        if not 0 < limit < math.inf or name == NONE:
            raise _unknown(text)
    if name == "auto":
        name = device_at_hand()
    if name not in (*NAMES, NONE):
        raise _unknown(text)
    return Target(name, limit)


def _unknown(text: str) -> InputError:
    return InputError(
        f"target {text!r}: expected auto, {', '.join(NAMES)} or {NONE}; all but the last may have "
        "a limit of the decode time relative to the dense cache, as in h100:0.5"
    )


def device_at_hand() -> str:
    """The name of the device that is most like this machine's.

    ``h100`` for a GPU that is like none, and for a processor that our kernels do not run on: nobody
    will serve there. With AMX, a CPU goes by its measured rates.

    Raises:
        OutputError: the rates cannot be kept in the cache directory.
    """
    if torch.cuda.is_available():
        if "H200" in torch.cuda.get_device_name():
            return "h200"
        return FAMILIES.get(torch.cuda.get_device_capability(), FALLBACK)
    capabilities = torch.cpu.get_capabilities()
    if not capabilities.get("avx2"):
        return FALLBACK
    fast = capabilities.get("amx_bf16") and cpu_rates().flop_per_byte >= AMX_FLOP_PER_BYTE
    return "cpu-amx" if fast else "cpu"
