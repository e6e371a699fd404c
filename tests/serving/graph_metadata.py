"""Captures and replays of one attention layer, with the metadata of vLLM's own Model Runner V2.

A process of its own: vLLM's kernels must be interpreted, which is settled when it is imported. What
surrounds attention (the model, sampling, CUDA's graphs themselves) is left out; which graphs there
are, which one a batch gets, how it is padded and what metadata says is vLLM's code. Prints one JSON
object per replay.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import vllm.v1.worker.cpu.shm  # noqa: F401 - the runner on a CPU: before what it replaces is imported
from vllm.config.compilation import CUDAGraphMode
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu.attn_utils import get_attn_cg_support
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.cudagraph_utils import (
    BatchExecutionDescriptor,
    CudaGraphManager,
    prepare_inputs_to_capture,
)
from vllm.v1.worker.gpu.input_batch import InputBuffers
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from recalkv_vllm.ops import reference, triton
from recalkv_vllm.ops.triton.launch import Launch
from recalkv_vllm.serving.attention.backend import RecalkvBackend
from recalkv_vllm.serving.attention.metadata import LatentMetadata
from tests.ops.cases import MAX_POSITION, AttentionInputs, build, spanned
from tests.ops.checks import difference

CPU = torch.device("cpu")
#: Two of different ranks, which makes two metadata builders.
LAYERS = ("model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn")
SIZES = [1, 2, 4, 8, 24]
MAX_REQUESTS, MAX_TOKENS, BLOCK = 8, 64, 16
CASE = spanned("graph", (4, 2, 64), 1, 32, 2, 32, batch=((1, MAX_POSITION),) * MAX_REQUESTS)


class State(DefaultModelState):
    """What attention's metadata depends on of a model."""

    def __init__(self) -> None:
        self.model_config = SimpleNamespace(max_model_len=MAX_POSITION)
        self.supports_mm_inputs = False
        self.encoder_cache, self.num_new_sampled_tokens_per_step = None, 1


