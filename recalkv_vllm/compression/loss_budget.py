"""A budget of loss instead of bytes: the most compressed of what loses no more."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F

from recalkv_vllm.band_format import CacheFormat
from recalkv_vllm.compression.base_model.attention import CausalLM
from recalkv_vllm.compression.base_model.devices import calibration_dtype
from recalkv_vllm.compression.calibration.calibration_pass import (
    LOGIT_CHUNK,
    freeze,
    output_logits,
)
from recalkv_vllm.compression.check import LOSS_BUDGET_COMPRESSIONS, Job, at_compression
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.healing.distillation import hidden_states
from recalkv_vllm.compression.healing.student import Student
from recalkv_vllm.compression.layer import LayerFactors
from recalkv_vllm.compression.progress import track

log = logging.getLogger(__name__)

T = TypeVar("T")


class LossMeter:
    """Measures what compressed models lose on the held-out text.

    Args:
        job: as checked.
        held_out: ``[samples, seq_len]`` token ids.
    """

    def __init__(self, job: Job, held_out: torch.Tensor):
        model = job.model
        self._train_weights = job.weights_may_change
        self._held_out = held_out
        self._dense = model.load(calibration_dtype(model.dtype, job.device), job.device)
        freeze(self._dense, gradient=False, seq_len=held_out.shape[1])
        self._dense_loss = self._mean_loss()

    def loss(
        self,
        base: CausalLM,
        factors: Sequence[LayerFactors],
        latent_formats: Sequence[CacheFormat | None],
    ) -> float:
        """Next-token loss of the compressed model above the dense model's, in nats per token.

        Args:
            base: the base model in memory.
            factors: of all layers.
            latent_formats: how each layer's latents are stored; None for plain elements.
        """
        student = Student(self._dense, base, factors, latent_formats, self._train_weights)
        with student.compressed():
            return self._mean_loss() - self._dense_loss

    def _mean_loss(self) -> float:
        samples = track(self._held_out, "measuring the loss", total=len(self._held_out))
        total = sum(_next_token_loss(self._dense, sample) for sample in samples)
        return total / (len(self._held_out) * (self._held_out.shape[1] - 1))


@torch.inference_mode()
def _next_token_loss(model: CausalLM, sample: torch.Tensor) -> float:
    """Of all tokens of ``sample: [tokens]`` but the first, in nats, summed."""
    hidden = hidden_states(model, sample, gradient=False)[:-1]
    targets = sample[1:].to(hidden.device)
    total = 0.0
    for start in range(0, len(hidden), LOGIT_CHUNK):
        part = slice(start, start + LOGIT_CHUNK)
        logits = output_logits(model, hidden[part])
        total += float(F.cross_entropy(logits, targets[part].to(logits.device), reduction="sum"))
    return total


def reachable_compressions(job: Job) -> list[float]:
    """Of the compressions that are tried those that the job's groups allow, ascending.

    Of several with one plan (a latent format may remove more than was asked for) the largest.
    """
    reachable = {}
    for compression in LOSS_BUDGET_COMPRESSIONS:
        try:
            reachable[at_compression(job, compression).budget] = compression
        except InputError:
            break
    return list(reachable.values())


def most_compressed(
    max_loss: float,
    compressions: Sequence[float],
    attempt: Callable[[float], tuple[T, float]],
) -> T:
    """What an attempt made at the largest compression that loses ``max_loss`` at most.

    Bisects, so more compression is taken to lose more; what is returned was measured in any case.

    Args:
        max_loss: in nats per token.
        compressions: to choose from, ascending.
        attempt: makes something at a compression, and measures what it loses.

    Raises:
        InputError: the least compression loses more.
    """
    best: list[T] = []
    losses: dict[float, float] = {}
    low, high = 0, len(compressions)
    while low < high:
        middle = (low + high) // 2
        compression = compressions[middle]
        made, loss = attempt(compression)
        losses[compression] = loss
        fits = loss <= max_loss
        log.info(
            "--max-loss %g: %.0f %% removed: loss %.4f nats, %s",
            max_loss, 100 * compression, loss, "within" if fits else "above",
        )  # fmt: skip
        if fits:
            best, low = [made], middle + 1
        else:
            high = middle
    if not best:
        least = compressions[0]
        raise InputError(
            f"--max-loss {max_loss:g}: expected a loss that some compression stays within, found "
            f"{losses[least]:.4f} nats at {least:.0%}, the least that is tried"
        )
    return best[0]
