"""A step of the model as a CUDA graph captures it, down to the launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from recalkv_vllm.kernels import heuristics
from recalkv_vllm.kernels.heuristics import choice
from recalkv_vllm.ops.cuda import CudaLayer
from recalkv_vllm.ops.triton.launch import Launch
from recalkv_vllm.serving.attention.implementation import LatentAttentionImpl
from recalkv_vllm.serving.attention.layer import LatentAttention
from tests.cuda_stack.checkpoints import EVERY
from tests.cuda_stack.worker import DEVICE, MAX_MODEL_LEN, Worker, on_gpu
from tests.ops.tracing import RecordedCalls

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", EVERY)
def test_metadata_of_every_capture_size(name: str, worker: Callable[[str], Worker]) -> None:
    served = worker(name)
    sizes = served.config.compilation_config.cudagraph_capture_sizes
    assert len(sizes) > 10
    for size in sizes:
        metadata, _ = served.capture_inputs(size, 1, CPU)
        assert set(metadata) == set(served.layers)
        for each in metadata.values():
            batch = each.batch
            assert (batch.num_decodes, batch.num_decode_tokens) == (size, size)
            assert (batch.max_decode_query_len, batch.max_seq_len) == (1, MAX_MODEL_LEN)
            assert batch.block_table.shape[0] == batch.seq_lens.shape[0] == size
        groups = len(served.cache.kv_cache_groups)
        assert len({id(each) for each in metadata.values()}) == groups


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("requests", [1, 8, 256])
def test_a_decode_step_reaches_its_kernels(
    name: str, requests: int, worker: Callable[[str], Worker], launches: list[Launch]
) -> None:
    served = worker(name)
    with RecordedCalls("recalkv_cuda") as cuda:
        output = served.forward(requests, 1)
    assert output.shape == (requests, 256)
    assert output.device.type == "cuda"
    layers = len(EVERY[name].ranks)
    kernels = [launch.kernel.__name__ for launch in launches]
    written = {"int4": "write_quantized_latents", "bands": "write_latents_in_bands"}
    assert kernels.count(written.get(name, "write_latents")) == layers
    assert kernels.count("project_values") == layers
    decodes = sum(op._schema.name.startswith("recalkv_cuda::decode") for op, _ in cuda.calls)
    in_triton = kernels.count("latent_attention")
    # Bands may take a launch for each block of value columns; the window is Triton's too.
    assert decodes + in_triton >= layers
    assert decodes == sum(
        isinstance(bound := layer.impl._ops._bound, CudaLayer) and bound.decodes(layer.num_heads, 1)
        for layer in served.layers.values()
    )
    for launch in launches:
        tensors = [x for x in launch.arguments.values() if isinstance(x, torch.Tensor)]
        assert {tensor.device for tensor in tensors} == {DEVICE}


def test_a_factor_on_the_host_is_found(worker: Callable[[str], Worker]) -> None:
    layer = worker("plain").model.model.layers[0].self_attn
    kept = layer.v_up.weight
    with on_gpu(binding=True):
        on_host = torch.zeros(kept.shape, dtype=kept.dtype, device="cpu")
        layer.v_up.weight = torch.nn.Parameter(on_host, requires_grad=False)
        with pytest.raises(ValueError, match=r"v_up: expected .*cuda.*, found .*cpu"):
            layer.bind_factors(torch.bfloat16)
        layer.v_up.weight = kept
        layer.bind_factors(torch.bfloat16)


def test_a_read_on_the_host_is_found(
    worker: Callable[[str], Worker], launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LatentAttentionImpl.forward

    def reads(self: Any, layer: Any, query: Any, *rest: Any, **named: Any) -> Any:
        query.sum().item()
        return forward(self, layer, query, *rest, **named)

    monkeypatch.setattr(LatentAttentionImpl, "forward", reads)
    with pytest.raises(DataDependentOutputException):
        worker("plain").forward(4, 1)


def test_a_spec_of_the_wrong_dtype_is_found(
    checkpoint: Any, launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = LatentAttention.get_kv_cache_spec
    monkeypatch.setattr(
        LatentAttention,
        "get_kv_cache_spec",
        lambda self, config: replace(spec(self, config), dtype=torch.float32),
    )
    served = Worker(checkpoint("plain"))
    served.bind_cache()
    with pytest.raises(TypeError, match="expected dtype float32, found bfloat16"):
        served.forward(4, 1)


def test_a_missing_launch_rule_is_found(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = tuple(rule for rule in choice.RULES if 9 not in rule.families)
    monkeypatch.setattr(choice, "RULES", rules)
    heuristics.attention_config.cache_clear()
    try:
        with pytest.raises(ValueError, match="no launch parameters for sm_90"):
            assert Worker(checkpoint("int4")).model
    finally:
        heuristics.attention_config.cache_clear()