class Runner(GPUModelRunner):
    """vLLM's runner without a model: ``queries`` tokens to verify per request, if not one."""

    def __init__(self, queries: int):
        speculation = SimpleNamespace(
            num_speculative_tokens=queries - 1,
            parallel_drafting=False,
            uses_dynamic_speculative_decoding=lambda: False,
        )
        self.vllm_config = SimpleNamespace(
            speculative_config=speculation if queries > 1 else None,
            parallel_config=SimpleNamespace(
                tensor_parallel_size=1, decode_context_parallel_size=1, data_parallel_size=1
            ),
            scheduler_config=SimpleNamespace(max_num_seqs=MAX_REQUESTS),
            compilation_config=SimpleNamespace(
                cudagraph_capture_sizes=SIZES, max_cudagraph_capture_size=max(SIZES)
            ),
            cache_config=SimpleNamespace(use_kda_recoverssm=False),
            num_speculative_tokens=queries - 1,
        )
        self.device, self.max_num_reqs, self.decode_query_len = CPU, MAX_REQUESTS, queries
        self.model_config = SimpleNamespace(rswa_window=None)
        self.model_state, self.use_pp = State(), False
        self.adaptive_verification = self.fast_prefill = self.pcp_manager = None
        self.input_buffers = InputBuffers(MAX_REQUESTS, MAX_TOKENS, CPU)
        self.req_states = RequestState(MAX_REQUESTS, MAX_POSITION, MAX_TOKENS, queries - 1, 9, CPU)
        blocks = MAX_POSITION // BLOCK
        self.block_tables = BlockTables([BLOCK], MAX_REQUESTS, MAX_TOKENS, [blocks], CPU)
        groups = []
        for name, rank in zip(LAYERS, (CASE.rank, CASE.rank // 2), strict=True):
            spec = FullAttentionSpec(
                block_size=BLOCK, num_kv_heads=1, head_size=rank // 2, dtype=torch.float32
            )
            groups.append(AttentionGroup(RecalkvBackend, [name], spec, 0))
            groups[-1].create_metadata_builders(self.vllm_config, CPU)
        group = KVCacheGroupSpec(list(LAYERS), groups[0].kv_cache_spec)
        self.kv_cache_config = KVCacheConfig(1, [], [group])
        self.attn_groups = [groups]
        support = get_attn_cg_support(self.attn_groups, self.vllm_config)
        assert support.min_cg_support is AttentionCGSupport.UNIFORM_BATCH
        self.cudagraph_manager = CudaGraphManager(
            self.vllm_config, CPU, CUDAGraphMode.FULL_AND_PIECEWISE, queries
        )
        self.cudagraph_manager._graphs_captured = True

    def capture(self, graph: BatchExecutionDescriptor) -> LatentMetadata:
        """Metadata of a graph, as :meth:`ModelCudaGraphManager.capture` asks for it."""
        state = prepare_inputs_to_capture(
            graph.num_reqs,
            graph.num_tokens,
            self.model_state,
            self.input_buffers,
            self.block_tables,
            self.attn_groups,
            self.kv_cache_config,
            full_cudagraph=True,
            max_query_len=graph.max_query_len or graph.uniform_token_count,
        )
        return state.attn_metadata[LAYERS[0]]

    def replay(
        self, lengths: list[int], tables: torch.Tensor
    ) -> tuple[BatchExecutionDescriptor, LatentMetadata, bool]:
        """Which graph decodes with ``lengths`` cached tokens get, metadata, if layers share it."""
        queries, requests = self.decode_query_len, len(lengths)
        names = [f"request {i}" for i in range(requests)]
        for name, length, table in zip(names, lengths, tables.tolist(), strict=False):
            computed = length - queries
            self.req_states.add_request(name, computed, [1] * computed, computed, 100)
            index = self.req_states.req_id_to_index[name]
            self.block_tables.append_block_ids(index, (table[: -(-length // BLOCK)],), True)
        self.req_states.apply_staged_writes()
        self.block_tables.apply_staged_writes()
        scheduled = SchedulerOutput.make_empty()
        scheduled.num_scheduled_tokens = dict.fromkeys(names, queries)
        scheduled.total_num_scheduled_tokens = queries * requests
        if queries > 1:
            scheduled.scheduled_spec_decode_tokens = {name: [1] * (queries - 1) for name in names}
        batch, uniform = self.gather_batch_req_state(scheduled, dummy_run=False)
        graph = self.cudagraph_manager.dispatch(requests, queries * requests, uniform, 0, queries)
        inputs = self.prepare_inputs(scheduled, batch, graph, 0)
        metadata = self.model_state.prepare_attn(
            inputs, graph.cg_mode, *self.prepare_attn(inputs), self.attn_groups,
            self.kv_cache_config,
        )  # fmt: skip
        for name in names:
            self.req_states.remove_request(name)
        first, second = (metadata[name] for name in LAYERS)
        return graph, first, first is second


@dataclass(frozen=True)
class Graph:
    """What a CUDA graph holds: launches with their arguments, and where results go."""

    metadata: LatentMetadata
    q: torch.Tensor
    launches: tuple[Launch, ...]
    result: tuple[torch.Tensor, torch.Tensor]


def capture(layer: triton.TritonLayer, metadata: LatentMetadata, cache: torch.Tensor) -> Graph:
    """Attend the dummy batch, and keep the launches."""
    launches: list[Launch] = []
    run = Launch.run
    Launch.run = lambda self: (launches.append(self), run(self))
    q = torch.zeros(metadata.num_actual_tokens, 4, 64)
    result = layer.attend(q, cache, metadata.batch)
    Launch.run = run
    return Graph(metadata, q, tuple(launches), result)


def facts(metadata: LatentMetadata) -> dict[str, object]:
    """What launches follow from, and where a kernel looks for the rest."""
    batch = metadata.batch
    held = (batch.block_table, batch.seq_lens, batch.query_start_loc)
    return {
        "decodes": batch.num_decodes,
        "tokens": (batch.num_decode_tokens, metadata.num_actual_tokens),
        "queries": batch.max_decode_query_len,
        "longest": batch.max_seq_len,
        "shapes": [list(tensor.shape) for tensor in held],
        "strides": [list(tensor.stride()) for tensor in held],
        "addresses": [tensor.data_ptr() for tensor in held],
    }


def replay(graph: Graph, metadata: LatentMetadata, inputs: AttentionInputs, rows: int) -> float:
    """Largest difference from the reference; infinite if padded rows are not cleared."""
    graph.q.normal_()
    for output in graph.result:
        output.fill_(torch.nan)
    for launch in graph.launches:
        launch.run()
    exact = reference.paged_latent_attention(
        inputs.layer, graph.q, inputs.kv_cache, metadata.batch, compute_dtype=torch.float64
    )
    results = list(zip(graph.result, exact, strict=True))
    cleared = all(torch.equal(got[rows:].double(), want[rows:]) for got, want in results)
    return max(difference(*pair, rows) for pair in results) if cleared else math.inf


def main() -> None:
    torch.use_deterministic_algorithms(True)  # new memory is NaN
    cudagraph_utils.get_pp_group = lambda: SimpleNamespace(is_first_rank=True, is_last_rank=True)
    type(current_platform).get_global_graph_pool = lambda self: None
    inputs = build(CASE, torch.float32)
    layer = triton.bind(inputs.layer)
    for queries in (1, 3):
        runner = Runner(queries)
        shapes = runner.cudagraph_manager._capture_descs[CUDAGraphMode.FULL]
        graphs = {shape: capture(layer, runner.capture(shape), inputs.kv_cache) for shape in shapes}
        for requests in (1, 3, 5, MAX_REQUESTS):
            lengths = [queries + 37 * i for i in range(requests)]
            shape, metadata, once = runner.replay(lengths, inputs.batch.block_table)
            graph = graphs[shape]
            described = {
                "queries": queries,
                "requests": requests,
                "padded requests": shape.num_reqs,
                "captured": facts(graph.metadata),
                "replayed": facts(metadata),
                "lengths": lengths,
                "lengths shown": metadata.batch.seq_lens.tolist(),
                "built once": once,
                "error": replay(graph, metadata, inputs, queries * requests),
            }
            print(json.dumps(described), flush=True)


if __name__ == "__main__":
    main()
