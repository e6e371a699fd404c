"""Training of a student, a window of text a step."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.healing.distillation import divergence, hidden_states
from recalkv_vllm.compression.healing.state import HealingState, StateFile
from recalkv_vllm.compression.healing.student import Student
from recalkv_vllm.compression.progress import track

log = logging.getLogger(__name__)

#: Per step, relative to the size of what learns, for a loss of 1 nat; it goes with the root of the
#: held-out loss before training. Adam's steps have one size whatever there is to gain, and what
#: their noise costs goes with its square: what suits a loss of 0.23 makes one of 0.019 worse.
LEARNING_RATE = 2e-3
BETAS = (0.9, 0.99)
#: Norm of the gradient of the mean loss of a token.
LARGEST_GRADIENT = 1.0
#: Steps in which the learning rate rises; it falls on a cosine from there.
WARM_UP = 10
#: The held-out part is looked at this many times, but not while the learning rate rises.
EVALUATIONS = 8
#: Training ends when the held-out loss is this many times what it was at first,
DIVERGED = 2.0
#: or has not fallen at so many looks.
PATIENCE = 3


@dataclass(frozen=True, slots=True)
class Healed:
    """What training came to; losses are mean divergences from the dense model, in nats.

    Args:
        steps: that were made.
        tokens: that were trained on, repetitions counted.
        loss_before: of the held-out text.
        loss_after: the same, of what was kept.
    """

    steps: int
    tokens: int
    loss_before: float
    loss_after: float


def train(
    student: Student,
    samples: torch.Tensor,
    held_out: torch.Tensor,
    steps: int,
    seed: int,
    state_file: StateFile,
) -> Healed:
    """Train the student; its parameters end as what did best on the held-out text.

    Args:
        student: of a frozen model.
        samples: ``[samples, seq_len]`` token ids, drawn one a step.
        held_out: the same, never trained on.
        steps: at most; training that diverges, or no longer gets better, ends before.
        seed: of the order of samples.
        state_file: where an interrupted run goes on from.

    Raises:
        InputError: predictions that are not finite before any training.
        OutputError: the state cannot be written.
    """
    parameters = student.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0)
    expected = predictions(student, held_out)
    state = state_file.load(parameters, optimizer)
    if state is None:
        loss = held_out_loss(student, held_out, expected)
        if not math.isfinite(loss):
            raise InputError(
                f"--heal: the compressed model's loss is {loss} before training; it overflows in "
                "this precision (try --device cpu or another --dtype)"
            )
        state = HealingState.start(parameters, loss)
    else:
        log.info("healing: resuming after step %d of %d", state.step, steps)
    rate = LEARNING_RATE * math.sqrt(max(state.first_loss, 0.0))
    every = max(WARM_UP, steps // EVALUATIONS)
    order = _order(len(samples), steps, seed)
    for index in track(order[state.step :], "healing", total=steps, completed=state.step):
        for group in optimizer.param_groups:
            group["lr"] = rate * _schedule(state.step, steps)
        loss = _step(student, samples[index], parameters, optimizer)
        state.step += 1
        evaluated = state.step % every == 0 or state.step == steps
        if evaluated:
            loss = held_out_loss(student, held_out, expected)
            state.keep(parameters, loss)
            log.info(
                "healing: step %d of %d: held-out loss %.4f nats, at best %.4f, at first %.4f",
                state.step, steps, loss, state.best_loss, state.first_loss,
            )  # fmt: skip
        if not math.isfinite(loss) or (evaluated and loss > DIVERGED * state.first_loss):
            log.warning(
                "healing: diverges at step %d (loss %.4g nats); what did best so far is kept",
                state.step, loss,
            )  # fmt: skip
            break
        if state.step - state.best_step >= PATIENCE * every:
            log.info(
                "healing: ends at step %d: the held-out loss has not fallen since step %d",
                state.step, state.best_step,
            )  # fmt: skip
            break
        state_file.save(state, parameters, optimizer)
    state.restore_best(parameters)
    state_file.remove()
    tokens = state.step * samples.shape[1]
    return Healed(state.step, tokens, state.first_loss, state.best_loss)


def _order(samples: int, steps: int, seed: int) -> list[int]:
    """Index of the sample of every step: all of them once, then all again in another order."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(samples, generator=generator) for _ in range(-(-steps // samples))]
    return torch.cat(rounds)[:steps].tolist()


def _schedule(step: int, steps: int) -> float:
    """Share of the learning rate: a linear rise, and a cosine to zero."""
    return min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2


def _step(
    student: Student,
    sample: torch.Tensor,
    parameters: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> float:
    """Train on ``sample: [tokens]``, unless its loss is not finite; the loss per token, in nats."""
    optimizer.zero_grad(set_to_none=True)
    model = student.model
    teacher = hidden_states(model, sample, gradient=False)
    # The model stays compressed in the backward pass, which may compute activations again.
    with student.compressed():
        hidden = hidden_states(model, sample, gradient=True)
        predicting = hidden.detach().requires_grad_(True)
        loss = divergence(model, teacher, predicting)
        hidden.backward(predicting.grad)
    torch.nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT * len(sample))
    if math.isfinite(loss):
        optimizer.step()
    return loss / len(sample)


def predictions(student: Student, samples: torch.Tensor) -> list[torch.Tensor]:
    """What the dense model makes of every sample: its last hidden states ``[tokens, H]``."""
    tracked = track(samples, "what the dense model predicts", total=len(samples))
    return [hidden_states(student.model, sample, gradient=False) for sample in tracked]


def held_out_loss(
    student: Student, held_out: torch.Tensor, expected: Sequence[torch.Tensor]
) -> float:
    """Mean divergence per token of the compressed model from the dense one, in nats.

    Args:
        student: of a frozen model.
        held_out: ``[samples, seq_len]`` token ids.
        expected: :func:`predictions` of them.
    """
    with student.compressed():
        losses = [
            divergence(student.model, dense, hidden_states(student.model, sample, gradient=False))
            for sample, dense in zip(held_out, expected, strict=True)
        ]
    return sum(losses) / held_out.numel()
