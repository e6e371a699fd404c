"""vLLM's ``ExampleHiddenStatesConnector`` where there are no streams of CUDA: it copies at once.

Which requests are stored, where, and what of the cache is theirs is the connector's own.
"""

import os
from contextlib import contextmanager
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    extract_from_kv_cache,
)


class Done:
    """An event of CUDA that has come."""

    def query(self):
        return True


def store(self, pending):
    blocks = torch.tensor(pending.block_ids)[:, None] * self._block_size
    slots = (blocks + torch.arange(self._block_size)).flatten()
    states = extract_from_kv_cache(self._kv_cache, slots, len(pending.token_ids))
    save_file({"hidden_states": states, "token_ids": pending.token_ids}, pending.filename)
    self._req_copy_events[pending.req_id] = Done()
    os.close(self._lock_fds.pop(pending.req_id))


@contextmanager
def stored_at_once():
    with patch.object(ExampleHiddenStatesConnector, "_submit_async_write", store):
        yield
