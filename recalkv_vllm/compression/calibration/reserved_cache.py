"""A cache of transformers whose memory is reserved at once.

transformers' own copies all that is cached for every token: two fifths of the time in which a small
model writes its calibration text.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer


class ReservedLayer(DynamicLayer):
    """Keys and values of a layer, ``[rows, heads, tokens so far, head_dim]`` each."""

    def __init__(self, tokens: int):
        super().__init__()
        self._tokens = tokens

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Called once, with the first ``[rows, heads, tokens, head_dim]``."""
        super().lazy_initialization(key_states, value_states)
        self._reserved = tuple(
            states.new_empty(*states.shape[:2], self._tokens, states.shape[3])
            for states in (key_states, value_states)
        )
        self.keys, self.values = (reserved[:, :, :0] for reserved in self._reserved)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append; returns all keys and values so far, as views of the reserved memory."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        for reserved, states in zip(self._reserved, (key_states, value_states), strict=True):
            reserved[:, :, start:end] = states
        self.keys, self.values = (reserved[:, :, :end] for reserved in self._reserved)
        return self.keys, self.values


def reserved_cache(config: PretrainedConfig, tokens: int) -> DynamicCache:
    """transformers' cache for a model; layers without a window reserve ``tokens`` at once."""
    cache = DynamicCache(config=config)
    cache.layers = [
        ReservedLayer(tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache
