"""The device, as far as launch parameters depend on it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

#: Largest shared memory of one program in bytes, by compute capability; of others, the smallest.
SHARED_BYTES = {
    80: 163 << 10,
    86: 99 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    103: 227 << 10,
    120: 99 << 10,
}
#: Families of architectures, by the first digits of the compute capability.
HOPPER = (9,)
BLACKWELL = (10,)
#: Matrix operands are read from shared memory (wgmma, tcgen05).
WIDE_MMA = HOPPER + BLACKWELL
#: Matrix operands are in registers (mma.sync): Ampere, Ada and GeForce Blackwell.
NARROW_MMA = (8, 12)
EVERY = NARROW_MMA + WIDE_MMA


@dataclass(frozen=True, slots=True)
class Target:
    """A device.

    Args:
        arch: compute capability without the dot.
        num_sms: multiprocessors.
    """

    arch: int
    num_sms: int

    @property
    def family(self) -> int:
        """First digits of the compute capability."""
        return self.arch // 10

    @property
    def shared_bytes(self) -> int:
        """Largest shared memory of one program."""
        return SHARED_BYTES.get(self.arch, min(SHARED_BYTES.values()))


#: Small enough that tests cross every boundary: tiles, splits, query blocks.
INTERPRETER = Target(arch=0, num_sms=2)


@cache
def target_of(device: torch.device) -> Target:
    """Read the target off a device; tensors on the CPU mean the interpreter."""
    if device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    return Target(10 * major + minor, num_sms)
