"""Compression methods by name."""

from recalkv_vllm.compression.methods.base import ALLOCATIONS, Method
from recalkv_vllm.compression.methods.palu import Palu
from recalkv_vllm.compression.methods.recalkv import Recalkv
from recalkv_vllm.compression.methods.svd import Svd

METHODS: dict[str, type[Method]] = {method.name: method for method in (Recalkv, Palu, Svd)}

__all__ = ["ALLOCATIONS", "METHODS", "Method"]
