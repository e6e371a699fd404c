"""How far a student's predictions are from its teacher's."""

from __future__ import annotations

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
