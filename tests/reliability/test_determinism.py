"""The same input gives the same output: checkpoints to the byte, tokens whatever runs beside."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recalkv_vllm import ops
from recalkv_vllm.compression.calibration import text
from recalkv_vllm.compression.calibration.builtin_text import builtin_documents
from recalkv_vllm.compression.options import CompressOptions
from recalkv_vllm.compression.pipeline import compress
from tests.e2e.conftest import BIN, run_engines
from tests.ops.cases import AttentionCase, build
from tests.ops.cpu_versions import threads
from tests.ops.strategies import attention_cases
from tests.reliability.figures import count
from tests.reliability.fuzzing import fuzzed

FEW = {"num_samples": 4, "seq_len": 32}


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(
    "options",
    [
        {"method": "kfac", "latent_dtype": "auto"},
        {"method": "recalkv"},
        {"method": "palu"},
        {"factors_only": True},
    ],
    ids=str,
)
def test_same_seed_same_bytes(tiny: Path, tmp_path: Path, monkeypatch, options: dict) -> None:
    """Also of the model card, and with statistics that are computed anew."""
    made = []
    for run in ("a", "b"):
        monkeypatch.setenv("RECALKV_CACHE", str(tmp_path / run / "cache"))
        compress(CompressOptions(str(tiny), tmp_path / run / "out", 0.5, **FEW, **options))
        made.append(digests(tmp_path / run / "out"))
    assert "recalkv.safetensors" in made[0]
    assert made[0] == made[1]


def test_same_bytes_from_another_process(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    """String hashes, on which the order of a set depends, differ between processes."""
    monkeypatch.setattr(text, "builtin_documents", builtin_documents)  # all, as the other has
    here, there = tmp_path / "here" / "out", tmp_path / "there" / "out"
    compress(CompressOptions(str(tiny), here, 0.5, **FEW))
    arguments = ["--compression", "0.5", "--num-samples", "4", "--seq-len", "32"]
    done = subprocess.run(
        [BIN / "recalkv", "compress", tiny, "-o", there, *arguments],
        env={**os.environ, "PYTHONHASHSEED": "1", "RECALKV_CACHE": str(tmp_path / "there")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert digests(here) == digests(there)


@fuzzed(60)
@given(
    case=attention_cases((32, 64, 80)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
)
def test_attention_of_a_sequence_does_not_depend_on_the_batch(
    case: AttentionCase, dtype: torch.dtype
) -> None:
    """To the bit, on one thread: with more, how a sequence is split depends on what else there
    is to do."""
    inputs = build(case, dtype)
    bound, batch = ops.bind(inputs.layer), inputs.batch
    starts = batch.query_start_loc.tolist()
    with threads(1):
        together = bound.attend(*inputs.call)
        for i, (queries, _) in enumerate(case.batch):
            rows = slice(starts[i], starts[i + 1])
            one = ops.Batch(
                block_table=batch.block_table[i : i + 1],
                seq_lens=batch.seq_lens[i : i + 1],
                query_start_loc=torch.tensor([0, queries], dtype=torch.int32),
            )
            alone = bound.attend(inputs.q[rows], inputs.kv_cache, one)
            for a, b in zip(alone, together, strict=True):
                assert torch.equal(a, b[rows])
    count("batches tried")


#: How far log-probabilities of the same float32 tokens may lie apart in different batches.
LOGPROB_TOLERANCE = 2e-4


@pytest.mark.slow
def test_greedy_output_does_not_depend_on_the_batch(small: Path, compressed, small_prompts) -> None:
    """Alone, among companions, in another order, and prefilled in chunks of other sizes."""
    draw = random.Random(1)
    model = compressed(small, compression=0.5)
    prompts = small_prompts.ids
    companions = [[draw.randrange(3, 500) for _ in range(n)] for n in (90, 5, 140, 33, 61)]
    sampling = {"max_tokens": 24, "ignore_eos": True, "logprobs": 1}

    def batch(*ids: list[int]) -> dict:
        return {"prompts": list(ids), "sampling": sampling}

    order = [*companions[:2], prompts[2], companions[2], *prompts[:2], prompts[3], *companions[3:]]
    batches = [*map(batch, prompts), batch(*prompts), batch(*order)]
    jobs = [
        small_prompts.job(
            model, *batches, max_num_batched_tokens=budget, enable_prefix_caching=False
        )
        for budget in (512, 96)
    ]
    results = run_engines(*jobs)
    where = [order.index(prompt) for prompt in prompts]

    def answers(result: dict) -> Iterator[list[tuple[list[int], list[float]]]]:
        """Per way of batching, the tokens and log-probabilities of each of the prompts."""
        found = [
            [
                (tokens, [at[str(t)] for t, at in zip(tokens, output["logprobs"], strict=True)])
                for tokens, output in zip(*parts, strict=True)
            ]
            for parts in zip(result["tokens"], result["outputs"], strict=True)
        ]
        yield [answer for single in found[: len(prompts)] for answer in single]
        yield found[-2]
        yield [found[-1][i] for i in where]

    ways = [way for result in results for way in answers(result)]
    largest = 0.0
    for way in ways[1:]:
        for (tokens, logprobs), (alone, logprobs_alone) in zip(way, ways[0], strict=True):
            assert tokens == alone
            gaps = [abs(a - b) for a, b in zip(logprobs, logprobs_alone, strict=True)]
            largest = max(largest, *gaps)
    assert largest <= LOGPROB_TOLERANCE
    count("ways of batching compared", len(ways))
    count("largest difference of log-probabilities between batches (1e-9)", round(largest * 1e9))
