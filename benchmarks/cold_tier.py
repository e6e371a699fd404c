"""The cold tier: how much smaller files are than latents, and restoring beside computing.

Prompts of real text are sent to one engine with as little host memory as offloading can have. A
prompt that comes again, after others have taken its place there, is restored from files; in turn
with new prompts, which are computed.

    python -m recalkv_vllm.benchmarks.cold_tier CHECKPOINT TEXT
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

#: Of a cached page; vLLM's default on GPUs is 16 and on CPUs 128.
BLOCK_SIZE = 64
#: Prompts that the predictor is fitted to, and that fit into host memory.
WARM_UP_TOKENS, HOST_PROMPTS = 8192, 2
#: Seconds until the files of a prompt are there.
PATIENCE = 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="a compressed checkpoint")
    parser.add_argument("text", type=Path, help="real text; its start fits the predictor")
    parser.add_argument("--tokens", type=int, default=1536, help="of the prefix that is restored")
    parser.add_argument("--rounds", type=int, default=7, help="prompts restored and computed")
    options = parser.parse_args()
    print(json.dumps(measure(options.checkpoint, options.text, options.tokens, options.rounds)))


def measure(checkpoint: Path, text: Path, tokens: int, rounds: int) -> dict[str, Any]:
    """Sizes in bytes and times in seconds; prompts are of ``tokens`` and one more."""
    config = json.loads((checkpoint / "config.json").read_text())
    warm_up = -(-WARM_UP_TOKENS // tokens)
    bytes_per_token = cached_bytes(config)
    with tempfile.TemporaryDirectory() as root:
        extra = {
            "spec_name": "ColdTierSpec",
            "spec_module_path": "recalkv_vllm.serving.cold_tier.spec",
            "root_dir": root,
            # Chunks are padded to pages of memory.
            "cpu_bytes_to_use": int(HOST_PROMPTS * tokens * bytes_per_token * 1.05),
        }
        generate = engine(checkpoint, extra, tokens)
        prompts = read_prompts(checkpoint, text, tokens + 1, warm_up + HOST_PROMPTS + rounds + 1)
        chunks = 0

        def compute(prompt: list[int]) -> float:
            nonlocal chunks
            seconds = generate(prompt)
            chunks += tokens // BLOCK_SIZE
            wait_for(lambda: len(files(root)) == chunks)
            return seconds

        for prompt in prompts[: warm_up + HOST_PROMPTS + 1]:
            compute(prompt)
        fitted = set(files(root)[: warm_up * tokens // BLOCK_SIZE])
        later = prompts[warm_up:]
        restored, computed = [], []
        for i in range(rounds):
            computed.append(compute(later[i + HOST_PROMPTS + 1]))
            restored.append(generate(later[i]))
        page_bytes = BLOCK_SIZE * bytes_per_token
        ratios = [page_bytes / path.stat().st_size for path in files(root) if path not in fitted]
        predictor = sum(path.stat().st_size for path in Path(root).rglob("predictor-*.npz"))
    return {
        "latent_bytes_per_token": bytes_per_token,
        "smaller_by": spread(ratios),
        "files": len(ratios),
        "predictor_bytes": predictor,
        "computed_seconds": spread(computed),
        "restored_seconds": spread(restored),
        "restored_of_computed": median(restored) / median(computed),
    }


def engine(checkpoint: Path, extra: dict[str, Any], tokens: int) -> Callable[[list[int]], float]:
    """A function that sends a prompt and returns the seconds until its first token."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(checkpoint),
        max_model_len=tokens + 16,
        max_num_batched_tokens=tokens + 16,
        block_size=BLOCK_SIZE,
        enable_prefix_caching=False,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 28,
        kv_transfer_config={
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": extra,
        },
        disable_log_stats=True,
    )
    sampling = SamplingParams(max_tokens=1, temperature=0)

    def generate(prompt: list[int]) -> float:
        start = time.perf_counter()
        llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
        return time.perf_counter() - start

    return generate


def cached_bytes(config: dict[str, Any]) -> int:
    """Bytes of a token in all layers."""
    from recalkv_vllm.checkpoint import AttentionGeometry, RecalkvConfig, kv_bytes_per_token

    recalkv, geometry = (
        RecalkvConfig.from_hf_config(config),
        AttentionGeometry.from_hf_config(config),
    )
    return kv_bytes_per_token(recalkv, geometry, 2)["compressed"]


def read_prompts(checkpoint: Path, text: Path, tokens: int, count: int) -> list[list[int]]:
    """Neighboring pieces of the text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(text.read_text("utf-8"))["input_ids"]
    if len(ids) < tokens * count:
        raise SystemExit(f"{text}: expected {tokens * count} tokens, found {len(ids)}")
    return [ids[i * tokens : (i + 1) * tokens] for i in range(count)]


def files(root: str) -> list[Path]:
    """Chunks, in the order of their writing."""
    return sorted(Path(root).rglob("*.bin"), key=lambda path: path.stat().st_mtime)


def wait_for(condition: Callable[[], bool]) -> None:
    """Raises TimeoutError if it does not come true."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("expected the files of a prompt")
        time.sleep(0.1)


def spread(values: list[float]) -> dict[str, float]:
    """Of several: the smallest, the quartiles and the largest."""
    low, middle, high = quantiles(values, n=4)
    return {"min": min(values), "low": low, "median": middle, "high": high, "max": max(values)}


if __name__ == "__main__":
    # One line is the result.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    main()
