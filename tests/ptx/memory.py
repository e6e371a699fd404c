"""Memory of the machine: tensors by their real addresses, and a block's shared memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

Bytes = np.ndarray  # of uint8


class MachineError(Exception):
    """What a GPU would fault at, or what the machine does not know."""


def bytes_of(tensor: torch.Tensor) -> tuple[int, Bytes]:
    """Address and contents of a CPU tensor's storage, not a copy."""
    storage = tensor.untyped_storage()
    size = max(1, storage.nbytes())
    pointer = (ctypes.c_uint8 * size).from_address(storage.data_ptr())
    return storage.data_ptr(), np.ctypeslib.as_array(pointer)


@dataclass(slots=True)
class Global:
    """Regions of memory, by their first addresses; all other addresses are faults."""

    regions: dict[int, Bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, tensors: Iterable[torch.Tensor]) -> Global:
        return cls(dict(bytes_of(tensor) for tensor in tensors))

    def places(
        self, addresses: np.ndarray, size: int, lanes: np.ndarray
    ) -> Iterator[tuple[Bytes, np.ndarray, np.ndarray]]:
        """Regions that lanes reach, with these lanes and their ``[n, size]`` indices.

        Raises:
            MachineError: an address in none, or no multiple of the size.
        """
        left = np.flatnonzero(lanes)
        while len(left):
            first = int(addresses[left[0]])
            if (addresses[left] % np.uint64(size)).any():
                raise MachineError(f"misaligned: {size} bytes at {first:#x} and on")
            for base, data in self.regions.items():
                if base <= first and first + size <= base + len(data):
                    break
            else:
                raise MachineError(f"{size} bytes at {first:#x} are no tensor's")
            offsets = addresses[left].astype(np.int64) - base
            inside = (offsets >= 0) & (offsets + size <= len(data))
            yield data, left[inside], offsets[inside, None] + np.arange(size)
            left = left[~inside]

    def load(self, addresses: np.ndarray, size: int, lanes: np.ndarray) -> Bytes:
        """``[32, size]``, zeros in lanes that do not load."""
        found = np.zeros((len(addresses), size), np.uint8)
        for data, own, places in self.places(addresses, size, lanes):
            found[own] = data[places]
        return found

    def store(self, addresses: np.ndarray, values: Bytes, lanes: np.ndarray) -> None:
        for data, own, places in self.places(addresses, values.shape[1], lanes):
            data[places] = values[own]


@dataclass(slots=True)
class Shared:
    """A block's shared memory; it starts as NaN."""

    data: Bytes

    @classmethod
    def of(cls, size: int) -> Shared:
        return cls(np.full(size, 0xFF, np.uint8))

    def places(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """``[n, size]`` indices.

        Raises:
            MachineError: outside of shared memory, or misaligned.
        """
        addresses = np.asarray(addresses, np.int64)
        if len(addresses) and (
            (addresses % size).any()
            or addresses.min() < 0
            or addresses.max() + size > len(self.data)
        ):
            raise MachineError(f"{size} bytes of shared memory at {sorted(set(addresses))[-3:]}")
        return addresses[:, None] + np.arange(size)

    def load(self, addresses: np.ndarray, size: int, lanes: np.ndarray) -> Bytes:
        """``[32, size]``, zeros in lanes that do not load."""
        found = np.zeros((len(addresses), size), np.uint8)
        found[lanes] = self.data[self.places(addresses[lanes], size)]
        return found

    def store(self, addresses: np.ndarray, values: Bytes, lanes: np.ndarray) -> None:
        self.data[self.places(addresses[lanes], values.shape[1])] = values[lanes]
