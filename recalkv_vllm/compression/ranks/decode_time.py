"""Time that attention takes to decode, predicted for what a layer or a model is to be cut into."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from recalkv_vllm.band_format import BandFormat, CacheFormat, token_bytes
from recalkv_vllm.checkpoint import AttentionGeometry, LatentLayout
from recalkv_vllm.compression.ranks.targets import Target
from recalkv_vllm.cost import (
    Device,
    LayerCost,
    decode_seconds,
    dense_seconds,
    relative_decode_time,
)


def layer_cost(
    layout: LatentLayout, latent_format: CacheFormat | None, geometry: AttentionGeometry
) -> LayerCost:
    """A layer as its decode time depends on it; plain elements have 16 bits."""
    heads = geometry.num_kv_heads
    return LayerCost(
        num_heads=geometry.num_heads,
        num_kv_heads=heads,
        head_dim=geometry.head_dim,
        k_group_size=layout.k_group_size,
        v_group_size=heads // len(layout.v_spans),
        k_width=layout.k_width,
        v_width=layout.v_width,
        shared=_shared_columns(layout),
        token_bytes=token_bytes(latent_format, layout.rank, 2),
        code_bits=most_code_bits(latent_format),
        bands=isinstance(latent_format, BandFormat),
    )


def most_code_bits(latent_format: CacheFormat | None) -> int | None:
    """Bits of the widest codes; None of plain elements."""
    if isinstance(latent_format, BandFormat):
        return max(band.bits for band in latent_format.bands)
    return None if latent_format is None else latent_format.bits


def _shared_columns(layout: LatentLayout) -> int:
    """Columns of the first K span that the V span of the same heads has too."""
    (k_start, k_end), (v_start, v_end) = layout.k_spans[0], layout.v_spans[0]
    return max(0, min(k_end, v_end) - max(k_start, v_start))


def model_decode_time(
    layouts: Sequence[LatentLayout],
    format_of: Callable[[int], CacheFormat | None],
    geometry: AttentionGeometry,
    device: Device,
) -> float:
    """Time of all layers' attention, as a fraction of the dense cache's.

    Args:
        layouts: of all layers.
        format_of: how a layer's latents are stored.
        geometry: of the model.
        device: to serve on.
    """
    layers = (layer_cost(layout, format_of(i), geometry) for i, layout in enumerate(layouts))
    return relative_decode_time(layers, device)


class LayerTimes:
    """Predicted times of the ways to cut up one layer, as fractions of the dense cache's.

    Args:
        geometry: of the model.
        spans: one of :data:`recalkv_vllm.names.SPAN_KINDS`.
        k_group_size: KV heads per K group.
        v_groups: V groups, of ``split`` spans.
        target: device to serve on; without one, nothing takes time.
        bands: whether latents are in bands.
    """

    def __init__(
        self,
        geometry: AttentionGeometry,
        spans: str,
        k_group_size: int,
        v_groups: int,
        target: Target,
        bands: bool,
    ):
        self.split = spans == "split"
        self._geometry = geometry
        self._k_group_size = k_group_size
        heads = geometry.num_kv_heads
        self._v_group_size = heads // v_groups if self.split else k_group_size
        self._device = target.device
        self._bands = bands

    def __call__(self, k_width: int, v_width: int, nbytes: int, code_bits: int | None) -> float:
        """Of a layer with such spans that takes ``nbytes`` per cached token."""
        if self._device is None:
            return 0.0
        layer = LayerCost(
            num_heads=self._geometry.num_heads,
            num_kv_heads=self._geometry.num_kv_heads,
            head_dim=self._geometry.head_dim,
            k_group_size=self._k_group_size,
            v_group_size=self._v_group_size,
            k_width=k_width,
            v_width=v_width,
            shared=0 if self.split else k_width,
            token_bytes=nbytes,
            code_bits=code_bits,
            bands=self._bands,
        )
        return decode_seconds(layer, self._device) / dense_seconds(layer, self._device)
