"""Sleep mode where there is no GPU to free: memory that sleeps is poisoned, as if it were gone.

vLLM's own worker does all but one thing, which only CUDA has: the allocator. This one notes which
tensors came to be while the worker loaded weights, made caches and so on. Those that sleep are
filled with NaN, and only what vLLM has saved comes back.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: A byte of NaN in every floating-point format, and of a negative number in others.
GONE = 0xFF


def storages(tree):
    tensors = [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor) and not x.is_meta]
    return [x.untyped_storage() for x in tensors]


class NotedMemory(TorchDispatchMode):
    """An allocator as far as the worker asks: what is allocated while it is entered has a tag."""

    def __init__(self):
        super().__init__()
        self.tags = []
        self.of_tag = defaultdict(dict)
        self.saved = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.set_:
            return result  # a file that is mapped
        given = {storage.data_ptr() for storage in storages((args, kwargs))}
        for storage in storages(result):
            if storage.data_ptr() not in given and storage.nbytes():
                self.of_tag[self.tags[-1]][storage.data_ptr()] = storage
        return result

    @contextmanager
    def use_memory_pool(self, tag):
        self.tags.append(tag)
        try:
            with self if len(self.tags) == 1 else nullcontext():
                yield
        finally:
            self.tags.pop()

    def sleep(self, offload_tags):
        for tag, known in self.of_tag.items():
            for pointer, storage in known.items():
                memory = torch.tensor([], dtype=torch.uint8).set_(storage)
                if tag in offload_tags:
                    self.saved[tag, pointer] = memory.clone()
                memory.fill_(GONE)

    def wake_up(self, tags=None):
        for (tag, pointer), content in list(self.saved.items()):
            if tags is None or tag in tags or tag not in ("weights", "kv_cache"):
                torch.tensor([], dtype=torch.uint8).set_(self.of_tag[tag][pointer]).copy_(content)
                del self.saved[tag, pointer]


@contextmanager
def sleep_mode():
    """vLLM's CPU worker sleeps as its GPU worker does, with this allocator."""
    from vllm import device_allocator
    from vllm.platforms import current_platform
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    memory = NotedMemory()
    with (
        patch.object(device_allocator, "get_mem_allocator_instance", lambda: memory),
        patch.object(type(current_platform), "is_sleep_mode_available", lambda self: True),
        patch.object(torch.accelerator, "get_memory_info", lambda: (0, 0)),
        patch.multiple(
            CPUWorker,
            sleep=Worker.sleep,
            wake_up=Worker.wake_up,
            _maybe_get_memory_pool_context=lambda self, tag: memory.use_memory_pool(tag),
        ),
    ):
        yield
