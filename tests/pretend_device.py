"""A second device that is none: memory of its own by name, computing on the CPU.

Within :class:`PretendDevice`, ``torch.device("pretend")`` behaves as a GPU does towards a program:
tensors move there and back, an op whose operands lie on different devices fails, and NumPy sees
none of its memory. So a CPU tells whether code would run on a GPU with all tensors in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME = "pretend"
aten = torch.ops.aten
#: Ops between devices.
MOVES = (aten._to_copy.default, aten.copy_.default)
#: Ops whose indices may be in memory; a GPU takes them from there.
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


class Backend(_DummyBackendModule):
    """The device stays known to the process; nothing else of it shall take the device for its
    accelerator."""

    def is_available(self) -> bool:
        return False


@cache
def _register() -> None:
    _setup_privateuseone_for_python_backend(NAME, backend_module=Backend())


class PretendTensor(torch.Tensor):
    """A tensor of the device; ``memory`` holds its elements."""

    memory: torch.Tensor

    @staticmethod
    def __new__(cls, memory: torch.Tensor) -> PretendTensor:
        made: PretendTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            memory.shape,
            strides=memory.stride(),
            storage_offset=memory.storage_offset(),
            dtype=memory.dtype,
            device=torch.device(NAME, 0),
        )
        made.memory = memory
        return made

    def tolist(self) -> Any:
        return self.memory.tolist()

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with PretendDevice():
            return func(*args, **(kwargs or {}))


class PretendDevice(TorchDispatchMode):
    """Makes the device known as long as it is entered."""

    def __init__(self) -> None:
        _register()
        super().__init__()

    def __enter__(self) -> PretendDevice:
        # torch.tensor then makes its result in memory and moves it by an op, which comes here.
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        torch._C._set_only_lift_cpu_tensors(self._lifted)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with self:
            # In inference mode, ops made of others come as they are.
            result = func.decompose(*args, **(kwargs or {}))
        return _call(func, args, kwargs or {}) if result is NotImplemented else result


def _each_tensor(change: Callable[[torch.Tensor], torch.Tensor], tree: Any) -> Any:
    return tree_map(lambda x: change(x) if isinstance(x, torch.Tensor) else x, tree)


def _memory(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.memory if isinstance(tensor, PretendTensor) else tensor


def _check_devices(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    operands = (args[0], args[2:]) if func in INDEXED else (args, kwargs)
    tensors = [x for x in tree_leaves(operands) if isinstance(x, torch.Tensor)]
    devices = {isinstance(x, PretendTensor) for x in tensors if x.dim()}
    if len(devices) > 1:
        found = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in tensors)
        raise RuntimeError(f"{func}: expected all tensors on one device, found {found}")


def _call(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if func not in MOVES:
        _check_devices(func, args, kwargs)
    there = any(isinstance(x, PretendTensor) for x in tree_leaves((args, kwargs)))
    if func is aten.copy_.default:
        there = isinstance(args[0], PretendTensor)
    if (device := kwargs.get("device")) is not None:
        there = torch.device(device).type == NAME
        if there:
            kwargs = {**kwargs, "device": torch.device("cpu")}
    plain_args, plain_kwargs = _each_tensor(_memory, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    if not there:
        return result
    # What an op returns of its arguments, as one in place does, is the argument itself.
    known = {id(_memory(x)): x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
    return _each_tensor(lambda x: known[id(x)] if id(x) in known else PretendTensor(x), result)
