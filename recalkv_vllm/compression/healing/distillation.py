"""What student and teacher predict, and how far that is apart."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F

from recalkv_vllm.compression.base_model.attention import CausalLM
from recalkv_vllm.compression.calibration.calibration_pass import LOGIT_CHUNK, output_logits


def divergence(
    model: CausalLM, teacher: torch.Tensor, student: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """Kullback-Leibler divergence of the student's predictions from the teacher's, in nats.

    Summed over tokens, so that small gradients of long samples do not vanish in half precision.
    Logits exist for :data:`.LOGIT_CHUNK` tokens at a time.

    Args:
        model: whose output head, frozen, makes predictions of hidden states.
        teacher: last hidden states ``[tokens, H]``.
        student: the same.

    Returns:
        The divergence, and its gradient with respect to ``student``.
    """
    student = student.detach().requires_grad_(True)
    total = 0.0
    with torch.enable_grad():
        for start in range(0, len(teacher), LOGIT_CHUNK):
            part = slice(start, start + LOGIT_CHUNK)
            with torch.no_grad():
                target = F.log_softmax(output_logits(model, teacher[part]), dim=-1)
            predicted = F.log_softmax(output_logits(model, student[part]), dim=-1)
            loss = F.kl_div(predicted, target, reduction="sum", log_target=True)
            loss.backward()
            total += float(loss.detach())
    assert student.grad is not None
    return total, student.grad


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
