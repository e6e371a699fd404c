"""Calls of registered torch ops as their wrappers make them, to check how the ops can be traced."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class RecordedCalls(TorchDispatchMode):
    """Context manager that keeps calls ``(op, arguments)`` of a namespace's ops on tensors."""

    def __init__(self, namespace: str):
        super().__init__()
        self.namespace = namespace
        self.calls: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if op.namespace == self.namespace and _takes_tensors(op._schema):
            assert not kwargs
            self.calls.append((op, args))
        return op(*args, **(kwargs or {}))

    def check(self, *names: str) -> None:
        """Run ``torch.library.opcheck`` on every call; ``names`` are the ops that were called.

        Raises:
            OpCheckError: an op whose schema, fake implementation or dispatch is not right.
        """
        assert {op._schema.name for op, _ in self.calls} == set(names)
        for op, arguments in self.calls:
            torch.library.opcheck(op, arguments)


def ops_on_tensors(namespace: str) -> set[str]:
    """Names of the ops registered in ``namespace`` that take tensors, as schemas spell them."""
    return {
        schema.name
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith(f"{namespace}::") and _takes_tensors(schema)
    }


def _takes_tensors(schema: Any) -> bool:
    return any(isinstance(argument.type, torch.TensorType) for argument in schema.arguments)
