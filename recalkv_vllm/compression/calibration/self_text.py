"""Calibration text that the model writes itself: for when there is none like what it will read.

Texts of many kinds follow one another in rows of equal length. The rows of a batch that are asked
for are written at once, a token of each per step. Batches are kept on disk: compressing the same
model again, or asking for more samples, writes no row a second time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch

from recalkv_vllm.compression.base_model.attention import CausalLM
from recalkv_vllm.compression.calibration.one_token_attention import use_one_token_attention
from recalkv_vllm.compression.calibration.prompts import Prompts
from recalkv_vllm.compression.calibration.reserved_cache import reserved_cache
from recalkv_vllm.compression.errors import output_errors
from recalkv_vllm.compression.progress import Stage

#: Rows of a batch, at most; more are faster per row, but few are needed: two for each of a third of
#: the default 64 samples, and some to hold out. No multiple of two or three, the number of kinds of
#: prompts: a row's next prompt is so many further on, and kinds are to take turns.
ROWS = 61
#: Tokens of a row, at most: a step of long rows takes longer, and more texts are begun.
ROW_TOKENS = 256
#: A text that has not ended after so many tokens is cut off.
TEXT_TOKENS = 256
#: Of a batch's rows in turn: 1 is the model's own distribution; below, text is more coherent.
TEMPERATURES = (0.7, 1.0)


def sample_self(
    load_model: Callable[[], CausalLM],
    tokenizer,
    num_samples: int,
    seq_len: int,
    seed: int,
    directory: Path,
) -> torch.Tensor:
    """Samples of text that the model writes.

    Args:
        load_model: called only if text must be written.
        tokenizer: the model's.
        num_samples: more samples begin with the same ones.
        seq_len: tokens of a sample; one longer than :data:`ROW_TOKENS` is made of several rows.
        seed: of the drawing.
        directory: where batches of this model are kept.

    Returns:
        ``[num_samples, seq_len]`` int64, on the CPU; the same for the same ``seed`` and machine, up
        to what rounding makes of how many rows are written at once.

    Raises:
        InputError: the tokenizer has no token that begins or ends a text.
        OutputError: ``directory`` cannot be written.
    """
    prompts = Prompts.of(tokenizer)
    rows_per_sample = -(-seq_len // ROW_TOKENS)
    row_tokens = -(-seq_len // rows_per_sample)
    total = num_samples * rows_per_sample
    folder = directory / f"{_recipe(prompts)}-tokens-{row_tokens}-seed-{seed}"
    paths = [folder / f"batch-{batch}.npy" for batch in range(-(-total // ROWS))]
    batches = [_kept(path, row_tokens) for path in paths]
    wanted = [range(len(kept), min(ROWS, total - i * ROWS)) for i, kept in enumerate(batches)]
    missing = [rows for rows in wanted if rows]
    if missing:
        with _output_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        model = load_model()
        what = f"the model writes {sum(map(len, missing))} x {row_tokens} tokens"
        with Stage(what, total=len(missing) * (row_tokens - 1)) as stage:
            for batch, rows in enumerate(wanted):
                if rows:
                    written = write_rows(model, prompts, batch, rows, row_tokens, seed, stage)
                    batches[batch] = torch.cat([batches[batch], written])
                    with _output_errors(folder):
                        _save(paths[batch], batches[batch])
    written = torch.cat(batches)[:total]
    return written.reshape(num_samples, -1)[:, :seq_len].contiguous()


def write_rows(
    model: CausalLM,
    prompts: Prompts,
    batch: int,
    rows: range,
    row_tokens: int,
    seed: int,
    stage: Stage,
) -> torch.Tensor:
    """Write rows of one batch.

    Args:
        model: to write with; its attention may be changed.
        prompts: to begin texts with.
        batch: which batch; each has random numbers and prompts of its own.
        rows: which of its :data:`ROWS` rows.
        row_tokens: tokens per row.
        seed: of the random numbers.
        stage: told of every step.

    Returns:
        ``[len(rows), row_tokens]`` int64, on the CPU.
    """
    ends = _ends(model, prompts)
    texts = [_Texts(prompts.of_row(batch * ROWS + row, ROWS), ends) for row in rows]
    # Made on the CPU, where a generator is the same for every device.
    generator = torch.Generator().manual_seed(seed + (batch << 32))
    uniform = torch.rand(row_tokens, ROWS, generator=generator)[:, rows]
    temperature = torch.tensor(TEMPERATURES).repeat(ROWS)[rows].unsqueeze(1)
    device = model.get_input_embeddings().weight.device
    tokens = [[text.first() for text in texts]]
    use_one_token_attention(model)
    cache = reserved_cache(model.config, row_tokens)
    with torch.inference_mode():
        for step in range(row_tokens - 1):
            ids = torch.tensor(tokens[-1], device=device).unsqueeze(1)
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            logits = out.logits[:, -1].float()
            drawn = sample(logits / temperature.to(logits), uniform[step].to(logits)).tolist()
            tokens.append([text.next(token) for text, token in zip(texts, drawn, strict=True)])
            stage.step()
    return torch.tensor(tokens).T.contiguous()


def sample(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw an index from every row of ``logits: [rows, n]`` by ``uniform: [rows]`` in [0, 1)."""
    total = logits.softmax(dim=1).cumsum(dim=1)
    # Rounding leaves the last sum a little off 1.
    threshold = uniform.unsqueeze(1) * total[:, -1:]
    drawn = torch.searchsorted(total, threshold, right=True).squeeze(1)
    return drawn.clamp(max=logits.shape[1] - 1)


class _Texts:
    """Decides a row's next token: one of a prompt, or what the model drew."""

    def __init__(self, prompts: Iterator[tuple[int, ...]], ends: set[int]):
        self._prompts = prompts
        self._ends = ends
        self._begin()

    def _begin(self) -> None:
        self._prompt = list(next(self._prompts))
        self._tokens = 0

    def first(self) -> int:
        self._tokens += 1
        return self._prompt.pop(0)

    def next(self, drawn: int) -> int:
        if self._prompt:
            return self.first()
        self._tokens += 1
        if drawn in self._ends or self._tokens >= TEXT_TOKENS:
            self._begin()
        return drawn


def _ends(model: CausalLM, prompts: Prompts) -> set[int]:
    """Tokens that end a text; chat models have several."""
    config = getattr(model, "generation_config", None)
    more = getattr(config, "eos_token_id", None)
    ends = {prompts.end, *(more if isinstance(more, list) else [more])}
    return {end for end in ends if end is not None}


def _recipe(prompts: Prompts) -> str:
    """Digest of what decides on the text besides model, size and seed (hex)."""
    recipe = f"{prompts} {ROWS} {TEXT_TOKENS} {TEMPERATURES}"
    return hashlib.blake2b(recipe.encode(), digest_size=8).hexdigest()


def _output_errors(folder: Path) -> AbstractContextManager[None]:
    return output_errors(f"calibration text {folder} (in RECALKV_CACHE)")


def _kept(path: Path, row_tokens: int) -> torch.Tensor:
    """The rows of a batch that were written before, ``[rows, row_tokens]``."""
    if not path.is_file():
        return torch.empty(0, row_tokens, dtype=torch.int64)
    return torch.from_numpy(np.load(path))


def _save(path: Path, rows: torch.Tensor) -> None:
    partial = path.with_suffix(f".{os.getpid()}.npy")
    np.save(partial, rows.numpy())
    partial.rename(path)
