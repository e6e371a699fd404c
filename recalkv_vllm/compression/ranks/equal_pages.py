"""Layers of which none takes more bytes than its equal share of the budget.

Where some layers have a sliding window and some do not, or no attention, vLLM makes the cache pages
of all layers as large as the largest. So what one layer takes, all do, and a layer that takes less
frees no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic

import numpy as np

from recalkv_vllm.compression.ranks.few_shapes import Candidates, Shape
from recalkv_vllm.compression.ranks.two_budgets import LayerWays


class EqualPages(Generic[Shape]):
    """The candidates whose bytes every layer can have.

    Args:
        candidates: to choose from.
        budget: steps of all layers together.
    """

    def __init__(self, candidates: Candidates[Shape], budget: int):
        self._candidates = candidates
        most = budget // len(candidates.layers)
        self._kept = [np.flatnonzero(ways.costs <= most) for ways in candidates.layers]
        self.layers = [
            LayerWays(ways.costs[kept], ways.losses[kept], ways.times[kept])
            for ways, kept in zip(candidates.layers, self._kept, strict=True)
        ]

    @property
    def possible(self) -> bool:
        """Whether every layer has a way within its share."""
        return all(kept.size for kept in self._kept)

    def shape(self, layer: int, way: int) -> Shape:
        """See :class:`.few_shapes.Candidates`."""
        return self._candidates.shape(layer, int(self._kept[layer][way]))

    def at(self, shapes: Sequence[Shape]) -> list[LayerWays]:
        """See :class:`.few_shapes.Candidates`; a shape takes the same bytes in every layer."""
        return self._candidates.at(shapes)
