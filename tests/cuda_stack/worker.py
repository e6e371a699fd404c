"""What vLLM's GPU worker does around a model, with vLLM's own code, on tensors without memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from vllm import ModelRegistry
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader.utils import (
    initialize_model,
    process_weights_after_loading,
)
from vllm.plugins import load_general_plugins
from vllm.utils.network_utils import get_open_port
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backends.utils import (
    get_supported_kv_cache_layouts,
    resolve_kv_cache_layout,
)
from vllm.v1.engine import core
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec, init_attn_backend, init_kv_cache
from vllm.v1.worker.gpu.cudagraph_utils import prepare_inputs_to_capture
from vllm.v1.worker.gpu.input_batch import InputBuffers
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from recalkv_vllm.ops.triton.launch import Launch
from recalkv_vllm.serving.model.stock_attention import stock_parts

MAX_MODEL_LEN = 512
DEVICE = torch.device("cuda", 0)
CACHE_BYTES = 64 << 20


@contextmanager
def _stock_attention_runs() -> Iterator[None]:
    """The run of a stock attention module looks at values, which it makes itself, on the CPU."""
    name = "recalkv_vllm.serving.model.classes.stock_parts"

    def with_memory(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return stock_parts(*args, **kwargs)

    with mock.patch(name, with_memory):
        yield


class FakeCuda(FakeTensorMode):
    """Tensors on the GPU without memory: shapes, dtypes and devices only.

    A value that is read on the host, or an op between two devices, is an error. Unless ``binding``:
    while factors are packed values may be read, and all that is asked is how large an error of a
    rotation table is. There is none.
    """

    #: torch asks whether there is a GPU, and is told that there is.
    avoid_device_init = True
    binding = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.binding and func is torch.ops.aten._local_scalar_dense.default:
            return args[0].dtype == torch.bool
        return super().__torch_dispatch__(func, types, args, kwargs)


#: Tensors of two modes do not mix.
FAKE_CUDA = FakeCuda()


@contextmanager
def on_gpu(binding: bool = False) -> Iterator[None]:
    """New tensors are on the GPU."""
    FAKE_CUDA.binding = binding
    with FAKE_CUDA, set_default_torch_dtype(torch.bfloat16), DEVICE:
        yield
    FAKE_CUDA.binding = False


@cache
def _init_distributed() -> None:
    # From 0.33 on, vLLM imports it with its first model: a constant of it would be on the device.
    with suppress(ModuleNotFoundError):
        import vllm.model_executor.models.expert_substitution  # noqa: F401

    address = f"tcp://127.0.0.1:{get_open_port()}"
    init_distributed_environment(1, 0, address, 0, "gloo")
    ensure_model_parallel_initialized(1, 1, backend="gloo")


class Worker:
    """One worker; ``engine`` are arguments of ``EngineArgs``."""

    def __init__(self, model: Path, **engine: Any):
        load_general_plugins()
        # vLLM would start a process only to look at the class.
        for name in json.loads((model / "config.json").read_text())["architectures"]:
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())
        arguments = {
            "model": str(model),
            "max_model_len": MAX_MODEL_LEN,
            # The model as written: ops of vLLM's own have no fake implementation.
            "compilation_config": {
                "mode": 0,
                "cudagraph_mode": "FULL_DECODE_ONLY",
                "custom_ops": ["none"],
            },
            **engine,
        }
        self.config: VllmConfig = EngineArgs(**arguments).create_engine_config()

    @cached_property
    def model(self) -> Any:
        """The served model, loaded but for its values."""
        with set_current_vllm_config(self.config):
            _init_distributed()
            with on_gpu(binding=True), _stock_attention_runs():
                model = initialize_model(self.config)
                process_weights_after_loading(model, self.config.model_config, DEVICE)
        return model

    @property
    def layers(self) -> dict[str, Any]:
        assert self.model is not None
        return self.config.compilation_config.static_forward_context

    @cached_property
    def specs(self) -> dict[str, KVCacheSpec]:
        """What each layer caches."""
        assert self.model is not None
        return get_kv_cache_spec(self.config)

    @cached_property
    def cache(self) -> KVCacheConfig:
        """Cache groups and tensors, as the engine's core works them out."""
        backends = [layer.get_attn_backend() for layer in self.layers.values()]
        layouts = [layout.name for layout in get_supported_kv_cache_layouts(backends)]
        resolve_kv_cache_layout(self.config, [layouts], self.specs.values())
        arguments: list[Any] = [self.config, [self.specs]]
        # From 0.33 on, groups are made first.
        grouping = getattr(core, "get_global_kv_cache_groups", None)
        groups = [grouping(*arguments)] if grouping else []
        (config,) = core.get_kv_cache_configs(*arguments, [CACHE_BYTES], *groups)
        return config

    @cached_property
    def attention(self) -> tuple[Any, Any, list[int]]:
        """Attention groups with metadata builders, their support of graphs, and block sizes."""
        return init_attn_backend(self.cache, self.config, DEVICE)

    def bind_cache(self) -> None:
        """Give every layer its part of the cache; what warms up is not run."""
        layers, cache, sizes = self.layers, self.cache, self.attention[2]
        with (
            on_gpu(),
            mock.patch.object(Launch, "run"),
            mock.patch.object(Launch, "spills", return_value=0),
        ):
            init_kv_cache(layers, cache, DEVICE, sizes, self.config)

    def capture_inputs(self, num_reqs: int, queries: int, device: torch.device) -> Any:
        """Metadata and slot mappings while a graph of uniform decodes is captured."""
        groups = len(self.cache.kv_cache_groups)
        tables = torch.zeros(groups, num_reqs, MAX_MODEL_LEN // 16, dtype=torch.int32)
        slots = torch.full((groups, num_reqs * queries), -1)
        blocks = SimpleNamespace(
            cp_size=1,
            get_dummy_block_tables=lambda _: tuple(tables.to(device)),
            get_dummy_slot_mappings=lambda _: slots.to(device),
        )
        about = SimpleNamespace(
            max_model_len=MAX_MODEL_LEN,
            supports_mm_inputs=False,
            model_config=self.config.model_config,
            rswa_prefix_lens=None,
        )
        state = SimpleNamespace(prepare_attn=partial(DefaultModelState.prepare_attn, about))
        return prepare_inputs_to_capture(
            num_reqs,
            num_reqs * queries,
            state,
            InputBuffers(num_reqs, num_reqs * queries, device),
            blocks,
            self.attention[0],
            self.cache,
            full_cudagraph=True,
            max_query_len=queries,
        )

    def forward(self, num_reqs: int, queries: int) -> torch.Tensor:
        """One step of the model, as a graph would capture it."""
        with on_gpu(), set_current_vllm_config(self.config):
            metadata, slots = self.capture_inputs(num_reqs, queries, DEVICE)
            tokens = num_reqs * queries
            with set_forward_context(metadata, self.config, tokens, slot_mapping=slots):
                ids = torch.zeros(tokens, dtype=torch.int64)
                return self.model(ids, torch.zeros(tokens, dtype=torch.int64))
