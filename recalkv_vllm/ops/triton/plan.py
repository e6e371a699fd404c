"""How one layer's attention is cut into launches; tuning choices are those of ``heuristics``."""

from __future__ import annotations

from dataclasses import dataclass

from recalkv_vllm.band_format import BandFormat, CacheFormat
from recalkv_vllm.kernels import heuristics
from recalkv_vllm.kernels.columns import Columns, next_power_of_2, plan_columns
from recalkv_vllm.ops.contract import Batch, BatchLimits, LatentLayer
from recalkv_vllm.ops.triton.layout import padded_head_dim
from recalkv_vllm.ops.triton.work_list import Cut
from recalkv_vllm.ops.workspace import partial_bytes


@dataclass(frozen=True, slots=True)
class Part:
    """Sequences of one call that share a launch: from ``first`` on, ``count`` of them.

    ``tokens`` is a range of rows of ``q``: those that they own, and of a padded batch those of no
    sequence after them. No sequence has more than ``queries`` if ``bounded``, else ``queries`` is
    only what is usual.
    """

    first: int
    count: int
    tokens: range
    queries: int
    bounded: bool

    @property
    def sequences(self) -> range:
        return range(self.first, self.first + self.count)

    @classmethod
    def decodes(cls, batch: Batch) -> Part:
        """The decodes that hints tell of."""
        tokens = range(batch.num_decode_tokens)
        return cls(0, batch.num_decodes, tokens, batch.max_decode_query_len, bounded=True)

    @classmethod
    def rest(cls, batch: Batch, num_tokens: int) -> Part:
        """All other sequences of a batch of ``num_tokens`` rows, of any lengths."""
        first, tokens = batch.num_decodes, range(batch.num_decode_tokens, num_tokens)
        count = batch.num_seqs - first
        usual = next_power_of_2(max(1, len(tokens) // max(1, count)))
        return cls(first, count, tokens, usual, bounded=False)


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """Parameters of a part's launch.

    Args:
        columns: chunks of the spans for each launch, by the blocks of value columns that it owns.
        blocks: query blocks.
        cut: how the cached tokens are cut into pieces; None if they are not.
        search: programs find the sequence of their query block, if nothing is cut.
    """

    config: heuristics.AttentionConfig
    columns: tuple[tuple[range, Columns], ...]
    blocks: int
    cut: Cut | None
    search: bool


def most_code_bits(latent_format: CacheFormat | None) -> int | None:
    """Bits of the widest codes; None if latents are not quantized."""
    if latent_format is None:
        return None
    if isinstance(latent_format, BandFormat):
        return max(band.bits for band in latent_format.bands)
    return latent_format.bits


class AttentionPlanner:
    """Launch parameters of one layer's attention on one device.

    Args:
        local_rope: the rotation by an offset in a tile is known, see ``layout.local_rotation``.
    """

    def __init__(self, layer: LatentLayer, target: heuristics.Target, local_rope: bool):
        self.layer, self.target, self.local_rope = layer, target, local_rope
        self.num_kv_heads, self.v_width = layer.num_kv_heads, layer.v_width
        self._spans = (layer.head_k_spans, layer.head_v_spans)
        self._shapes: dict[int, heuristics.AttentionShape] = {}
        self._columns: dict[int, tuple[tuple[range, Columns], ...]] = {}

    def plan(self, part: Part, num_heads: int, longest: int) -> LaunchPlan:
        """Parameters for a part whose sequences have up to ``longest`` tokens."""
        config = heuristics.attention_config(self.shape(num_heads), self.target, part.queries)
        # Every row has a place in some program: without a search, there are `queries` per sequence.
        placed = len(part.tokens) <= part.count * part.queries
        search = not (part.bounded and placed) or config.query_block < part.queries
        blocks = part.count
        if search:
            block = config.query_block
            blocks += part.tokens.stop // block - part.tokens.start // block
        cut = self._cut(config, blocks, num_heads, longest)
        return LaunchPlan(config, self.columns(config.v_block), blocks, cut, search)

    def shape(self, num_heads: int) -> heuristics.AttentionShape:
        """What launch parameters depend on."""
        if num_heads not in self._shapes:
            self._shapes[num_heads] = self._shape(num_heads)
        return self._shapes[num_heads]

    def columns(self, v_block: int) -> tuple[tuple[range, Columns], ...]:
        """Chunks of the spans for programs that own ``v_block`` value columns.

        Without bands all blocks of value columns are alike and one launch; bands, which kernels
        are compiled for, differ from block to block.
        """
        if v_block not in self._columns:
            blocks = range(self.v_width // v_block)
            bands = self.layer.latent_format
            if isinstance(bands, BandFormat):
                self._columns[v_block] = tuple(
                    (range(i, i + 1), plan_columns(*self._spans, v_block, i, bands)) for i in blocks
                )
            else:
                self._columns[v_block] = ((blocks, plan_columns(*self._spans, v_block)),)
        return self._columns[v_block]

    def workspace_bytes(self, limits: BatchLimits) -> int:
        """Largest workspace that any call needs, with decodes within ``limits``."""
        shape = self.shape(limits.num_heads)
        lengths = {limits.decode_query_len, *heuristics.query_lengths()}
        configs = {heuristics.attention_config(shape, self.target, n) for n in lengths}
        return max(self._most_bytes(config, limits) for config in configs)

    def _most_bytes(self, config: heuristics.AttentionConfig, limits: BatchLimits) -> int:
        """Of calls with one configuration: more row blocks have more pieces, until none are cut."""
        most, blocks = 0, 1
        while cut := self._cut(config, blocks, limits.num_heads, limits.seq_len):
            rows = cut.bounds.capacity * self.num_kv_heads * cut.rows
            most, blocks = max(most, partial_bytes(rows, self.v_width)), blocks + 1
        return most

    def _shape(self, num_heads: int) -> heuristics.AttentionShape:
        layer = self.layer
        ((_, columns),) = self.columns(self.v_width)
        return heuristics.AttentionShape(
            queries_per_kv=num_heads // self.num_kv_heads,
            num_kv_heads=self.num_kv_heads,
            k_group_size=layer.k_group_size,
            heads_per_v=layer.heads_per_v,
            dim=padded_head_dim(layer),
            k_width=layer.k_width,
            v_width=self.v_width,
            itemsize=layer.k_up.element_size(),
            shared_columns=sum(size for _, size, *_, shared in columns.k if shared >= 0),
            local_rope=self.local_rope,
            rope=layer.rot_dim > 0,
            key_bias=layer.k_bias is not None,
            key_norm=layer.key_scales > 0,
            code_bits=most_code_bits(layer.latent_format),
            bands=isinstance(layer.latent_format, BandFormat),
        )

    def _cut(
        self, config: heuristics.AttentionConfig, blocks: int, num_heads: int, longest: int
    ) -> Cut | None:
        programs = self.num_kv_heads // config.heads * (self.v_width // config.v_block)
        tiles = -(-longest // config.tile)
        bounds = heuristics.piece_bounds(blocks, programs, self.target, tiles)
        if bounds is None:
            return None
        per_kv = num_heads // self.num_kv_heads
        window = self.layer.sliding_window or 0
        return Cut(config.query_block * per_kv, per_kv, config.tile, window, bounds)
