"""Sizes of a decoder's attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recalkv_vllm.architectures import KeyNorm, attention_layers, key_norm, language_config
from recalkv_vllm.checkpoint.errors import brief, is_int, require
from recalkv_vllm.checkpoint.files import CONFIG_FILE


@dataclass(frozen=True, slots=True)
class AttentionGeometry:
    """Sizes of a decoder's attention, read from a Hugging Face config.

    Args:
        num_layers: layers with attention.
        key_norm: what one norm of keys is over, if there are norms.
        kinds_differ: layers are of several kinds: with and without a sliding window, or with and
            without attention. vLLM makes the cache pages of all of them equally large.
        decoder_layers: of a hybrid model, which of its decoder layers the ``num_layers`` are; None
            where all decoder layers have attention.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    key_norm: KeyNorm | None = None
    kinds_differ: bool = False
    decoder_layers: tuple[int, ...] | None = None

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> AttentionGeometry:
        """Read the geometry out of a config dictionary (``config.json`` or ``to_dict()``)."""
        config = language_config(config)
        heads = _size(config, "num_attention_heads")
        hidden_size = _size(config, "hidden_size")
        num_layers = _size(config, "num_hidden_layers")
        layers = attention_layers(config, num_layers)
        require(
            bool(layers),
            f"{CONFIG_FILE}: layer_types: expected a kind for each layer, and "
            "layers with attention among them",
        )
        assert layers is not None
        return cls(
            num_layers=len(layers),
            hidden_size=hidden_size,
            num_heads=heads,
            num_kv_heads=_size(config, "num_key_value_heads", heads),
            head_dim=_size(config, "head_dim", hidden_size // heads),
            key_norm=key_norm(config),
            kinds_differ=_differ(config.get("layer_types") or config.get("layers_block_type")),
            decoder_layers=None if len(layers) == num_layers else tuple(layers),
        )

    @property
    def layer_indices(self) -> Sequence[int]:
        """Of the layers with attention, in the model's decoder."""
        return range(self.num_layers) if self.decoder_layers is None else self.decoder_layers

    def position(self, decoder_layer: int) -> int | None:
        """Where a decoder layer is among those with attention; None if it is not."""
        if self.decoder_layers is None:
            return decoder_layer if 0 <= decoder_layer < self.num_layers else None
        found = decoder_layer in self.decoder_layers
        return self.decoder_layers.index(decoder_layer) if found else None

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


def _differ(layer_types: Any) -> bool:
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
