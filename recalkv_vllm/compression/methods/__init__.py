"""Compression methods by name."""

from typing import Any

from recalkv_vllm.compression.methods.base import Method, MethodOptions
from recalkv_vllm.compression.methods.kfac import Kfac
from recalkv_vllm.compression.methods.kfac_bands import KfacBands
from recalkv_vllm.compression.methods.palu import Palu
from recalkv_vllm.compression.methods.recalkv import Recalkv
from recalkv_vllm.compression.methods.svd import Svd

METHODS: dict[str, type[Method[Any]]] = {m.name: m for m in (Kfac, Recalkv, Palu, Svd)}

__all__ = ["METHODS", "KfacBands", "Method", "MethodOptions"]
