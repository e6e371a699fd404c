"""One pass of calibration text through the frozen model, summed by observers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from recalkv_vllm.checkpoint import AttentionGeometry
from recalkv_vllm.compression.architectures import CausalLM, attention_modules
from recalkv_vllm.compression.observers import Observer
from recalkv_vllm.compression.progress import track
from recalkv_vllm.compression.store import SumStore

#: Tokens whose logits exist at a time; vocabularies are wide.
LOGIT_CHUNK = 128
#: Activations of a backward pass above this size are recomputed instead of kept.
ACTIVATION_BYTES = 1 << 30


def run_pass(
    model: CausalLM, samples: torch.Tensor, observers: list[Observer], store: SumStore
) -> None:
    """Add every sample that ``store`` does not hold yet to its sums, then finish it.

    Args:
        model: a causal language model of a supported architecture without dropout; its
            ``requires_grad`` flags and mode are changed.
        samples: ``[samples, seq_len]`` token ids.
        observers: what to sum up.
        store: open, with the observers' shapes.
    """
    gradient = any(observer.needs_gradient for observer in observers)
    _prepare(model, gradient, seq_len=samples.shape[1])
    device = model.get_input_embeddings().weight.device
    attention = attention_modules(model)
    todo = samples[store.samples_done :]
    for sample in track(todo, "calibrating", total=len(samples), completed=store.samples_done):
        ids = sample.unsqueeze(0).to(device)
        # Hooks must not see the second forward pass that recomputes activations.
        handles = [h for o in observers for h in o.attach(attention, store.sums)]
        try:
            with torch.set_grad_enabled(gradient):
                hidden = model.model(ids, use_cache=False).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        if gradient:
            hidden.backward(_loss_gradient(model.lm_head, hidden.detach(), ids))
            for observer in observers:
                if observer.needs_gradient:
                    observer.after_backward(attention, store.sums)
            model.zero_grad(set_to_none=True)
        store.sample_done()
    store.finish(tokens=samples.numel())


def _prepare(model: CausalLM, gradient: bool, seq_len: int) -> None:
    model.requires_grad_(False)
    model.eval()
    if not gradient:
        return
    for module in attention_modules(model):
        module.k_proj.weight.requires_grad_(True)
        module.v_proj.weight.requires_grad_(True)
    config = model.config
    numbers_per_token = config.num_hidden_layers * (
        16 * config.hidden_size + 4 * config.intermediate_size
    )
    if seq_len * numbers_per_token * model.dtype.itemsize > ACTIVATION_BYTES:
        model.train()  # transformers checkpoints activations only in training mode
        model.gradient_checkpointing_enable({"use_reentrant": False})


def _loss_gradient(lm_head: nn.Module, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Gradient of the mean next-token loss with respect to ``hidden: [1, tokens, H]``."""
    hidden.requires_grad_(True)
    predicted = ids.shape[1] - 1
    for start in range(0, predicted, LOGIT_CHUNK):
        end = min(start + LOGIT_CHUNK, predicted)
        logits = lm_head(hidden[0, start:end]).float()
        loss = F.cross_entropy(logits, ids[0, start + 1 : end + 1], reduction="sum") / predicted
        loss.backward()
    assert hidden.grad is not None
    return hidden.grad


def sum_shapes(
    observers: list[Observer], geometry: AttentionGeometry
) -> dict[str, tuple[int, ...]]:
    """Shapes of all sums of the observers."""
    return {k: v for observer in observers for k, v in observer.shapes(geometry).items()}
