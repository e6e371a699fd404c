"""vLLM's FlashAttention, for prompts that are attended as dense keys and values."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from recalkv_vllm.serving.attention.flash_attention import FlashAttention, Logits, Partial
from tests.cuda_stack.worker import Worker


def test_vllms_functions_take_what_prompts_give_them(worker: Callable[[str], Worker]) -> None:
    dense = [layer.impl._dense for layer in worker("plain").layers.values()]
    assert all(dense)
    flash = dense[0]._flash
    assert flash.attend.keywords == {"fa_version": 3}
    asked: list[dict[str, Any]] = []

    def attend(**given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(given)
        return given["q"], given["q"][..., 0].T

    recorded = FlashAttention(attend, lambda **given: asked.append(given))
    q, starts = torch.zeros(3, 2, 64), torch.tensor([0, 3], dtype=torch.int32)
    logits = Logits(1.0, None, None)
    partial = recorded.over(q, q, q, (starts, starts), (3, 3), logits, causal=True)
    assert isinstance(recorded.merged(partial, partial), Partial)
    inspect.signature(flash.attend.func).bind(**asked[0], **flash.attend.keywords)
    inspect.signature(flash.merge).bind(**asked[1])
