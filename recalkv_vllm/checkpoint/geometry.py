"""Sizes of a decoder's attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recalkv_vllm.architectures import KeyNorm, key_norm, language_config
from recalkv_vllm.checkpoint.errors import brief, is_int, require
from recalkv_vllm.checkpoint.files import CONFIG_FILE


@dataclass(frozen=True, slots=True)
class AttentionGeometry:
    """Sizes of a decoder's attention, read from a Hugging Face config.

    Args:
        key_norm: what one norm of keys is over, if there are norms.
        windows_differ: some layers have a sliding window and some do not.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    key_norm: KeyNorm | None = None
    windows_differ: bool = False

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> AttentionGeometry:
        """Read the geometry out of a config dictionary (``config.json`` or ``to_dict()``)."""
        config = language_config(config)
        heads = _size(config, "num_attention_heads")
        hidden_size = _size(config, "hidden_size")
        return cls(
            num_layers=_size(config, "num_hidden_layers"),
            hidden_size=hidden_size,
            num_heads=heads,
            num_kv_heads=_size(config, "num_key_value_heads", heads),
            head_dim=_size(config, "head_dim", hidden_size // heads),
            key_norm=key_norm(config),
            windows_differ=_windows_differ(config.get("layer_types")),
        )

    def key_scales(self, num_kv_heads: int | None = None) -> int:
        """Scales of keys that a token's latent comes with, in a layer's cache of so many heads.

        Args:
            num_kv_heads: that one rank caches; None for all.
        """
        if num_kv_heads is None:
            num_kv_heads = self.num_kv_heads
        return {None: 0, "head": num_kv_heads, "token": 1}[self.key_norm]

    @property
    def dense_width(self) -> int:
        """Elements that an uncompressed cache holds per token and layer."""
        return 2 * self.num_kv_heads * self.head_dim


def _windows_differ(layer_types: Any) -> bool:
    return isinstance(layer_types, (list, tuple)) and len(set(map(str, layer_types))) > 1


def _size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A positive number of a Hugging Face config; ``default`` where it is absent or null."""
    value: Any = config.get(name)
    if value is None:
        require(default is not None, f"{CONFIG_FILE}: {name} is missing")
        value = default
    # A model's numbers of everything fit in 31 bits; a larger one would overflow products.
    require(
        is_int(value) and 0 < value < 1 << 31,
        f"{CONFIG_FILE}: {name}: expected a positive integer, found {brief(value)}",
    )
    return value
