"""Reserved memory holds what transformers' own cache holds."""

import torch
from transformers import DynamicCache, Gemma2Config

from recalkv_vllm.compression.calibration.reserved_cache import ReservedLayer, reserved_cache

#: A layer with a window, and one without.
CONFIG = Gemma2Config(num_hidden_layers=2, sliding_window=4)


def test_layers_with_and_without_windows() -> None:
    torch.manual_seed(0)
    cache, expected = reserved_cache(CONFIG, 12), DynamicCache(config=CONFIG)
    kinds = [isinstance(layer, ReservedLayer) for layer in cache.layers]
    assert kinds == [False, True]
    for tokens in (3, 1, 1, 5, 2):
        for layer in range(2):
            new = torch.randn(2, 3, 2, tokens, 8)
            given = cache.update(*new, layer)
            for found, wanted in zip(given, expected.update(*new, layer), strict=True):
                torch.testing.assert_close(found, wanted, rtol=0, atol=0)
            assert cache.get_seq_length(layer) == expected.get_seq_length(layer)
    # No copy: what is returned lies in what was reserved.
    assert given[0].untyped_storage().nbytes() == 2 * 3 * 12 * 8 * 4
