"""What student and teacher predict, and how far that is apart."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F

from recalkv_vllm.compression.base_model.attention import CausalLM
from recalkv_vllm.compression.calibration.calibration_pass import LOGIT_CHUNK, output_logits


def divergence(model: CausalLM, teacher: torch.Tensor, student: torch.Tensor) -> float:
    """Kullback-Leibler divergence of the student's predictions from the teacher's, in nats.

    Summed over tokens, so that small gradients of long samples do not vanish in half precision.
    Logits exist for :data:`.LOGIT_CHUNK` tokens at a time. Where ``student`` takes a gradient, it
    is added to ``student.grad``.

    Args:
        model: whose output head, frozen, makes predictions of hidden states.
        teacher: last hidden states ``[tokens, H]``.
        student: the same; a leaf if it takes a gradient.
    """
    total = 0.0
    for start in range(0, len(teacher), LOGIT_CHUNK):
        part = slice(start, start + LOGIT_CHUNK)
        with torch.set_grad_enabled(student.requires_grad):
            logits = output_logits(model, student[part])
        with torch.no_grad():
            target = F.log_softmax(output_logits(model, teacher[part]), dim=-1)
            predicted = F.log_softmax(logits, dim=-1)
            likely = target.exp()
            total += float(torch.dot(likely.flatten(), target.sub_(predicted).flatten()))
        if logits.requires_grad:
            # In closed form, with respect to logits: autograd would pass them twice as often.
            logits.backward(predicted.exp_().sub_(likely))
    return total


def hidden_states(model: CausalLM, sample: torch.Tensor, gradient: bool) -> torch.Tensor:
    """Last hidden states ``[tokens, H]`` of ``sample: [tokens]``, in the model's dtype."""
    embedding = model.get_input_embeddings()
    ids = sample.unsqueeze(0).to(embedding.weight.device)
    with torch.set_grad_enabled(gradient), _mixed_precision(model, ids.device):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0]
        return hidden.to(model.dtype)


def _mixed_precision(model: CausalLM, device: torch.device) -> AbstractContextManager:
    """Products in the model's dtype of parameters that learn in float32."""
    if model.dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=model.dtype)
