"""Metadata that vLLM builds while it captures CUDA graphs, and before it replays them."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from recalkv_vllm.serving.attention.metadata import LatentMetadataBuilder

MAX_MODEL_LEN = 4096
#: Of a graph of uniform decodes: requests, and queries of each (one, or tokens to verify).
SIZES = [(requests, queries) for queries in (1, 4) for requests in (1, 2, 8, 24, 256)]


class Runner:
    """What vLLM's model runners do around a builder: memory of fixed addresses, padded batches."""

    def __init__(self, requests: int, queries: int):
        self.requests, self.queries = requests, queries
        speculation = SimpleNamespace(num_speculative_tokens=queries - 1, parallel_drafting=False)
        config = SimpleNamespace(
            speculative_config=speculation if queries > 1 else None,
            parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        )
        self.builder = LatentMetadataBuilder(None, ["layer"], config, torch.device("cpu"))
        self.query_start_loc = torch.zeros(requests + 1, dtype=torch.int32)
        self.seq_lens = torch.zeros(requests, dtype=torch.int32)
        self.block_table = torch.zeros(requests, MAX_MODEL_LEN // 16, dtype=torch.int32)

    def common(self, counts: list[int], lengths: list[int], max_seq_len: int):
        """A batch padded to the graph's size, in the runner's memory."""
        padding = self.requests - len(counts)
        starts = torch.tensor([0, *counts, *[0] * padding]).cumsum(0)
        self.query_start_loc.copy_(starts)
        self.seq_lens.copy_(torch.tensor([*lengths, *[0] * padding]))
        return CommonAttentionMetadata(
            query_start_loc=self.query_start_loc,
            query_start_loc_cpu=self.query_start_loc.clone(),
            seq_lens=self.seq_lens,
            num_reqs=self.requests,
            num_actual_tokens=self.requests * self.queries,
            max_query_len=self.queries,
            max_seq_len=max_seq_len,
            block_table_tensor=self.block_table,
            slot_mapping=torch.full((self.requests * self.queries,), -1),
        )

    def capture(self):
        dummy = [self.queries] * self.requests
        return self.builder.build_for_cudagraph_capture(self.common(dummy, dummy, MAX_MODEL_LEN))


@pytest.mark.parametrize(("requests", "queries"), SIZES)
def test_all_of_a_captured_batch_is_decodes_of_any_length(requests, queries):
    runner = Runner(requests, queries)
    metadata = runner.capture()
    assert metadata.num_actual_tokens == requests * queries
    batch = metadata.batch
    assert (batch.num_decodes, batch.num_decode_tokens) == (requests, requests * queries)
    assert batch.max_decode_query_len == queries
    assert batch.max_seq_len == MAX_MODEL_LEN


@pytest.mark.parametrize(("requests", "queries"), SIZES)
def test_captured_metadata_shows_the_batch_of_a_replay(requests, queries):
    """A graph reads what tensors hold when it is replayed: they must be the runner's own."""
    runner = Runner(requests, queries)
    captured = runner.capture()
    counts = [queries] * (requests - requests // 3)
    common = runner.common(counts, [100 + i for i in range(len(counts))], max_seq_len=400)
    replayed = runner.builder.build(0, common)
    for name in ("query_start_loc", "seq_lens", "block_table"):
        held = getattr(captured.batch, name)
        assert held.data_ptr() == getattr(replayed.batch, name).data_ptr()
    assert captured.batch.seq_lens[len(counts) :].eq(0).all()
    # What launches follow from is the graph's, whatever the batch, but for a shorter bound.
    assert replayed.num_actual_tokens == captured.num_actual_tokens
    assert replayed.batch.num_decodes == captured.batch.num_decodes
    assert replayed.batch.num_decode_tokens == captured.batch.num_decode_tokens
    assert replayed.batch.max_seq_len <= captured.batch.max_seq_len


def test_one_batch_is_built_once_for_all_layers():
    runner = Runner(4, 1)
    common = runner.common([1, 1, 1], [5, 6, 7], 7)
    other = LatentMetadataBuilder(None, ["other"], runner.builder.vllm_config, torch.device("cpu"))
    assert other.build(0, common) is runner.builder.build(0, common)


def test_the_reference_is_never_captured(monkeypatch):
    support = LatentMetadataBuilder.get_cudagraph_support
    assert support(None, None) is AttentionCGSupport.UNIFORM_BATCH
    monkeypatch.setenv("RECALKV_KERNEL", "reference")
    assert support(None, None) is AttentionCGSupport.NEVER
