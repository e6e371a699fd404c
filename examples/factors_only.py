"""Serve factors, a small file, on the unmodified base model.

``recalkv compress MODEL -o FACTORS --compression 0.75 --factors-only`` makes them; then
``python examples/factors_only.py MODEL FACTORS``.
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams


def main(model: str, factors: str) -> None:
    config = json.loads((Path(factors) / "config.json").read_text())
    llm = LLM(
        model=model,
        attention_backend="recalkv",
        hf_overrides={
            "architectures": config["architectures"],
            "recalkv": {"factors": factors},
        },
        max_model_len=2048,
        kv_cache_memory_bytes=256 << 20,
        enforce_eager=True,
    )
    [answer] = llm.generate("The sea is", SamplingParams(temperature=0, max_tokens=32))
    print(answer.prompt + answer.outputs[0].text)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
