"""One pass of calibration text through the frozen model, summed by observers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from recalkv_vllm.checkpoint import AttentionGeometry
from recalkv_vllm.compression.base_model.attention import Attention, CausalLM, attention_modules
from recalkv_vllm.compression.calibration.first_rows import FirstRows
from recalkv_vllm.compression.calibration.observers import Observer
from recalkv_vllm.compression.calibration.projection_trace import ProjectionTrace
from recalkv_vllm.compression.calibration.samples import token_ids
from recalkv_vllm.compression.calibration.sum_store import SumStore
from recalkv_vllm.compression.progress import Stage

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
        samples: ``[samples, seq_len]`` token ids, some of them perhaps left out of the loss
            (:func:`..samples.leave_out`).
        observers: what to sum up.
        store: open, with the observers' shapes.
    """
    gradient = any(observer.needs_gradient for observer in observers)
    freeze(model, gradient, seq_len=samples.shape[1])
    attention = attention_modules(model)

    todo = range(store.samples_done, len(samples))
    first = max(o.samples_to_prepare(samples, store.sums) for o in observers)
    on_cpu = all(weight.device.type == "cpu" for weight in model.parameters())
    stage = Stage(
        f"calibrating on {len(samples)} samples of {samples.shape[1]} tokens",
        total=first + sum(not on_cpu or index >= first for index in todo),
    )
    trace = ProjectionTrace()

    def run(index: int, observers: list[Observer]) -> None:
        _run_sample(model, attention, samples[index], observers, store.sums, gradient)
        stage.step()

    def measure(index: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        run(index, [trace])
        return list(trace.take())

    # A GPU measures them again in less time than a disk takes.
    first_rows = FirstRows(measure, store.scratch if on_cpu else None)
    with stage:
        for observer in observers:
            observer.prepare(samples, store.sums, first_rows)
        for index in todo:
            if index in first_rows:
                for observer in observers:
                    observer.add_rows(first_rows(index), store.sums)
            else:
                run(index, observers)
            store.sample_done()
    store.finish(tokens=samples.numel())


def _run_sample(
    model: CausalLM,
    attention: list[Attention],
    sample: torch.Tensor,
    observers: list[Observer],
    sums: Mapping[str, torch.Tensor],
    gradient: bool,
) -> None:
    embedding = model.get_input_embeddings()
    ids = token_ids(sample).unsqueeze(0).to(embedding.weight.device)
    # Hooks must not see the second forward pass that recomputes activations.
    handles = [h for o in observers for h in o.attach(attention, sums)]
    try:
        with torch.set_grad_enabled(gradient):
            # Weights may all be frozen: the graph starts at the embeddings.
            embedded = embedding(ids).detach().requires_grad_(gradient)
            hidden = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    if gradient:
        counted = (sample[1:] >= 0).nonzero().squeeze(1)
        hidden.backward(_loss_gradient(model, hidden.detach(), ids, counted))
        for observer in observers:
            if observer.needs_gradient:
                observer.after_backward(attention, sums)
        model.zero_grad(set_to_none=True)


def freeze(model: CausalLM, gradient: bool, seq_len: int) -> None:
    """Let no weight learn; recompute activations in backward passes that could not keep them.

    Args:
        model: its ``requires_grad`` flags and mode are changed.
        gradient: whether there will be backward passes.
        seq_len: tokens of a pass.
    """
    model.requires_grad_(False)
    model.eval()
    config = model.config
    elements_per_token = config.num_hidden_layers * (
        16 * config.hidden_size + 4 * config.intermediate_size
    )
    # Kept activations would keep a spread model's weights on their device, too.
    spread = hasattr(model, "hf_device_map")
    many = seq_len * elements_per_token * model.dtype.itemsize > ACTIVATION_BYTES
    if gradient and (many or spread):
        model.train()  # transformers checkpoints activations only in training mode
        model.gradient_checkpointing_enable({"use_reentrant": False})


def _loss_gradient(
    model: CausalLM, hidden: torch.Tensor, ids: torch.Tensor, counted: torch.Tensor
) -> torch.Tensor:
    """Gradient of the next-token loss, summed over tokens, with respect to ``hidden``.

    Summed, so that the gradient of a token has the same size in samples of any length.

    Args:
        model: its output head is frozen.
        hidden: ``[1, tokens, H]``.
        ids: ``[1, tokens]``.
        counted: positions whose next token counts; there may be none.
    """
    hidden.requires_grad_(True)
    hidden.grad = torch.zeros_like(hidden)
    for positions in counted.split(LOGIT_CHUNK):
        logits = output_logits(model, hidden[0, positions.to(hidden.device)])
        target = ids[0, positions.to(ids.device) + 1].to(logits.device)
        F.cross_entropy(logits, target, reduction="sum").backward()
    return hidden.grad


def output_logits(model: CausalLM, hidden: torch.Tensor) -> torch.Tensor:
    """What the model predicts from its last hidden states, float32."""
    logits = model.lm_head(hidden).float()
    if scaling := getattr(model.config, "logits_scaling", None):  # Granite
        logits = logits / scaling
    if cap := getattr(model.config, "final_logit_softcapping", None):  # Gemma 2
        logits = cap * torch.tanh(logits / cap)
    return logits


def sum_shapes(
    observers: list[Observer], geometry: AttentionGeometry
) -> dict[str, tuple[int, ...]]:
    """Shapes of all sums of the observers."""
    return {k: v for observer in observers for k, v in observer.shapes(geometry).items()}
